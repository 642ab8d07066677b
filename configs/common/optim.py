"""AdamW as in Deformable DETR: a tenth of the learning rate for the backbone and sampling points.

The learning rate belongs to the config's total batch: 16 images, and 32 where Deformable DETR's authors
trained with 32 at the same rate. Scale it yourself when you change the batch.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import get_default_optimizer_params

from sparse_detr.engine import AdamW, EpochSchedule, LRFactors

optimizer = L(AdamW)(
    params=L(get_default_optimizer_params)(
        # model: filled in when training starts
        base_lr="${optimizer.lr}",
        weight_decay_norm=None,  # None: as for all other weights; 0.0 in DINO
        lr_factor_func=L(LRFactors)(
            rules={"backbone": 0.1, "sampling_offsets": 0.1, "reference_points": 0.1}
        ),
    ),
    lr=2e-4,
    betas=(0.9, 0.999),
    weight_decay=1e-4,
    train="${train}",  # for trainers that do not read all of it themselves
)

lr_multiplier = L(EpochSchedule)(
    milestones=[40],
    gamma=0.1,
    warmup_iters=0,
    epochs="${train.epochs}",  # these two: for trainers that do not know the number of images
    max_iter="${train.max_iter}",
)
