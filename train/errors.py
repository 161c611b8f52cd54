"""The trainer's own refusal. It is known here, without JAX, so that `__main__` can name it at once."""


class NonFiniteError(ArithmeticError):
    """Training cannot go on: a loss or a gradient is no finite number."""
