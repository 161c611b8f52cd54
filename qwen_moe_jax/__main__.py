"""`python -m qwen_moe_jax`: the same as the command `qwen-moe-jax`."""

import sys

from qwen_moe_jax.cli.start import start

if __name__ == "__main__":
    sys.exit(start())
