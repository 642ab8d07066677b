"""One training step, and what must be true before it changes the weights."""

import logging
import math
import time

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch.nn.utils import clip_grad_norm_

from ..data.loader import TrainingBatchSampler, seed_everything

logger = logging.getLogger(__name__)

_AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def amp_dtype(enabled: bool, dtype: str, device: torch.device) -> torch.dtype | None:
    """Checks the config's ``train.amp`` section; None stands for full precision."""
    if not enabled:
        return None
    if dtype not in _AMP_DTYPES:
        raise ValueError(f"train.amp.dtype must be bfloat16 or float16, not {dtype!r}")
    if _AMP_DTYPES[dtype] == torch.float16 and device.type != "cuda":
        raise ValueError(
            f"train.amp.dtype=float16 needs a GPU, but train.device is {device}: use bfloat16"
        )
    return _AMP_DTYPES[dtype]


class Trainer(SimpleTrainer):
    """SimpleTrainer with mixed precision, clipping, a finite-loss guard and exact resume.

    The state of the random generators is a function of (seed, rank, iteration), so that a resumed
    run needs no saved generator state and evaluation in between changes nothing.

    Args:
        model: returns a dict of weighted losses in training; may be wrapped in
            DistributedDataParallel.
        data_loader: endless iterable of list[dict]; resume is exact with ``build_train_loader``'s.
        optimizer: torch optimizer.
        amp: dtype of the autocast forward pass; None for full precision. float16 scales the loss.
        max_grad_norm: gradients are clipped to this global L2 norm; None: not at all.
        seed: non-negative; None draws one (the same in all processes), which checkpoints keep.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        data_loader,
        optimizer: torch.optim.Optimizer,
        amp: torch.dtype | None = None,
        max_grad_norm: float | None = 0.1,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device
        self.amp = amp
        self.max_grad_norm = max_grad_norm
        self.seed = comm.shared_random_seed() if seed is None else seed
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=amp == torch.float16)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Runs iterations [start_iter, max_iter)."""
        sampler = getattr(self.data_loader, "batch_sampler", None)
        if isinstance(sampler, TrainingBatchSampler):
            sampler.seed, sampler.start_iter = self.seed, start_iter
        elif start_iter:
            logger.warning(
                "the data loader cannot be moved to iteration %d: its order starts anew", start_iter
            )
        super().train(start_iter, max_iter)

    def run_step(self) -> None:
        assert self.model.training, "the model was left in eval mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        seed_everything(self.seed, comm.get_rank(), self.iter)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            losses = self.model(batch)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self.grad_scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = clip_grad_norm_(parameters, self.max_grad_norm or math.inf)

        self._check_and_log(batch, losses, grad_norm, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _check_and_log(
        self,
        batch: list[dict],
        losses: dict[str, torch.Tensor],
        grad_norm: torch.Tensor,
        data_time: float,
    ) -> None:
        """Stores the losses' mean over processes; raises if anything is not finite."""
        packed = torch.stack([v.detach().float() for v in (*losses.values(), grad_norm)])
        *values, grad_norm = packed.tolist()  # the one synchronisation with the device
        own = dict(zip(losses, values, strict=True))
        broken = [name for name, value in own.items() if not math.isfinite(value)]
        if not broken and not math.isfinite(grad_norm) and not self.grad_scaler.is_enabled():
            broken = ["grad_norm"]
        images = [f"{x.get('image_id')} ({x.get('file_name')})" for x in batch] if broken else []

        gathered = comm.all_gather((own, data_time, broken, images))
        if any(broken for _, _, broken, _ in gathered):
            self._raise_not_finite(gathered, grad_norm)

        mean = {name: sum(losses[name] for losses, *_ in gathered) / len(gathered) for name in own}
        self.storage.put_scalars(
            total_loss=sum(mean.values()),
            grad_norm=grad_norm,
            data_time=max(seconds for _, seconds, *_ in gathered),
            **mean,
        )

    def _raise_not_finite(self, gathered: list[tuple], grad_norm: float) -> None:
        lines = [f"training stopped at iteration {self.iter}, before the weights were changed:"]
        for rank, (losses, _, broken, images) in enumerate(gathered):
            if broken:
                shown = {"grad_norm": grad_norm, **losses}
                lines.append(
                    f"process {rank}: {', '.join(f'{name} = {shown[name]}' for name in broken)} "
                    f"for the images {', '.join(images)}"
                )
        lines.append(
            "Look at these images' boxes and pixels; a lower optimizer.lr, a longer warm-up or "
            "train.amp.enabled=False help when the data are sound."
        )
        raise FloatingPointError("\n".join(lines))

    def state_dict(self) -> dict:
        return {
            **super().state_dict(),
            "seed": self.seed,
            "grad_scaler": self.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.seed = state_dict["seed"]
        if state_dict["grad_scaler"]:  # empty if the earlier run did not scale
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
