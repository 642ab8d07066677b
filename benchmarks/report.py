"""What measurements are named and reported with: configs, the machine, tables, JSON of a line per record."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path


def machine(device: str) -> dict[str, str]:
    """What a measurement on ``device`` ("cpu" or "cuda") ran on."""
    import torch  # not needed to write what others have measured

    found = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x]
        found["processor"] = f"{names[0]}, {len(names)} logical cores" if names else platform.machine()
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def named_config(text: str) -> tuple[str, str, list[str]]:
    """``[NAME=]CONFIG [key=value ...]`` as name, config and overrides; the name may have spaces."""
    match = re.fullmatch(r"(?:(?P<name>[^=]*)=)?(?P<config>[^\s=]+)(?P<rest>(?:\s+\S+=\S+)*)", text.strip())
    if match is None:
        raise SystemExit(f"{text!r}: expected [NAME=]CONFIG [key=value ...]")
    config, overrides = match["config"], match["rest"].split()
    return match["name"] or " ".join([config.rsplit("/", 1)[-1], *overrides]), config, overrides


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def markdown(head: list[str], rows: list[list[object]]) -> str:
    """A table; the first column stands left, the others right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        shown = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "| " + " | ".join(shown) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def write_json(path: Path | str, value: dict | list) -> None:
    """Writes ``value`` as JSON that is read and compared by line: each member of a list is one line."""
    Path(path).write_text(_lines(value) + "\n")


def _lines(value: object, indent: str = "") -> str:
    inner = indent + " "
    if isinstance(value, dict) and any(map(_has_records, value.values())):
        items = [f"{json.dumps(key)}: {_lines(x, inner)}" for key, x in value.items()]
    elif isinstance(value, list) and _has_records(value):
        items = [json.dumps(x) for x in value]
    else:
        return json.dumps(value)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    body = "".join(f",\n{inner}{item}" for item in items)[1:]
    return f"{opening}{body}\n{indent}{closing}"


def _has_records(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, dict) for x in value))
