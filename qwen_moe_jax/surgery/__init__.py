"""Checkpoints in, checkpoints (or a verdict on them) out: no model is run, and no device is used."""
