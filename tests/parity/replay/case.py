"""A parity case: its weights and inputs, drawn by name, and the comparison with its arrays.

A case is ``<name>.json`` (configuration, parameter names and shapes, how inputs are drawn, what each
array means, noise floors) beside ``<name>.npz`` (what the published code computed).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sparse_detr.modeling.matcher import Target

from . import recipe

FLOAT64_TOLERANCE = 1e-5  # relative to max(1, |value|)
FLOAT32_FLOORS = 20  # float32 may be this many noise floors away
_DRAW = re.compile(r"\b(normal|uniform)\(\s*'([^']+)'\s*,\s*\(([^)]*)\)([^)]*)\)")
_CHANGE = re.compile(r"components (\d+): become ([\d.]+)\+([\d.]+)\*u")
# Arrays that are no result: targets, random draws, and where others were sampled.
_GIVEN = re.compile(r"target_(boxes|labels)\d+|dn_(label_p|label_new|box_sign|box_rand)|rows|\w+_(pos|token)")


@dataclass
class Check:
    """One array: its error in units of max(1, |value|), or whether a decision is equal."""

    name: str
    error: float
    tolerance: float
    decision: bool = False

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails


@dataclass
class Case:
    """A case on disk and the checks made against it so far."""

    path: Path
    dtype: torch.dtype
    meta: dict
    arrays: dict[str, np.ndarray]
    checks: list[Check] = field(default_factory=list)
    accounted: set[str] = field(default_factory=set)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype = torch.float64) -> Case:
        meta = json.loads(path.read_text())
        npz = path.with_suffix(".npz")
        with np.load(npz) as arrays:
            return cls(path, dtype, meta, {k: arrays[k] for k in arrays.files})

    @property
    def name(self) -> str:
        return self.meta["case"]

    @property
    def config(self) -> dict:
        return self.meta["config"]

    @property
    def exact(self) -> bool:
        """Whether this is a float64 replay."""
        return self.dtype == torch.float64

    # Inputs -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The published parameters, drawn by name, as leaves; aliases are the same tensor."""
        shapes, aliases = self.meta["state_dict"], self.meta.get("aliases") or {}
        state = {}
        for name, shape in shapes.items():
            if isinstance(aliases, dict) and name in aliases:
                continue
            state[name] = self.tensor(recipe.fill(name, shape, self.meta["seed"]))
            if state[name].is_floating_point() and "running_" not in name:
                state[name].requires_grad_()
        for alias, name in aliases.items() if isinstance(aliases, dict) else ():
            state[alias] = state[name]
        return state

    def drawn(self, key: str, number: int = 0) -> Tensor:
        """The input ``key``, drawn as its description in the case says."""
        draws = _DRAW.findall(self.meta["inputs"][key])
        if not draws:
            raise ValueError(f"{self.name}: input {key!r} does not say how it is drawn")
        kind, name, shape, rest = draws[number]
        shape = self._shape(shape)
        if kind == "normal":
            return self.tensor(recipe.normal(name, shape, self.meta["seed"]))
        bounds = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", rest)] or [0.0, 1.0]
        drawn = recipe.uniform(name, shape, *bounds[:2], seed=self.meta["seed"])
        if change := _CHANGE.search(self.meta["inputs"][key]):
            first, shift, scale = int(change[1]), np.float32(change[2]), np.float32(change[3])
            drawn[..., first:] = shift + scale * drawn[..., first:]
        return self.tensor(drawn)

    def drawn_like(self, key: str, like: Tensor) -> Tensor:
        """A standard-normal input whose description leaves the shape to ``like``."""
        name = re.search(r"normal\('([^']+)'", self.meta["inputs"][key])[1]
        return self.tensor(recipe.normal(name, tuple(like.shape), self.meta["seed"]))

    def _shape(self, text: str) -> tuple[int, ...]:
        return tuple(int(x) for x in text.split(",") if x.strip())

    def stores(self, *names: str) -> bool:
        """Whether the case has all of these arrays: it may leave out any."""
        return all(name in self.arrays for name in names)

    @property
    def num_detections(self) -> int:
        """How many per image the case stores in ``post_*``; 0 if it has none."""
        return next((x.shape[1] for name, x in self.arrays.items() if name.startswith("post_")), 0)

    def array(self, name: str) -> Tensor:
        """A stored array that is an input."""
        if name not in self.arrays:
            raise ValueError(f"{self.name}: the array {name!r}, an input, is missing")
        self.accounted.add(name)
        return self.tensor(self.arrays[name])

    def targets(self, sizes: list | None = None) -> list[Target]:
        """The objects of every image, of these sizes: none where the case has no arrays for it."""
        found = []
        for image, size in enumerate(sizes or self.meta["image_sizes"]):
            if self.stores(f"target_labels{image}"):
                labels, boxes = self.array(f"target_labels{image}"), self.array(f"target_boxes{image}")
            else:
                labels, boxes = torch.zeros(0), torch.zeros(0, 4, dtype=self.dtype)
            found.append(Target(labels.long(), boxes, tuple(size)))
        return found

    def tensor(self, value: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.array(value))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    # Comparison ---------------------------------------------------------------------------------

    def compare(self, name: str, value, expected=None, floor: str | None = None) -> None:
        """Check ``value`` against the stored array ``name``; integers and booleans must be equal.

        ``expected`` replaces the stored array (a part of it); ``floor`` names its noise floor.
        An array that the case leaves out is not compared.
        """
        self.accounted.add(name)
        if expected is None:
            if name not in self.arrays:
                return
            expected = self.arrays[name]
        value = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        expected = np.asarray(expected)
        if value.shape != expected.shape:
            raise ValueError(f"{self.name}: {name} has shape {value.shape}, stored is {expected.shape}")
        if expected.dtype.kind in "biu":
            self.decide(name, bool(np.array_equal(value, expected)))
            return
        wanted = expected.astype(np.float64)
        error = np.abs(value.astype(np.float64) - wanted)
        if self.exact:
            error, tolerance = error / np.maximum(1.0, np.abs(wanted)), FLOAT64_TOLERANCE
        else:
            rounding = np.finfo(np.float32).eps * max(1.0, float(np.abs(wanted).max(initial=0)))
            # A lower floor says that both published runs agreed, not that rounding is an error.
            noise = self.meta.get("noise_floor", {}).get(floor or name, 0.0)
            tolerance = FLOAT32_FLOORS * max(noise, rounding)
        self.checks.append(Check(name, float(error.max(initial=0.0)), tolerance))

    def compare_rows(self, name: str, x: Tensor) -> None:
        """``compare`` of the tokens of ``x`` (B, N, ...) that the case stores, its ``rows``."""
        if self.stores(name):
            self.compare(name, at(x, self.array("rows")))

    def compare_stats(self, name: str, memory: Tensor, padding: Tensor) -> None:
        """``compare`` of the statistics of each image's unpadded tokens, (B, N, C) and (B, N)."""
        self.compare(name, torch.tensor([stats(image[~mask]) for image, mask in zip(memory, padding)]))

    def decide(self, name: str, equal: bool) -> None:
        """Record a decision (a ranking, a match, a count) that must be equal."""
        self.accounted.add(name)
        self.checks.append(Check(name, 0.0 if equal else float("inf"), 0.0, decision=True))

    def decide_rows(self, name: str, found: Tensor, transposed: bool = False) -> None:
        """Whether ``found`` has the rows of a stored array of integers, in any order."""
        if self.stores(name):
            wanted = self.arrays[name].T if transposed else self.arrays[name]
            self.decide(name, sorted(found.tolist()) == sorted(wanted.tolist()))

    def named(self, name: str, names: list[str]) -> list[tuple[str, np.ndarray]]:
        """The values of the stored array ``name``, each by the name that the case gives it."""
        self.accounted.add(name)
        return list(zip(names, self.arrays[name], strict=True))

    def compare_loss(self, name: str, value: Tensor | None, wanted: float, prefix: str = "") -> None:
        """A loss of ``loss_values``; one that is not computed here must be zero, without denoising."""
        if value is None:
            self.decide(f"{prefix}loss:{name}", "_dn" in name and float(wanted) == 0)
        else:
            self.compare(f"{prefix}loss:{name}", value.reshape(()), wanted, f"{prefix}loss_values")

    def gradient_arrays(self) -> list[str]:
        """The stored gradients that are to be compared: none in float32, where they are noise."""
        found = [name for name in self.arrays if name.startswith("grad")]
        self.accounted.update(found)
        return found if self.exact else []

    def skip(self, *names: str) -> None:
        """Arrays that are inputs, or are declared informative by the case."""
        self.accounted.update(names)

    @property
    def unchecked(self) -> list[str]:
        """Results that nothing was compared with."""
        informative = self.meta.get("informative_only", {})
        patterns = [_GIVEN, *(re.escape(p).replace(r"\*", ".*") for p in informative)]
        return [
            name
            for name in self.arrays
            if name not in self.accounted and not any(re.fullmatch(p, name) for p in patterns)
        ]


def at(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, R) of each image of ``x`` (B, N, ...)."""
    return torch.stack([image[row] for image, row in zip(x, rows.long())])


def gradients(loss: Tensor, leaves: dict) -> dict:
    """Gradients of ``loss`` by name; zero where it does not depend on a leaf."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found)
    }


def stats(x: Tensor) -> list[float]:
    """Mean, deviation, absolute sum, extremes and size of a tensor, as cases store them."""
    x = x.detach()
    return [
        float(x.mean()),
        float(x.std(correction=0)),
        float(x.abs().sum()),
        float(x.min()),
        float(x.max()),
        float(x.numel()),
    ]


class Replay(nn.Module):
    """Runs ``body(model)`` with given tensors in place of a model's parameters and buffers.

    The tensors may be functions of others (of published parameters, through the converter), so
    gradients arrive there, under the published names.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, body):
        return body(self.model)

    def run(self, state: dict[str, Tensor], body):
        tensors = {f"model.{name}": value for name, value in state.items()}
        # A tensor must replace every buffer and parameter it is meant for, and nothing else.
        return torch.func.functional_call(self, tensors, (body,), strict=False)
