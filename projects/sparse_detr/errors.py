"""Errors that tell users what to mend."""

import contextlib
import sys
from collections.abc import Iterator, Sequence


class UserError(ValueError):
    """A config, data set or weights file is not as it must be; the message says what to do."""


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """For scripts: ends the program with a ``UserError``'s message, without a traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names, and whether there are more, for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
