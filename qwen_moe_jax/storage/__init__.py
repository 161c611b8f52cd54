"""Weights on disk and on devices, as bytes and blocks: knows no name of any model."""
