"""The keep ratio of a detector, for those who set it from outside."""

from __future__ import annotations

from .errors import UserError
from .modeling import SetDetector


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
