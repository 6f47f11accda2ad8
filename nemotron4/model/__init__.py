"""The decoder: plain single-device modules with Hugging Face weight names."""
