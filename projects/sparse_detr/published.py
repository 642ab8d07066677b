"""The checkpoints that others have published for the shipped configs: where they are, what they reach.

The table is ``configs/published.json``: links, AP and licences as in the repositories' README and LICENSE
files. The first checkpoint of a config is the config's own; others of the same config have another training.
``python -m sparse_detr.published`` prints the tables of docs/model_zoo.md.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from urllib.parse import urlparse

from .errors import UserError, listed

PREFIX = "published://"
_BEHIND_BROWSER = ("drive.google.com", "pan.baidu.com", "onedrive.live.com")


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
        name: by which ``published://NAME`` finds it; unique.
        config: name of the shipped config whose model it is; empty if there is none.
        ap: on COCO val2017 as published, percent.
        repository: on GitHub, whose README has the link.
        url: of the file, or of the page behind which it lies.
        note: how it differs from the config's own.
        sha256: of the file, hexadecimal; empty where nobody has published it.
    """

    name: str
    config: str
    ap: float
    repository: str
    url: str
    note: str = ""
    sha256: str = ""

    @property
    def needs_browser(self) -> bool:
        """Whether a program would get a web page instead of the file."""
        return urlparse(self.url).hostname in _BEHIND_BROWSER

    @property
    def file_name(self) -> str:
        """Of a copy that is put into the cache by hand."""
        return self.name + (".zip" if self.url.endswith(".zip") else ".pth")


@functools.cache
def _table() -> dict:
    return json.loads((resources.files(__package__ + ".configs") / "published.json").read_text("utf-8"))


@functools.cache
def checkpoints() -> tuple[Published, ...]:
    return tuple(Published(**row) for row in _table()["checkpoints"])


def find(name: str) -> Published:
    """The checkpoint of that name, or the own one of a config of that name.

    A config for data of one's own (``custom/...``) has the one that it is fine-tuned from.

    Raises:
        UserError: there is none.
    """
    config = _table()["fine_tuned_from"].get(name, name)
    for entry in checkpoints():
        if name and name == entry.name or config and config == entry.config:
            return entry
    known = [
        *dict.fromkeys(entry.config for entry in checkpoints() if entry.config),
        *_table()["fine_tuned_from"],
    ]
    close = difflib.get_close_matches(name, [*known, *(e.name for e in checkpoints())], n=3, cutoff=0.4)
    raise UserError(
        f"no published weights belong to {name!r}. "
        + (f"There are some for {listed(close)}" if close else "docs/model_zoo.md has them all")
        + ": pass published://NAME, or a file"
    )


def _rows(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def by_config() -> str:
    """Markdown: each config that has published weights, and its own AP."""
    first = {entry.config: entry for entry in reversed(checkpoints()) if entry.config}
    others = {c: [e for e in checkpoints() if e.config == c][1:] for c in first}
    return _rows(
        ("config", "AP", "fetched by itself", "others for it"),
        [
            (
                f"`{config}`",
                str(entry.ap),
                "no: browser" if entry.needs_browser else "yes",
                ", ".join(str(other.ap) for other in others[config]),
            )
            for config, entry in sorted(first.items())
        ],
    )


def by_repository() -> str:
    """Markdown: all checkpoints, those of a repository together."""
    parts = []
    for repository, licence in _table()["licences"].items():
        rows = [
            (
                f"`{entry.name}`",
                f"`{entry.config}`" if entry.config else "none",
                str(entry.ap),
                f"[{'browser' if entry.needs_browser else 'file'}]({entry.url})",
                entry.note,
            )
            for entry in checkpoints()
            if entry.repository == repository
        ]
        link = f"[{repository}](https://github.com/{repository})"
        parts.append(f"### {link}, {licence}\n\n{_rows(('name', 'config', 'AP', 'link', 'note'), rows)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(by_config(), by_repository(), sep="\n\n")
