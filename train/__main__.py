"""`python -m train CONFIG …`: `train.main`, imported where a Ctrl-C ends the program in silence."""

import sys

from qwen_moe_jax.cli.interrupts import INTERRUPTED, end_process, leaving_on_interrupt

if __name__ == "__main__":
    with leaving_on_interrupt():
        from train.errors import CANNOT_WRITE
        from train.main import main

        code = main(sys.argv[1:])
    # Without the end of Python: coroutines of failed saves print warnings there, and it crashes while XLA compiles.
    if code in (CANNOT_WRITE, INTERRUPTED):
        sys.stdout.flush()
        end_process(code)
    sys.exit(code)
