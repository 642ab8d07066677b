"""COCO's numbers, for any COCO-format JSON, in seconds where faster-coco-eval is installed."""

import contextlib
import functools
import importlib.util
import json
from collections.abc import Iterator, Sequence
from typing import TypeGuard

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.coco import COCO

from ..errors import UserError, listed
from .coco import numbered


class NumberedCOCO(COCO):
    """pycocotools' ``COCO`` of a file with any ids: inside, all are numbers 1..n.

    ``loadRes`` takes detections with the file's own ids.
    """

    def __init__(self, json_file: str) -> None:
        super().__init__()
        with open(json_file, encoding="utf-8-sig") as file:  # as read_annotations; test sets may have none
            self.dataset, self.image_numbers, self.category_numbers = numbered(json.load(file))
        self.createIndex()

    def loadRes(self, results: list[dict]) -> COCO:
        foreign = {found["image_id"] for found in results} - self.image_numbers.keys()
        if foreign:
            shown = listed([repr(image) for image in foreign], limit=3)
            raise UserError(
                f"detections in images that the evaluator's data set does not have ({shown}): "
                "dataloader.evaluator.dataset_name must be the set of dataloader.test"
            )
        return super().loadRes(
            [
                {
                    **found,
                    "image_id": self.image_numbers[found["image_id"]],
                    "category_id": self.category_numbers.get(found["category_id"], 0),  # 0: none
                }
                for found in results
            ]
        )


class FastCOCOEvaluator(COCOEvaluator):
    """detectron2's ``COCOEvaluator``, counting with faster-coco-eval: the same numbers, sooner.

    Ids are the file's own affair: texts, 0, negative and huge numbers count like any other, and the
    results are written with them. An ``iscrowd`` that is absent is 0; an ``area`` that is not a
    positive finite number is the box's.

    Args:
        dataset_name: a registered data set; a list of one is that one.
        fast: use faster-coco-eval. None: if it is installed; False: the official implementation.
        max_dets_per_image: detections of a class in an image that count for AP, those of the highest
            scores. COCO has 100; where there are more objects the others can only be missed. A list
            of three, such as [1, 10, 300], also sets the limits of the first two average recalls.
        kwargs: of ``COCOEvaluator``.
    """

    def __init__(
        self,
        dataset_name: str | Sequence[str],
        *,
        fast: bool | None = None,
        max_dets_per_image: int | Sequence[int] | None = None,
        **kwargs,
    ) -> None:
        installed = importlib.util.find_spec("faster_coco_eval") is not None
        if fast and not installed:
            raise UserError(
                "dataloader.evaluator.fast=True needs faster-coco-eval, which is not installed: "
                "pip install faster-coco-eval, or leave fast at null"
            )
        limits = detection_limits(max_dets_per_image)
        name = _single_name(dataset_name)
        with _replaced("COCO", NumberedCOCO):
            super().__init__(name, use_fast_impl=fast is None, **kwargs)
        self._max_dets_per_image = limits
        self._faster = installed if fast is None else fast

    def _eval_predictions(self, predictions: list, img_ids: Sequence | None = None) -> None:
        if img_ids is not None:
            img_ids = [self._coco_api.image_numbers[image] for image in img_ids]
        if not self._faster:
            super()._eval_predictions(predictions, img_ids)
            return
        from faster_coco_eval import COCOeval_faster

        # detectron2 looks its implementations up by these names
        fast = functools.partial(COCOeval_faster, print_function=print)
        self._use_fast_impl = True
        with _replaced("COCOeval_opt", fast), _replaced("COCOevalMaxDets", fast):
            super()._eval_predictions(predictions, img_ids)


def detection_limits(value: int | Sequence[int] | None) -> list[int]:
    """COCO's three ``maxDets``; the last is the one that AP is counted with.

    Raises:
        UserError: it is neither None, a positive integer nor three of them in ascending order.
    """
    if value is None:
        return [1, 10, 100]
    if _is_count(value):
        return [1, min(value, 10), value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        limits = list(value)
        if len(limits) == 3 and all(map(_is_count, limits)) and limits == sorted(set(limits)):
            return limits
    raise UserError(
        f"dataloader.evaluator.max_dets_per_image={value!r}: expected a positive integer such as 300, "
        "or three in ascending order such as [1,10,300], of which AP takes the last"
    )


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _single_name(names: str | Sequence[str]) -> str:
    if isinstance(names, str):
        return names
    if not isinstance(names, Sequence) or len(names) != 1 or not isinstance(names[0], str):
        raise UserError(
            f"dataloader.evaluator.dataset_name={names!r}: expected the name of one data set. Give "
            "dataloader.test.dataset.names one name, and evaluate on others in runs of their own "
            "(--eval-only)"
        )
    return names[0]


@contextlib.contextmanager
def _replaced(name: str, value: object) -> Iterator[None]:
    """``detectron2.evaluation.coco_evaluation``'s global of that name is ``value`` meanwhile."""
    before = getattr(coco_evaluation, name)
    setattr(coco_evaluation, name, value)
    try:
        yield
    finally:
        setattr(coco_evaluation, name, before)
