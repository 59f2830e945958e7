"""Checkpoints on disk: read, checked, loaded, saved, converted."""
