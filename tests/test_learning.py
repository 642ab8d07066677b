"""benchmarks/learning.py on trainings of two iterations."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.learning import table

ROOT = Path(__file__).resolve().parent.parent


def learning(tmp_path, *arguments):
    command = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "learning.py", *arguments]
    command += [
        "--json",
        tmp_path / "found.json",
        "--output",
        tmp_path / "runs",
        "--common",
        "train.max_iter=2",
    ]
    command += [f"data.root={tmp_path / 'shapes'}", "train.device=cpu"]
    command += ["+dataloader.train.dataset.num_images=8", "+dataloader.test.dataset.num_images=2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)


def test_runs_are_measured_once(tmp_path):
    sparse = "sparse=quick/sparse_detr_shapes", "--keep-ratio", "0.1", "1", "--seeds", "1"
    done = learning(tmp_path, *sparse)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert run["name"] == "sparse" and run["seed"] == 1 and run["seconds"] > 0
    assert set(run["results"]) == {"0.1", "1"}
    assert run["results"]["0.1"]["macs"] < run["results"]["1"]["macs"]
    again = learning(tmp_path, *sparse)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "sparse, seed 1" in done.stdout and "sparse, seed 1" not in again.stdout
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == [run]


def test_the_table_has_means_and_half_ranges():
    runs = [
        {"name": "a", "seconds": 60, "results": {"0.1": {"AP": 30.0}, "1": {"AP": 20.0}}},
        {"name": "a", "seconds": 120, "results": {"0.1": {"AP": 32.0}, "1": {"AP": 25.0}}},
        {"name": "b", "seconds": 60, "results": {"dense": {"AP": 40.0}}},
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(runs).splitlines()]
    assert lines[0] == ["AP", "dense", "0.1", "1", "seeds", "minutes"]
    assert lines[2:] == [
        ["a", "", "31.0 ± 1.0", "22.5 ± 2.5", "2", "1.5"],
        ["b", "40.0 ± 0.0", "", "", "1", "1.0"],
    ]
