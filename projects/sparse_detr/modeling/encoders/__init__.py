"""Encoders: which tokens are refreshed. One paper, one or two files.

What a file lists in ``__all__`` can be imported from here and from ``sparse_detr.modeling``: a new
file needs no entry anywhere.
"""

from importlib import import_module
from pkgutil import iter_modules

__all__: list[str] = []
for _name in sorted(file.name for file in iter_modules(__path__)):
    _file = import_module(f".{_name}", __name__)
    for _public in getattr(_file, "__all__", ()):
        globals()[_public] = getattr(_file, _public)
        __all__.append(_public)
