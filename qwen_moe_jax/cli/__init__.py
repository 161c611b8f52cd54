"""The command `qwen-moe-jax`."""
