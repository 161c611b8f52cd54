"""`python -m qwen_moe_jax`: the same as the command `qwen-moe-jax`."""

import sys

from qwen_moe_jax.cli.main import main

sys.exit(main())
