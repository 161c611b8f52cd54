"""Attention as pure functions on one device's arrays: blocks of queries and keys by XLA, and JAX's splash kernels."""
