"""Kernels for CPUs: C functions that LLVM compiles when they are first needed, and that XLA calls.

This folder has what JAX code calls, and the compiler; `functions` has what is compiled, and `llvm` how it is written.
"""

#: Floats of a vector; the sizes that kernels take are multiples of it.
LANES = 16
