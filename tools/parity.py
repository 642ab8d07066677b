#!/usr/bin/env python
"""Compare the models with what their published implementations computed.

    python tools/parity.py tests/parity                     every case below a folder
    python tools/parity.py case.json --dtype float32        within 20 noise floors
    python tools/parity.py tests/parity --json result.json

A case is a ``.json`` beside a ``.npz`` (see tests/parity/README.md). Weights are drawn under their
published names and enter through the checkpoint converter, so a pass also shows that published
checkpoints load with nothing left over. The exit status is 0 if every case passed.
"""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path

import _checkout
import torch

from tests.parity.replay import replay
from tests.parity.replay.case import Case


def find_cases(paths: list[str]) -> list[Path]:
    """Case files named, and those below folders; a ``.json`` without ``.npz`` is not a case."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*.json") if p.with_suffix(".npz").exists())
        else:
            found.append(path.with_suffix(".json"))
    return found


def run(path: Path, dtype: torch.dtype) -> dict:
    """Run one case; a case that cannot be read or built has failed."""
    start = time.perf_counter()
    case = None
    result = {"case": path.stem, "path": str(path), "dtype": str(dtype).removeprefix("torch.")}
    try:
        case = Case.load(path, dtype)
        replay(case)
        error = None
    except Exception as caught:  # noqa: BLE001 - reported as this case's failure
        error = f"{type(caught).__name__}: {caught}"
        result["traceback"] = traceback.format_exc()
    checks = case.checks if case else []
    values = [c for c in checks if not c.decision]
    decisions = [c for c in checks if c.decision]
    worst = max(values, key=lambda c: c.error / c.tolerance, default=None)
    result.update(
        passed=error is None and bool(checks) and all(c.passed for c in checks),
        error=error,
        seconds=round(time.perf_counter() - start, 2),
        worst=worst and {"array": worst.name, "error": worst.error, "tolerance": worst.tolerance},
        decisions=len(decisions),
        failed=[
            {"array": c.name, "error": c.error, "tolerance": c.tolerance} for c in checks if not c.passed
        ],
    )
    return result


def describe(result: dict) -> str:
    """One line for a case."""
    line = f"{'PASS' if result['passed'] else 'FAIL'}  {result['case']:<34}"
    if result["worst"]:
        worst = result["worst"]
        line += f" worst {worst['array']} {worst['error']:.1e} (allowed {worst['tolerance']:.1e})"
    wrong = sum(f["error"] == float("inf") for f in result["failed"])
    line += f"  decisions {result['decisions'] - wrong}/{result['decisions']} equal"
    line += f"  {result['seconds']:.1f} s"
    if result["error"]:
        line += f"  {result['error']}"
    elif result["failed"]:
        line += "  failed: " + ", ".join(f["array"] for f in result["failed"][:6])
    return line


def main() -> int:
    parser = _checkout.parser(__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="case file or folder")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args()
    cases = find_cases(args.paths)
    results = []
    for path in cases:
        results.append(run(path, getattr(torch, args.dtype)))
        print(describe(results[-1]), flush=True)
    passed = sum(r["passed"] for r in results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    if not cases:
        print("no cases found: a case is a .json file beside a .npz file")
    print(f"parity: {passed} passed, {len(results) - passed} failed")
    return 0 if results and passed == len(results) else 1


if __name__ == "__main__":
    _checkout.run(main)
