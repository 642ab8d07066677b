"""A page on a run or on several: what was learned, and where the model errs."""

from .page import write_page

__all__ = ["write_page"]
