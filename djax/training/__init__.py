"""The small model: its problems, tokenizer, objective, trainer and evaluation."""
