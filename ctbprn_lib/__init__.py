"""Which hyperparameters of CTBPRN are best, and how do we know?  The library behind the notebooks."""

__version__ = "0.1.0"


class InputError(ValueError):
    """Something given to the library cannot be used; the message says what, where, and what was expected.

    It may quote names from anywhere, so characters that do not print are shown escaped, and it ends after 2,000.
    """

    def __init__(self, message: str) -> None:
        shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)
        super().__init__(shown if len(shown) <= 2000 else shown[:2000] + " …")

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the message, and no traceback."""
        return [str(self)]
