"""The tasks of `minirea eval` that make their own prompts."""
