"""What Hugging Face's files say: configurations, weights, tokenizers, chat templates."""
