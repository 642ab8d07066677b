"""COCO's numbers, in seconds where faster-coco-eval is installed."""

import functools
import importlib.util
from collections.abc import Sequence

from detectron2.evaluation import COCOEvaluator, coco_evaluation


class FastCOCOEvaluator(COCOEvaluator):
    """detectron2's ``COCOEvaluator``, counting with faster-coco-eval: the same numbers, sooner.

    Args:
        dataset_name: a registered data set.
        fast: use faster-coco-eval. None: if it is installed; False: the official implementation.
        kwargs: of ``COCOEvaluator``.
    """

    def __init__(self, dataset_name: str, *, fast: bool | None = None, **kwargs) -> None:
        installed = importlib.util.find_spec("faster_coco_eval") is not None
        if fast and not installed:
            raise ValueError(
                "dataloader.evaluator.fast=True needs faster-coco-eval, which is not installed: "
                "pip install faster-coco-eval, or leave fast at null"
            )
        super().__init__(dataset_name, use_fast_impl=fast is None, **kwargs)
        self._faster = installed if fast is None else fast

    def _eval_predictions(self, predictions: list, img_ids: Sequence[int] | None = None) -> None:
        if not self._faster:
            super()._eval_predictions(predictions, img_ids)
            return
        from faster_coco_eval import COCOeval_faster

        # detectron2 looks its fast implementation up by this name
        replaced = coco_evaluation.COCOeval_opt
        coco_evaluation.COCOeval_opt = functools.partial(COCOeval_faster, print_function=print)
        self._use_fast_impl = True
        try:
            super()._eval_predictions(predictions, img_ids)
        finally:
            coco_evaluation.COCOeval_opt = replaced
