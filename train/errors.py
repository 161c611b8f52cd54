"""The trainer's own exception, in a module without JAX so that `__main__` can import it early."""


class NonFiniteError(ArithmeticError):
    """Training cannot go on: the loss or the gradient is not finite."""
