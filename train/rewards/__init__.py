"""Rewards: plain Python functions (prompt, completion, row) → a number, run in worker processes with a time limit.

`pool` starts the workers, `worker` is what they run, `builtin` has the functions of the package. Nothing here imports
JAX, which a worker does not need and would not share.
"""
