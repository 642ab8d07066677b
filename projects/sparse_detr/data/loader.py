"""Training batches that are a pure function of (seed, iteration).

detectron2's training loader shuffles inside the worker processes and augments from their random
state, so a resumed run sees other images and other crops than the uninterrupted one. Here the
sampler decides everything in the main process: which images form batch ``i``, and the random seed
that each of them is augmented with. Resuming means starting the stream at batch ``i``; the number
of workers changes nothing, and ``R`` processes together see the images that one process would see
with the same total batch size.
"""

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import UserError

logger = logging.getLogger(__name__)


def seed_everything(*entropy: int) -> None:
    """Seeds Python's, numpy's and torch's generators from any tuple of non-negative integers."""
    state = np.random.SeedSequence(entropy).generate_state(1)[0].item()
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


class Sample(NamedTuple):
    """Image number ``image`` of the set, at ``position`` in the endless training stream of ``seed``.

    ``batch`` is the iteration that takes it.
    """

    image: int
    seed: int
    position: int
    batch: int


class TrainingDataset(Dataset):
    """Maps a ``Sample`` to the model's input; all randomness comes from the sample's seed.

    The mapper also gets the key ``batch_seed``, integers that the images of a batch have in common.
    """

    def __init__(self, records: Sequence[dict], mapper: Callable[[dict], dict]) -> None:
        self.records = DatasetFromList(
            list(records), copy=False
        )  # one shared, serialised copy for all workers
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: Sample) -> dict:
        record = self.records[sample.image]
        record["batch_seed"] = (sample.seed, sample.batch, 1)  # 1: no image's own seed
        seed_everything(sample.seed, sample.position)
        try:
            return self.mapper(record)
        except Exception as error:
            raise RuntimeError(
                f"cannot read training image {record.get('image_id')} ({record.get('file_name')}): {error}"
            ) from error


class TrainingBatchSampler(Sampler[list[Sample]]):
    """This process's endless shuffled batches: reproducible, and able to start at any iteration.

    Args:
        size: number of images.
        total_batch_size: images per iteration, over all processes.
        groups: optional (size,) integers; a batch holds images of one group only (landscape or
            portrait, to save padding). Grouping reorders the stream but drops nothing.

    ``seed`` and ``start_iter`` may be set until iteration starts; all processes must agree on them.
    """

    def __init__(self, size: int, total_batch_size: int, groups: Sequence[int] | None = None) -> None:
        if size < 1:
            raise UserError("the training set holds no image")
        if total_batch_size < 1 or total_batch_size % comm.get_world_size():
            raise UserError(
                f"dataloader.train.total_batch_size={total_batch_size} must be a positive multiple "
                f"of the number of processes ({comm.get_world_size()})"
            )
        self.size = size
        self.total_batch_size = total_batch_size
        self.groups = None if groups is None else list(groups)
        self.seed = 0
        self.start_iter = 0

    def __iter__(self) -> Iterator[list[Sample]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        for batch in itertools.islice(self._total_batches(), self.start_iter, None):
            yield batch[rank::world_size]

    def _total_batches(self) -> Iterator[list[Sample]]:
        waiting: dict[int, list[tuple[int, int]]] = {}
        number = itertools.count()
        for position, index in enumerate(self._shuffled_epochs()):
            batch = waiting.setdefault(self.groups[index] if self.groups else 0, [])
            batch.append((index, position))
            if len(batch) == self.total_batch_size:
                iteration = next(number)
                yield [Sample(image, self.seed, place, iteration) for image, place in batch]
                batch.clear()

    def _shuffled_epochs(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist()


def build_train_loader(
    *,
    dataset: Sequence[dict],
    mapper: Callable[[dict], dict],
    total_batch_size: int,
    num_workers: int = 4,
    aspect_ratio_grouping: bool = True,
) -> DataLoader:
    """The training loader: detectron2's ``build_detection_train_loader`` made resumable.

    Args:
        dataset: detectron2 dataset dicts.
        mapper: dataset dict -> model input; may use any of the global random generators.
        total_batch_size: images per iteration over all processes.
        num_workers: loader processes per training process; 0 loads in the training process.
        aspect_ratio_grouping: landscape and portrait images go into different batches.

    Returns:
        An endless DataLoader of list[dict]; ``loader.batch_sampler`` is a
        ``TrainingBatchSampler``.
    """
    empty = sum(not record.get("annotations") for record in dataset)
    logger.info("%d of the %d training images have no object", empty, len(dataset))
    groups = None
    if aspect_ratio_grouping and all("width" in record and "height" in record for record in dataset):
        groups = [int(record["width"] > record["height"]) for record in dataset]
    return DataLoader(
        TrainingDataset(dataset, mapper),
        batch_sampler=TrainingBatchSampler(len(dataset), total_batch_size, groups),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
    )
