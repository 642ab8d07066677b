"""What a run's last evaluation detected, beside the truth: COCO's numbers by class and size, which classes
are taken for which, and the images with the most errors."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import instantiate
from detectron2.data import Metadata, MetadataCatalog
from omegaconf import ListConfig
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.evaluation import NumberedCOCO, detection_limits
from ..errors import UserError
from .run import Run

RESULTS = "inference/coco_instances_results.json"
MATCHING_IOU = 0.5  # for confusion and errors


class Box(NamedTuple):
    """An object or a detection.

    Attributes:
        xyxy: pixels; name: of the class; score: None for an object.
        state: "right", "wrong class", or "missed" of an object and "false" of a detection.
    """

    xyxy: tuple[float, float, float, float]
    name: str
    score: float | None
    state: str


@dataclass
class ImageErrors:
    """An image's objects and detections, matched."""

    file_name: str
    truth: list[Box] = field(default_factory=list)
    found: list[Box] = field(default_factory=list)

    def count(self, state: str) -> int:
        boxes = self.truth if state == "missed" else self.found
        return sum(box.state == state for box in boxes)

    @property
    def severity(self) -> tuple[int, float]:
        """The number of errors, then how sure the model was of what is not there."""
        false = [box.score or 0.0 for box in self.found if box.state != "right"]
        return self.count("missed") + len(false), sum(false)

    def __str__(self) -> str:
        counts = ((state, self.count(state)) for state in ("missed", "false", "wrong class"))
        return ", ".join(f"{count} {state}" for state, count in counts if count)


@dataclass
class Detections:
    """Numbers are percent; NaN where a class or size has no objects.

    Attributes:
        classes: K names.
        numbers: by column ("AP", "AP50", ..., "AR"), one per class.
        objects: per class, crowd regions left out.
        recall, precision: (R,), and (R, K) at IoU 0.5; 0 to 1, NaN where a class has no objects.
        confusion: (K+1, K+1) counts, rows the true class, columns the detected one; the last row is
            what is not there, the last column what is missed.
        images: all that have objects or detections, the worst first.
    """

    classes: list[str]
    numbers: dict[str, np.ndarray]
    objects: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    confusion: np.ndarray
    images: list[ImageErrors]
    metadata: Metadata

    def mean(self, column: str) -> float:
        values = self.numbers[column]
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def read_detections(run: Run, threshold: float) -> Detections:
    """Compares what the run's last evaluation wrote with its test set.

    Args:
        threshold: lowest score of a detection in ``confusion`` and ``images``.

    Raises:
        UserError: the run was not evaluated, or its test set is not at hand.
    """
    if not (run.folder / RESULTS).is_file():
        raise UserError(f"not evaluated yet: {RESULTS} is written by an evaluation (--eval-only makes one)")
    if run.config is None:
        raise UserError("its config.yaml is missing, which names the test set")
    results = _read_results(run)
    dataset = run.config.dataloader.test.dataset
    if "root" in dataset and not os.path.isfile(f"{dataset.root}/{dataset.split}.json"):  # would be drawn
        raise UserError(
            f"its data are not in {dataset.root}: call this where the run was started, or pass --opts "
            "data.root=..."
        )
    records = instantiate(dataset)
    evaluator = run.config.dataloader.evaluator
    name = evaluator.dataset_name
    limits = evaluator.get("max_dets_per_image")
    limits = list(limits) if isinstance(limits, ListConfig) else limits
    metadata = MetadataCatalog.get(name if isinstance(name, str) else name[0])
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools' progress
        truth = NumberedCOCO(metadata.json_file)
        arrays = _evaluate(truth, _loaded(truth, results), detection_limits(limits))
        kept = _loaded(truth, [found for found in results if found["score"] >= threshold])
        confusion, images = _match(truth, kept)
    files = {truth.image_numbers[record["image_id"]]: record["file_name"] for record in records}
    for number, image in images.items():
        image.file_name = files.get(number, "")
    return Detections(
        classes=[category["name"] for category in _categories(truth)],
        **arrays,
        confusion=confusion,
        images=sorted((i for i in images.values() if i.file_name), key=lambda i: i.severity, reverse=True),
        metadata=metadata,
    )


def _read_results(run: Run) -> list[dict]:
    try:
        results = json.loads((run.folder / RESULTS).read_text())
    except ValueError:
        raise UserError(f"{RESULTS} is not a whole JSON file: evaluate again") from None
    return [found for found in results if "bbox" in found]


def _categories(truth: COCO) -> list[dict]:
    return [truth.cats[number] for number in sorted(truth.cats)]


def _loaded(truth: NumberedCOCO, results: list[dict]) -> COCO:
    if results:
        return truth.loadRes(results)
    empty = COCO()  # pycocotools cannot load none
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _evaluate(truth: COCO, found: COCO, limits: list[int]) -> dict[str, Any]:
    """COCO's numbers per class, from its arrays of precision (T, R, K, A, M) and recall (T, K, A, M)."""
    evaluation = COCOeval(truth, found, "bbox")
    if importlib.util.find_spec("faster_coco_eval") is not None:  # the same arrays, sooner
        from faster_coco_eval import COCOeval_faster

        evaluation = COCOeval_faster(truth, found, "bbox", print_function=print)
    evaluation.params.maxDets = limits
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = (
        np.where(evaluation.eval[key] < 0, np.nan, evaluation.eval[key]) for key in ("precision", "recall")
    )
    sizes = evaluation.params.areaRngLbl  # all, small, medium, large
    best = precision[..., -1]  # (T, R, K, A): the largest number of detections per image
    numbers = {
        "AP": best[:, :, :, 0].mean((0, 1)),
        "AP50": best[0, :, :, 0].mean(0),
        "AP75": best[5, :, :, 0].mean(0),
        **{f"AP{size[0]}": best[:, :, :, a].mean((0, 1)) for a, size in enumerate(sizes) if a},
        "AR": recall[:, :, 0, -1].mean(0),
    }
    objects = [
        sum(not truth.anns[number]["iscrowd"] for number in truth.getAnnIds(catIds=[category["id"]]))
        for category in _categories(truth)
    ]
    return {
        "numbers": {column: 100 * values for column, values in numbers.items()},
        "objects": np.array(objects),
        "recall": np.asarray(evaluation.params.recThrs),
        "precision": best[0, :, :, 0],
    }


def _match(truth: COCO, found: COCO) -> tuple[np.ndarray, dict[int, ImageErrors]]:
    """Confusion of the classes, and every image's errors by its number.

    COCO's own matching, blind to classes: in the order of their scores, each detection takes the object that
    it overlaps most, by IoU 0.5 or more. Crowd regions, and what lies in them, count for nothing.
    """
    evaluation = COCOeval(truth, found, "bbox")
    params = evaluation.params
    params.useCats, params.maxDets = 0, [10**6]
    params.iouThrs = np.array([MATCHING_IOU])
    params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    evaluation.evaluate()

    categories = _categories(truth)
    index = {category["id"]: k for k, category in enumerate(categories)}
    names = [category["name"] for category in categories]
    nothing = len(categories)
    confusion = np.zeros((nothing + 1, nothing + 1), int)
    images: dict[int, ImageErrors] = {}
    for entry in filter(None, evaluation.evalImgs):
        image = images[entry["image_id"]] = ImageErrors("")
        seen = {}  # state of the objects that were found
        for number, matched, ignored in zip(entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0]):
            if ignored:
                continue
            box = found.anns[number]
            guess = index[box["category_id"]]
            true = index[truth.anns[int(matched)]["category_id"]] if matched else nothing
            confusion[true, guess] += 1
            state = "false" if true == nothing else "right" if true == guess else "wrong class"
            if matched:
                seen[int(matched)] = state
            image.found.append(Box(_xyxy(box), names[guess], box["score"], state))
        for number, ignored in zip(entry["gtIds"], entry["gtIgnore"]):
            if ignored:
                continue
            box = truth.anns[number]
            true = index[box["category_id"]]
            confusion[true, nothing] += number not in seen
            image.truth.append(Box(_xyxy(box), names[true], None, seen.get(number, "missed")))
    return confusion, images


def _xyxy(annotation: dict) -> tuple[float, float, float, float]:
    x, y, width, height = annotation["bbox"]
    return x, y, x + width, y + height
