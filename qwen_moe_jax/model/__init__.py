"""Tokens to logits: the decoder, its layers and its heads."""
