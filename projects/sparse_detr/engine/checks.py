"""What must hold before a run begins: every check that needs more than one part of the config."""

import os

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from ..config import stored_classes
from ..data.check import LIMITS, check_data
from ..data.evaluation import detection_limits
from ..data.own import has_own_split, own_files
from ..data.register import check_classes
from ..errors import UserError
from ..modeling.meta_arch import SetDetector
from .checkpoint import run_checkpoints


def check_folder(folder: str) -> None:
    """A new run would overwrite an old one in its folder, file by file."""
    folder = os.path.abspath(folder)
    found = run_checkpoints(folder)
    going_on = "--resume goes on with it; " if found else ""
    if not found and os.path.isfile(os.path.join(folder, "model_best.pth")):
        found = ["model_best.pth"]
    if found:
        raise UserError(
            f"{folder} holds a run already ({os.path.basename(found[-1])}): {going_on}for a new run "
            "take another train.output_dir or delete that folder"
        )


def check_periods(train: DictConfig) -> None:
    """The numbers of the config's ``train`` section that count iterations or files."""
    for name, least, optional in (
        ("log_period", 1, False),
        ("eval_period", 0, True),
        ("checkpointer.period", 0, True),
        ("checkpointer.max_to_keep", 1, True),
    ):
        value = OmegaConf.select(train, name)
        if value < least if value is not None else not optional:
            raise UserError(f"train.{name}={value} must be at least {least}{', or null' if optional else ''}")


def check_own_data(cfg: DictConfig, *splits: str) -> None:
    """``check_data`` for configs with a ``data`` section like ``common/data/custom.py``'s."""
    data = cfg.get("data")
    if not data:
        return
    folder = own_folder(cfg)
    files = {split: found for split in splits if (found := own_files(data, split, folder))}
    if data.get("check"):
        check_data(**files, limits=_object_limits(cfg))


def own_folder(cfg: DictConfig) -> str:
    """Where a run's data lie in COCO format if they come in another."""
    return os.path.join(cfg.train.output_dir, "data")


def _object_limits(cfg: DictConfig) -> dict[str, int]:
    """``LIMITS`` as the config has them; those of which it has none are left out."""
    values = {key: OmegaConf.select(cfg, key) for key in LIMITS}
    evaluator = next(iter(LIMITS))
    values[evaluator] = detection_limits(values[evaluator])[-1]
    return {key: value for key, value in values.items() if isinstance(value, int)}


def check_model(model: SetDetector, cfg: DictConfig, *splits: str) -> None:
    """The model against the splits' data, which have been loaded: classes and order of channels."""
    names = [name for split in splits for name in _dataset_names(cfg, split)]
    check_classes(model.num_classes, *names, expected=stored_classes(cfg))
    for split in splits:
        delivered = OmegaConf.select(cfg.dataloader[split], "mapper.image_format") or "RGB"
        if delivered != getattr(model, "input_format", delivered):
            raise UserError(
                f"dataloader.{split}.mapper delivers {delivered} but the model was made for "
                f"{model.input_format}: pass dataloader.{split}.mapper.image_format="
                f"{model.input_format}"
            )


def has_test_set(cfg: DictConfig) -> bool:
    """False for data of one's own (``own_dataset``) without a validation set."""
    if OmegaConf.select(cfg.dataloader.test, "dataset.data") is not None:
        return has_own_split(cfg.data, "val")
    return OmegaConf.select(cfg.dataloader.test, "dataset.json_file", default="") is not None


def class_names(cfg: DictConfig, split: str) -> list[str] | None:
    """Of the split's data set, which has been loaded."""
    names = _dataset_names(cfg, split)
    return next((MetadataCatalog.get(name).get("thing_classes") for name in names), None)


def _dataset_names(cfg: DictConfig, split: str) -> list[str]:
    names = OmegaConf.select(cfg.dataloader[split], "dataset.names")
    return [names] if isinstance(names, str) else list(names or [])
