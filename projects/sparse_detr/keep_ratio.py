"""The keep ratio of a detector, for those who set it from outside."""

from __future__ import annotations

from .errors import UserError
from .modeling import SetDetector

USUAL_RANGE = 0.05, 1.0  # of a model that was trained at one ratio


def keep_ratio_range(model: SetDetector) -> tuple[float, float]:
    """The lowest and the highest keep ratio that make sense: those that the model was trained for
    (``encoder.elastic``), else ``USUAL_RANGE``."""
    elastic = model.transformer.encoder.elastic
    return USUAL_RANGE if elastic is None else (elastic.lowest, elastic.highest)


def set_keep_ratio(model: SetDetector, value: float, asked: str) -> None:
    """Sets the keep ratio of the model's encoder.

    Args:
        asked: what needs it, the beginning of messages.

    Raises:
        UserError: the encoder has none, or does not take this one.
    """
    encoder = model.transformer.encoder
    if not hasattr(encoder, "keep_ratio"):
        raise UserError(
            f"{asked}: the encoder of this model, {type(encoder).__name__}, has no keep ratio; Sparse DETR's "
            "and Focus-DETR's have one"
        )
    try:
        encoder.keep_ratio = value
    except ValueError as error:  # built without a scoring network
        raise UserError(f"{asked}: {error}") from error
