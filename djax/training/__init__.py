"""Training: the one trainer, its contracts and objectives; the small model's problems, tokenizer, run and evaluation."""
