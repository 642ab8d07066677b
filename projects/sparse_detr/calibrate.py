"""Token budgets of their own for the images of a kind: what their scores are, and the rule for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .keep_ratio import set_keep_ratio
from .modeling import SetDetector, TokenRankings


@torch.no_grad()
def token_rankings(model: SetDetector, batches: Iterable[list[dict]]) -> list[Tensor]:
    """What a detector in evaluation mode ranks the tokens of each image by: (V,) each, without padding.

    ``MeanRatio.calibrate`` takes it. No annotations are needed.

    Args:
        batches: as the model takes them.

    Raises:
        UserError: the model's encoder has no keep ratio, or there is no image.
    """
    encoder: Any = model.transformer.encoder
    before = getattr(encoder, "keep_ratio", None)
    recorder = TokenRankings()
    set_keep_ratio(model, recorder, "a number of tokens for each image")
    try:
        for batch in batches:
            model(batch)
    finally:
        encoder.keep_ratio = before
    if not recorder.rankings:
        raise UserError("no image to calibrate on: pass some of the kind that will be predicted")
    return recorder.rankings
