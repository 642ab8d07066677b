"""What a run left in its folder: numbers by iteration, its config, how far it came."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..config import load_config
from ..errors import UserError


@dataclass
class Run:
    """A run, finished, interrupted or under way.

    Attributes:
        name: for legends; short, and unlike those of the other runs of a page.
        rows: the numbers of metrics.json by iteration, evaluations (``bbox/AP``, percent) among them.
        config: of config.yaml; None if the run has not come so far.
    """

    folder: Path
    name: str
    rows: dict[int, dict[str, float]]
    config: DictConfig | None

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations at which ``key`` was noted, and its values."""
        found = [(iteration, row[key]) for iteration, row in sorted(self.rows.items()) if key in row]
        return [iteration for iteration, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        values = self.curve(key)[1]
        return values[-1] if values else None

    @property
    def keys(self) -> set[str]:
        return {key for row in self.rows.values() for key in row}

    @property
    def progress(self) -> str:
        """ "1500 of 1500 iterations", and whether the run is over."""
        counted = [iteration + 1 for iteration, row in self.rows.items() if "total_loss" in row]
        length = self.config and OmegaConf.select(self.config, "train.max_iter")
        told = f"{max(counted, default=0)}{f' of {length}' if length else ''} iterations"
        return told + ("" if (self.folder / "model_final.pth").exists() else ", not finished")


def read_runs(folders: Iterable[str], overrides: Iterable[str] = ()) -> list[Run]:
    """The runs in their folders, with names that tell them apart.

    Args:
        overrides: of the runs' configs, such as where their data lie today.

    Raises:
        UserError: a folder holds no run.
    """
    paths = [Path(folder) for folder in folders]
    runs = [_read(path, list(overrides)) for path in paths]
    names = [path.resolve().name for path in paths]
    for run, name, path in zip(runs, names, paths):
        run.name = name if names.count(name) == 1 else str(path)
    return runs


def _read(folder: Path, overrides: list[str]) -> Run:
    metrics, config = folder / "metrics.json", folder / "config.yaml"
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; pass the output folder of a run")
    if not metrics.is_file() and not config.is_file():
        raise UserError(
            f"{folder} is no output folder of a run: it holds neither metrics.json nor config.yaml"
        )
    rows: dict[int, dict[str, float]] = {}
    for line in metrics.read_text().splitlines() if metrics.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if "iteration" in row:
            rows.setdefault(row["iteration"], {}).update(row)
    if (evaluations := folder / "evaluations.json").is_file():
        for row in json.loads(evaluations.read_text()):
            rows.setdefault(row["iteration"], {}).update(row)
    return Run(folder, "", rows, load_config(folder, overrides) if config.is_file() else None)


def loss_keys(runs: Iterable[Run], limit: int = 12) -> list[str]:
    """The losses to show: the total, then those of the last layer in the order of their names."""
    keys = set().union(*(run.keys for run in runs))
    losses = sorted(key for key in keys if key.startswith("loss_") and not re.search(r"_\d+$", key))
    return [key for key in ["total_loss", *losses] if key in keys][:limit]
