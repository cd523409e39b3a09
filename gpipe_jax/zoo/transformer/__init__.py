"""Build Transformers: language models and encoder-decoders."""
