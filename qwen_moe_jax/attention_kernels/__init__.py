"""Attention and the gated delta rule as pure functions on one device's arrays, by XLA and by Pallas kernels."""
