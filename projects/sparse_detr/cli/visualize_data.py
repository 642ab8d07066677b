"""Draw the training data: as annotated, or as the network sees them.

    sparse-detr visualize-data --config-file ... --source annotation --output DIR --num 10
    sparse-detr visualize-data --config-file ... --source dataloader data.train_json=...

"annotation" draws the files and their boxes, crowd regions included. "dataloader" draws what the
training loader delivers in the run's first iterations, after augmentation: the same crops, in the
same order, as training with this config and seed (without mean and standard deviation, which the
model takes off). `--config-file` takes a file or the name of a shipped config; overrides follow.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from detectron2.config import instantiate
from detectron2.data import Metadata, MetadataCatalog
from omegaconf import DictConfig
from PIL import Image

from .. import config
from ..data import read_image
from ..visualize import draw_ground_truth, draw_input
from . import flags


def dataset_metadata(cfg: DictConfig) -> Metadata:
    """Of the training set, or of the first of several: their classes are the same."""
    names = cfg.dataloader.train.dataset.names
    return MetadataCatalog.get(names if isinstance(names, str) else names[0])


def annotated(cfg: DictConfig, num: int, width: int) -> Iterator[tuple[str, np.ndarray]]:
    """File names and pictures of the first ``num`` records."""
    records = instantiate(cfg.dataloader.train.dataset)
    metadata = dataset_metadata(cfg)
    for record in records[:num]:
        image = read_image(record["file_name"], "RGB")
        scale = width / image.shape[1]
        yield record["file_name"], draw_ground_truth(image, record, metadata, scale=scale)


def loaded(cfg: DictConfig, num: int, width: int) -> Iterator[tuple[str, np.ndarray]]:
    """File names and pictures of the first ``num`` images that training sees."""
    cfg.dataloader.train.num_workers = 0
    loader = instantiate(cfg.dataloader.train)
    loader.batch_sampler.seed = max(cfg.train.seed, 0)
    metadata = dataset_metadata(cfg)
    image_format = cfg.dataloader.train.mapper.get("image_format", "RGB")
    for entry in itertools.islice(itertools.chain.from_iterable(loader), num):
        scale = width / entry["image"].shape[2]
        yield entry["file_name"], draw_input(entry, metadata, image_format, scale=scale)


def main() -> None:
    parser = flags.parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--source", choices=("annotation", "dataloader"), default="dataloader")
    parser.add_argument("--output", default="output/data", metavar="DIR")
    parser.add_argument("--num", type=int, default=16, help="how many images (default: 16)")
    parser.add_argument("--width", type=int, default=800, help="of each picture (default: 800)")
    flags.add_overrides(parser)
    args = parser.parse_args()

    cfg = config.load_config(args.config_file, args.opts)
    os.makedirs(args.output, exist_ok=True)
    pictures = annotated if args.source == "annotation" else loaded
    for number, (name, picture) in enumerate(pictures(cfg, args.num, args.width)):
        target = os.path.join(args.output, f"{number:04d}_{Path(name).stem}.jpg")
        Image.fromarray(picture).save(target, quality=90)
        print(target)
