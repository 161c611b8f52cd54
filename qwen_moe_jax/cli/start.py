"""The program `qwen-moe-jax`: the commands are imported where a Ctrl-C ends the program in silence."""

import sys

from qwen_moe_jax.cli.interrupts import INTERRUPTED, end_process, leaving_on_interrupt


def start() -> int:
    """Runs the command of this process's command line; see `main`."""
    with leaving_on_interrupt():
        from qwen_moe_jax.cli.main import main

        code = main()
        if code == INTERRUPTED:  # not by the end of Python, which crashes while XLA compiles
            sys.stdout.flush()
            end_process(code)
        return code
