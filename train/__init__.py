"""The teacher: trains a decoder of `qwen_moe_jax` from one short TOML file. Run it with `python -m train CONFIG`.

It reads as config → mesh → data → step → checkpoint, report; `loop.py` is the place to start.
"""
