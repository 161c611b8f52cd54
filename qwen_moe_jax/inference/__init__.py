"""Inference: text generation, scoring and evaluation."""
