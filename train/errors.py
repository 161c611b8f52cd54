"""The trainer's own exceptions, in a module without JAX so that `__main__` can import it early."""


class NonFiniteError(ArithmeticError):
    """Training cannot go on: the loss or the gradient is not finite."""


#: The exit code of a run that cannot write: EX_IOERR of sysexits.h.
CANNOT_WRITE = 74


class SaveError(OSError):
    """A file of the run cannot be written; what was complete before still is."""
