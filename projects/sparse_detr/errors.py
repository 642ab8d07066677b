"""Errors that tell users what to mend."""

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn


class UserError(ValueError):
    """A config, data set or weights file is not as it must be; the message says what to do."""


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """For scripts: ends the program with one line, without a traceback, on a ``UserError``, a full disk and
    Ctrl-C (status 130)."""
    try:
        yield
    except UserError as error:
        _end(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _end(f"error: {error}: make room, then start again, a training with --resume")
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        sys.exit(130)


def _end(line: str) -> NoReturn:
    """Exits with the line, which torchrun repeats at the end of its own report on the failed processes."""
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        os.makedirs(os.path.dirname(report), exist_ok=True)
        with open(report, "w", encoding="utf-8") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)
    sys.exit(line)


def listed(names: Sequence[str], limit: int = 10) -> str:
    """The first names, and whether there are more, for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
