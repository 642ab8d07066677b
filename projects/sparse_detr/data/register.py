"""Data sets in COCO format, registered with detectron2.

Registration is idempotent and happens when a config is instantiated, never when it is read: a
config may be loaded any number of times, also in worker processes.
"""

import difflib
import logging
import os
from collections.abc import Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts

from ..errors import UserError, listed
from .coco import check_path, load_coco

logger = logging.getLogger(__name__)

_SEVERAL = "(or register each and train on dataloader.train.dataset.names=[a,b] of a COCO config)"


def register_coco(name: str, json_file: str, image_root: str) -> None:
    """Registers a COCO-format detection set; classes are read from the JSON when it is loaded.

    Calling it again with the same files does nothing. With other files it replaces what an earlier
    call registered.

    The records hold boxes alone (``load_coco``): polygons, masks and keypoints are not read.

    Raises:
        ValueError: a file or folder does not exist, or ``name`` belongs to a data set that was
            registered otherwise.
    """
    check_path(json_file, "annotation file", f"merge several files into one, with new image ids {_SEVERAL}")
    check_path(image_root, "image folder", "its file names may have folders in them")
    files = {"json_file": str(json_file), "image_root": str(image_root)}
    if name in DatasetCatalog:
        metadata = MetadataCatalog.get(name)
        if {key: metadata.get(key) for key in files} == files:
            return
        if not metadata.get("registered_by_sparse_detr"):
            raise UserError(
                f"the data set name {name!r} is taken by {metadata.get('json_file')}: choose another name"
            )
        logger.info("data set %r now means %s", name, json_file)
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    _check_files(name, **files, hint="check the paths in the config's `data` section")
    DatasetCatalog.register(name, lambda: load_coco(**files, name=name))
    MetadataCatalog.get(name).set(**files, evaluator_type="coco", registered_by_sparse_detr=True)


def coco_dataset(
    *, names: str | Sequence[str], json_file: str, image_root: str, filter_empty: bool = False
) -> list[dict]:
    """A config's ``dataloader.*.dataset``: registers a COCO-format set, returns its dataset dicts.

    Args:
        names: the name to register it under; detectron2's spelling, so that
            ``evaluator.dataset_name`` can refer to it. A list of one name is that name.
        json_file: annotations in COCO format. Ids may be any whole numbers or texts.
        image_root: folder that the JSON's file names are relative to. Boxes without an area are
            dropped.
        filter_empty: leave out images without objects. They teach a detector what is background:
            keep them.
    """
    if not isinstance(names, str):
        if len(names) != 1:
            raise UserError(f"one JSON file is one data set, but it has the names {list(names)}: pass one")
        names = names[0]
    if not json_file or not image_root:
        raise UserError(
            f"data set {names!r} has no files yet: pass data.train_json=..., "
            "data.train_images=... and, to evaluate, data.val_json=... and data.val_images=..."
        )
    register_coco(names, json_file, image_root)
    records = get_detection_dataset_dicts(names, filter_empty=filter_empty)
    for record in records:  # a flip would turn a negative size into a box of another place
        record["annotations"] = [a for a in record["annotations"] if min(a["bbox"][2:]) > 0]
    return records


def registered_dataset(*, names: str | list[str], filter_empty: bool = False) -> list[dict]:
    """A config's ``dataloader.*.dataset``: registered sets' dicts, after a look at their files.

    Args:
        names: one or more names in detectron2's DatasetCatalog, with the same classes.
        filter_empty: see ``coco_dataset``.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("no data set is named: pass dataloader.train.dataset.names or test.dataset.names")
    check_datasets(*names)
    return get_detection_dataset_dicts(names, filter_empty=filter_empty)


def check_datasets(*names: str) -> None:
    """Raises a ValueError for the first data set that is unknown or whose files are missing."""
    for name in names:
        if name not in DatasetCatalog:
            known = DatasetCatalog.list()
            close = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise UserError(
                f"data set {name!r} is not registered. Did you mean {', '.join(close)}? "
                "For data of your own in COCO format use configs/common/data/custom.py, "
                "or call sparse_detr.data.register_coco first"
            )
        metadata = MetadataCatalog.get(name)
        root = os.path.abspath(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))
        _check_files(
            name,
            metadata.get("json_file"),
            metadata.get("image_root"),
            hint=f"built-in data sets are looked for under DETECTRON2_DATASETS (now {root}): set "
            "it to the folder that holds coco/annotations, coco/train2017 and coco/val2017",
        )


def _check_files(name: str, json_file: str | None, image_root: str | None, hint: str) -> None:
    if json_file and not os.path.isfile(json_file):
        raise UserError(
            f"data set {name!r}: there is no annotation file {os.path.abspath(json_file)}; {hint}"
        )
    if image_root and not os.path.isdir(image_root):
        raise UserError(f"data set {name!r}: there is no image folder {os.path.abspath(image_root)}; {hint}")


def check_classes(num_classes: int, *names: str, expected: Sequence[str] | None = None) -> None:
    """Raises a ValueError unless the data sets, loaded before, fit the model and each other.

    Args:
        num_classes: the model's.
        names: data sets in detectron2's catalog.
        expected: names of the classes in their order; None: those of the first data set.
    """
    stored = expected is not None
    for name in names:
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes is None:
            continue
        shown = listed(classes, 5)
        if len(classes) != num_classes:
            raise UserError(
                f"data set {name!r} has {len(classes)} classes ({shown}) "
                f"but model.num_classes={num_classes}: "
                + (
                    f"pass model.num_classes={len(classes)}"
                    if expected is None
                    else "give its JSON all the model's categories, in their order "
                    f"({listed(expected, 5)}); some may have no object"
                )
                + "; to train for the data's own, data.classes=null model.num_classes=null" * stored
            )
        expected = list(classes) if expected is None else list(expected)
        if classes != expected:
            wrong = next(k for k, pair in enumerate(zip(classes, expected)) if len(set(pair)) > 1)
            raise UserError(
                f"data set {name!r} has other classes than the model: class {wrong} is "
                f"{classes[wrong]!r} instead of {expected[wrong]!r}. Give its categories the ids "
                "that put them in the order of the training set's"
            )
