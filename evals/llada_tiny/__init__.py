"""The small trained LLaDA that tests and CPU runs use: its problems, its tokenizer, its training and its checkpoint."""
