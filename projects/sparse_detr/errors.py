"""Errors that tell users what to mend."""

import contextlib
import errno
import sys
from collections.abc import Iterator, Sequence


class UserError(ValueError):
    """A config, data set or weights file is not as it must be; the message says what to do."""


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """For scripts: ends the program with one line, without a traceback, on a ``UserError``, a full disk and
    Ctrl-C (status 130)."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: {error}: make room, then start again, a training with --resume")
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        sys.exit(130)


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names, and whether there are more, for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
