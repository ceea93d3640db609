"""Which hyperparameters of CTBPRN are best, and how do we know?  The library behind the notebooks."""

__version__ = "0.1.0"


class InputError(ValueError):
    """Something given to the library cannot be used; the message says what, where, and what was expected."""
