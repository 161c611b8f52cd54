"""The trainer: trains a decoder of `qwen_moe_jax` from one TOML file. Run it with `python -m train CONFIG`.

It reads as config → mesh → data → program → loop → checkpoint; start with `loop.py`.
"""
