"""*Shapes*: small images drawn from a seed, made at first use. For demos and tests, on a CPU."""

from detectron2.config import LazyCall as L

from sparse_detr.data import shapes_dataset

from .coco import dataloader

data = dict(root="./datasets/shapes", seed=0, hues="shared")  # "own": they give the classes away

dataloader.train.dataset = L(shapes_dataset)(
    names="shapes_train", root="${data.root}", split="train", seed="${data.seed}", hues="${data.hues}"
)
dataloader.train.mapper.augmentations.update(
    short_edges=[128, 144, 160],
    max_size=256,
    pre_crop_short_edges=[144, 176],
    crop_size=[112, 160],
    crop_prob=0.25,
)
dataloader.test.dataset = L(shapes_dataset)(
    names="shapes_val", root="${data.root}", split="val", seed="${data.seed}", hues="${data.hues}"
)
dataloader.test.mapper.augmentations.update(short_edge=144, max_size=256)
dataloader.test.batch_size = 8
