"""What Hugging Face's files say: configurations, weights, tokenizers, chat templates. What a new
family of models needs is said at the top of families.py."""
