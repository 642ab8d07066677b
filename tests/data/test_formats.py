"""YOLO, Pascal VOC and several COCO files: each becomes the set that it means, or a message."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from sparse_detr.config import get_config, resolve_classes
from sparse_detr.data import own_classes, own_files
from sparse_detr.engine.checks import check_own_data, has_test_set
from sparse_detr.errors import UserError


def write(root, files):
    """Files by name: texts; for an image its width and height, of 40 x 20 pixels if it is None."""
    for name, content in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content)
        else:
            Image.new("RGB", content or (40, 20)).save(path)


def config(root, *overrides):
    return get_config("custom/sparse_detr_r50", [f"train.output_dir={root}/run", *overrides])


def read(root, override, split="train"):
    """The set as it is written for training: its content by image."""
    cfg = config(root, override)
    json_file, image_root = own_files(cfg.data, split, f"{root}/run/data")
    coco = json.loads(Path(json_file).read_text())
    names = {c["id"]: c["name"] for c in coco["categories"]}
    boxes = {str(Path(image_root, image["file_name"]).resolve()): [] for image in coco["images"]}
    files = {i["id"]: name for i, name in zip(coco["images"], boxes, strict=True)}
    for a in coco["annotations"]:
        boxes[files[a["image_id"]]].append((names[a["category_id"]], *(round(x, 2) for x in a["bbox"])))
    return {str(Path(name).relative_to(Path(root).resolve())): found for name, found in boxes.items()}


def problem(root, *overrides):
    with pytest.raises(UserError) as caught:
        cfg = config(root, *overrides)
        resolve_classes(cfg)
        check_own_data(cfg, "train", "val")
    return str(caught.value)


# YOLO

YOLO = {
    "data.yaml": "path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n",
    "images/train/a.png": None,
    "images/train/b.png": None,
    "images/val/c.png": None,
    "labels/train/a.txt": "1 0.5 0.5 0.5 0.25\n0 0.1 0.2 0.6 0.2 0.6 0.9\n",
    "labels/val/c.txt": "0 0.25 0.5 0.5 1\n",
}


def test_yolo_boxes_polygons_and_background(tmp_path):
    write(tmp_path, YOLO)
    assert read(tmp_path, f"data.yolo={tmp_path}/data.yaml") == {
        "images/train/a.png": [("dog", 10, 7.5, 20, 5), ("cat", 4, 4, 20, 14)],
        "images/train/b.png": [],
    }
    assert read(tmp_path, f"data.yolo={tmp_path}/data.yaml", "val") == {
        "images/val/c.png": [("cat", 0, 0, 20, 20)]
    }
    check_own_data(config(tmp_path, f"data.yolo={tmp_path}/data.yaml"), "train", "val")


@pytest.mark.parametrize(
    ("yaml", "folder"),
    [
        ("train: ../train/images\nval: ../valid/images", "train"),  # Roboflow
        ("path: /content/elsewhere\ntrain: train/images\nval: valid/images", "train"),
        ("train: [train/images]\nvalid: valid/images", "train"),
        ("path: ..\ntrain: {parent}/train/images/list.txt\nval: valid/images", "train"),
    ],
)
def test_yolo_paths_as_exports_write_them(yaml, folder, tmp_path):
    write(
        tmp_path / "set",
        {
            "data.yaml": yaml.format(parent="set") + "\nnc: 2\nnames: ['cat', 'dog']\n",
            "train/images/a.png": None,
            "train/images/list.txt": "./a.png\n",
            "train/labels/a.txt": "0 0.5 0.5 1 1\n",
            "valid/images/c.png": None,
            "valid/labels/c.txt": "",
        },
    )
    override = f"data.yolo={tmp_path}/set/data.yaml"
    assert read(tmp_path, override) == {"set/train/images/a.png": [("cat", 0, 0, 40, 20)]}
    assert read(tmp_path, override, "val") == {"set/valid/images/c.png": []}


def test_yolo_without_validation_and_with_key_points(tmp_path):
    write(tmp_path, YOLO)
    write(
        tmp_path,
        {
            "data.yaml": "train: images/train\nkpt_shape: [2, 3]\nnames: [cat, dog]\n",
            "labels/train/a.txt": "1 0.5 0.5 0.5 0.25 0.1 0.1 2 0.2 0.2 2\n",
        },
    )
    override = f"data.yolo={tmp_path}/data.yaml"
    assert read(tmp_path, override)["images/train/a.png"] == [("dog", 10, 7.5, 20, 5)]
    assert not has_test_set(config(tmp_path, override))


BAD_YOLO = {
    "labels whose class is not in names: 1 (a.txt line 2: 2 .1 .1 .1 .1); known are 0 cat, 1 dog": {
        "labels/train/a.txt": "0 .5 .5 .5 .5\n2 .1 .1 .1 .1\n"
    },
    "label values beyond 0 and 1: 1 (a.txt line 1: 0 20 10 5 5); YOLO's are shares of": {
        "labels/train/a.txt": "0 20 10 5 5\n"
    },
    'neither "class x y width height" nor "class" and three corners or more: 2 (a.txt line 1: cat': {
        "labels/train/a.txt": "cat .5 .5 .5 .5\n0 .5 .5\n"
    },
    "not one of the 2 images has a label file; expected ": {"labels/train/a.txt": None},
    "there is no train folder nowhere, looked for as ": {"data.yaml": "train: nowhere\nnames: [cat]\n"},
    "expected names: [...], the classes, found names: None": {"data.yaml": "train: images/train\n"},
    "nc is 3, but names has 1 classes": {"data.yaml": "train: images/train\nnc: 3\nnames: [cat]\n"},
    "the numbers of the names are 1, 2, expected all of 0 to 1": {
        "data.yaml": "train: images/train\nnames: {1: cat, 2: dog}\n"
    },
    "expected the keys train, val and names, found None": {"data.yaml": ""},
    "is not a YAML file: ": {"data.yaml": "names: [cat\n"},
    "image files that cannot be read: 1 (a.png: ": {"images/train/a.png": ""},
    "there is no annotation; nothing can be learned": {"labels/train/a.txt": ""},
}


@pytest.mark.parametrize("expected", BAD_YOLO)
def test_bad_yolo_data_are_explained(expected, tmp_path):
    write(tmp_path, YOLO)
    for name, content in BAD_YOLO[expected].items():
        if content is None:
            Path(tmp_path, name).unlink()
        else:
            write(tmp_path, {name: content})
    assert expected in problem(tmp_path, f"data.yolo={tmp_path}/data.yaml")


# Pascal VOC


def xml(name, *objects, size="<size><width>40</width><height>20</height></size>"):
    boxes = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{z}</xmax>"
        f"<ymax>{w}</ymax></bndbox></object>"
        for label, x, y, z, w in objects
    )
    return f"<annotation><filename>{name}</filename>{size}{boxes}</annotation>"


VOC = {
    "JPEGImages/a.png": None,
    "JPEGImages/b.png": None,
    "JPEGImages/c.png": None,
    "Annotations/a.xml": xml("a.png", ("dog", 1, 1, 40, 20), ("cat", 11, 6, 20, 10)),
    "Annotations/b.xml": xml("wrong/name.jpg"),
    "Annotations/c.xml": xml("c.png", ("bird", 1, 1, 4, 4), size=""),
    "ImageSets/Main/train.txt": "a\nb  -1\n",
    "ImageSets/Main/val.txt": "c\n",
}
VOC_TRAIN = {"JPEGImages/a.png": [("dog", 0, 0, 40, 20), ("cat", 10, 5, 10, 5)], "JPEGImages/b.png": []}


def test_voc_with_its_lists(tmp_path):
    """Pixels from 1; the size of an image where the XML has none; classes of both sets."""
    write(tmp_path, VOC)
    override = f"data.voc={tmp_path}"
    assert read(tmp_path, override) == VOC_TRAIN
    assert read(tmp_path, override, "val") == {"JPEGImages/c.png": [("bird", 0, 0, 4, 4)]}
    cfg = config(tmp_path, override)
    assert own_classes(cfg.data) == ["bird", "cat", "dog"] and has_test_set(cfg)
    check_own_data(cfg, "train", "val")


def test_voc_files_are_parsed_once_until_they_change(tmp_path, monkeypatch):
    parsed = []
    parse = ElementTree.parse
    monkeypatch.setattr(ElementTree, "parse", lambda path: parsed.append(path.stem) or parse(path))
    write(tmp_path, VOC)
    override = f"data.voc={tmp_path}"
    assert own_classes(config(tmp_path, override).data) == ["bird", "cat", "dog"]
    read(tmp_path, override)
    read(tmp_path, override, "val")
    assert sorted(parsed) == ["a", "b", "c"]
    write(tmp_path, {"Annotations/a.xml": xml("a.png", ("cow", 1, 1, 40, 20))})
    assert read(tmp_path, override)["JPEGImages/a.png"] == [("cow", 0, 0, 40, 20)]
    assert sorted(parsed) == ["a", "a", "b", "c"]


def test_voc_as_folders_of_xml_files(tmp_path):
    """Images beside them or beside their folder; a box that begins at 0 tells that pixels count from 0."""
    write(
        tmp_path,
        {
            "train/a.png": None,
            "train/a.xml": xml("a.png", ("dog", 0, 0, 40, 20), ("dog", 10, 5, 20, 10)),
            "valid/labels/c.xml": xml("c.png", ("dog", 11, 6, 20, 10)),
            "valid/data/c.png": None,
        },
    )
    a, c = (
        {"train/a.png": [("dog", 0, 0, 40, 20), ("dog", 10, 5, 10, 5)]},
        {"valid/data/c.png": [("dog", 10, 5, 10, 5)]},
    )
    for override in (f"data.voc={tmp_path}", f"data.voc=[{tmp_path}/train,{tmp_path}/valid]"):
        assert read(tmp_path, override) == a and read(tmp_path, override, "val") == c
    assert not has_test_set(config(tmp_path, f"data.voc={tmp_path}/train"))


BAD_VOC = {
    "XML files that cannot be read: 1 (a.xml); replace them": {"Annotations/a.xml": ""},
    "images without their XML file: 1 (z.xml)": {"ImageSets/Main/train.txt": "a\nz\n"},
    "objects without a name or a bndbox of xmin, ymin, xmax, ymax: 1 (a.xml: dog)": {
        "Annotations/a.xml": xml("a.png", ("dog", 1, 1, "", 20))
    },
    "missing image files: 1 (a.png)": {"JPEGImages/a.png": None},
    "another size (width x height) than in the JSON: 1 (a.png: 40x20, in the JSON 4x2)": {
        "Annotations/a.xml": xml(
            "a.png", ("dog", 1, 1, 4, 2), size="<size><width>4</width><height>2</height></size>"
        )
    },
}


@pytest.mark.parametrize("expected", BAD_VOC)
def test_bad_voc_data_are_explained(expected, tmp_path):
    write(tmp_path, VOC)
    for name, content in BAD_VOC[expected].items():
        if content is None:
            Path(tmp_path, name).unlink()
        else:
            write(tmp_path, {name: content})
    assert expected in problem(tmp_path, f"data.voc={tmp_path}")


def test_a_folder_without_xml_files_says_what_is_expected(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        found = problem(tmp_path, f"data.voc={folder}")
        assert "expected a folder with ImageSets/Main, Annotations and JPEGImages" in found


# Several COCO files


def coco(names, boxes, **more):
    """An image "a.png" and boxes of the classes with these numbers."""
    return json.dumps(
        {
            "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 20}],
            "categories": [{"id": key, "name": name} for key, name in names.items()],
            "annotations": [
                {"id": k, "image_id": 7, "category_id": key, "bbox": [0, 0, 4, 4], **more}
                for k, key in enumerate(boxes, 1)
            ],
        }
    )


def merged(root, *files, folders=("a", "b")):
    """The override that names the files, each with the image in its folder."""
    for folder, content in zip("ab", files):
        write(root, {f"{folder}/a.png": None, f"{folder}.json": content})
    names = ",".join(f"{root}/{folder}.json" for folder in "ab")
    images = ",".join(f"{root}/{folder}" for folder in folders)
    return f"data={{train_json: [{names}], train_images: [{images}]}}"


def test_coco_files_are_merged_by_the_names_of_their_classes(tmp_path):
    override = merged(tmp_path, coco({1: "cat", 2: "dog"}, [1, 2]), coco({1: "dog", 5: "owl"}, [1, 5]))
    assert read(tmp_path, override) == {
        "a/a.png": [("cat", 0, 0, 4, 4), ("dog", 0, 0, 4, 4)],
        "b/a.png": [("dog", 0, 0, 4, 4), ("owl", 0, 0, 4, 4)],
    }
    assert own_classes(config(tmp_path, override).data) == ["cat", "dog", "owl"]
    check_own_data(config(tmp_path, override), "train")


def test_coco_files_that_contradict_each_other(tmp_path):
    override = merged(tmp_path, coco({1: "cat"}, [1]), coco({1: "Cat "}, [1]))
    assert "'cat' of " in (found := problem(tmp_path, override)) and "differ in case or blanks alone" in found
    override = merged(tmp_path, coco({1: "cat", 2: "cat"}, [1]), coco({1: "cat"}, [1]))
    assert "has several classes of one name (cat)" in problem(tmp_path, override)
    override = merged(tmp_path, coco({1: "cat"}, [1]), coco({1: "cat"}, [9]))
    assert "annotations of unknown categories: 1 (annotation 2 of image 2: category '9 of" in problem(
        tmp_path, override
    )


def test_one_folder_may_serve_all_files(tmp_path):
    override = merged(tmp_path, coco({1: "cat"}, [1]), coco({1: "cat"}, [1]), folders=("a",))
    assert "2 annotation files" in problem(tmp_path, override)  # a list of one is no folder for all
    cfg = config(tmp_path, override.replace(f"[{tmp_path}/a]", f"{tmp_path}/a"))
    json_file, image_root = own_files(cfg.data, "train", f"{tmp_path}/run/data")
    images = json.loads(Path(json_file).read_text())["images"]
    assert [Path(image_root, image["file_name"]) for image in images] == [tmp_path / "a" / "a.png"] * 2
