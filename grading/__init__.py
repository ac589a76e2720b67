"""What a model's replies are worth: final answers (GSM8K, MATH) and MT-Bench."""
