"""The loop, what it is asked, and every way in: generate, slots that rows join and leave, explain, export."""
