"""When elastic training begins to be elastic; what it is stands in ``modeling/elastic.py``."""

from detectron2.engine import HookBase

from ..errors import UserError
from ..modeling import KeepRatios


class ElasticWarmup(HookBase):
    """All images take the middle keep ratio in the first ``share`` of a training, 0 to 1."""

    def __init__(self, ratios: KeepRatios, share: float) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"train.elastic_warmup={share} must be a share of the training, from 0 to 1")
        self.ratios = ratios
        self.share = share

    def before_step(self) -> None:
        self.ratios.warming_up = self.trainer.iter < self.share * self.trainer.max_iter
