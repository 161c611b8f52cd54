"""The C functions, written in LLVM's intermediate code: one a file, for the JAX function that its first line names.

Only `nn.kernels` imports them, where llvmlite is installed.
"""
