"""Rollouts: prompts continued by the model that is trained, and the batch that a step learns from them.

`prompts` reads prompts, `generate` samples completions with the package's engine, `batch` makes arrays of them, `feed`
does that for every step.
"""
