"""The trainer's own exceptions, in a module without JAX so that `__main__` can import it early."""


class NonFiniteError(ArithmeticError):
    """Training cannot go on: the loss or the gradient is not finite."""


class SaveError(OSError):
    """A file of the run cannot be written; what was complete before still is."""
