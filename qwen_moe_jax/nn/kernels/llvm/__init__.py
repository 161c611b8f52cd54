"""How C functions are written in LLVM's intermediate code: what those of `nn.kernels.functions` have in common.

Only `nn.kernels` imports this, where llvmlite is installed.
"""
