"""Kernels for one kind of processor, compiled when they are first needed."""
