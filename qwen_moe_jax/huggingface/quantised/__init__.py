"""Quantised checkpoints, dequantised while they are read: a file for each method of the Hub.

Each takes a folder's tensors and gives them with `X.weight` in place of the tensors that a quantised module X has.
Values are those of the library that wrote the files, in its order of operations and its dtype.
"""
