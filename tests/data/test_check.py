"""The look at COCO-format data before training: what is an error, what is only reported."""

import json
import logging
import shutil

import pytest
from detectron2.evaluation import COCOEvaluator
from PIL import Image

from sparse_detr.data import FastCOCOEvaluator, category_names, check_coco, check_data, coco_dataset


def content():
    """Two images of 40x30 pixels with three boxes of two classes."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            dict(id=1, image_id=1, category_id=5, bbox=[1, 2, 20, 10], area=200, iscrowd=0),
            dict(id=2, image_id=1, category_id=3, bbox=[5, 5, 30, 20], area=600, iscrowd=0),
            dict(id=3, image_id=2, category_id=3, bbox=[0, 0, 40, 30], area=1200, iscrowd=0),
        ],
        "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def write(folder, coco, colours=("red", "blue")):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, colour in zip("ab", colours):
        Image.new("RGB", (40, 30), colour).save(folder / "images" / f"{name}.png")
    (folder / "set.json").write_text(json.dumps(coco))
    return str(folder / "set.json"), str(folder / "images")


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
    """A run in an earlier test may have turned the log away from pytest's."""
    monkeypatch.setattr(logging.getLogger("sparse_detr"), "propagate", True)


def remarks(caplog):
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


def test_sound_data_are_counted_and_nothing_is_remarked(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        check_data(write(tmp_path, content()))
    assert "2 images, 3 boxes (dog 1, cat 2), 0 crowd regions, 0 images without a box" in caplog.text
    assert not remarks(caplog)


def change(part, index, **values):
    def apply(coco):
        coco[part][index].update(values)

    return apply


def remove(part, index, key):
    def apply(coco):
        del coco[part][index][key]

    return apply


def each_box(coco, box):
    for annotation in coco["annotations"]:
        annotation["bbox"] = box


FATAL = {
    "missing image files: 1 (gone.png)": change("images", 0, file_name="gone.png"),
    "another size (width x height) than in the JSON: 1 (a.png: 40x30, in the JSON 30x40)": change(
        "images", 0, width=30, height=40
    ),
    "images without a proper width: 1 (b.png)": remove("images", 1, "width"),
    "images without a proper file_name: 1 (image 1)": remove("images", 0, "file_name"),
    "image ids twice: 1 (1)": change("images", 1, id=1),
    "annotation ids twice: 1 (1)": change("annotations", 2, id=1),
    "annotations of unknown categories: 1 (annotation 3 of image 2: category 4)": change(
        "annotations", 2, category_id=4
    ),
    "annotations without a proper category_id: 1": remove("annotations", 0, "category_id"),
    "four finite numbers: 1 (annotation 1 of image 1: [1, 2, nan, 10])": change(
        "annotations", 0, bbox=[1, 2, float("nan"), 10]
    ),
    "four finite numbers: 1 (annotation 2 of image 1: [])": change("annotations", 1, bbox=[]),
    "four finite numbers: 1 (annotation 2 of image 1: None)": remove("annotations", 1, "bbox"),
    "annotations with the key ignore: 1": change("annotations", 1, ignore=1),
    "category ids twice: 1 (3)": change("categories", 0, id=3),
    "categories without an id or a name: 1 ({'id': 5, 'name': 7}); add them, the name as a text": change(
        "categories", 0, name=7
    ),
    "annotations whose iscrowd is not 0 or 1: 1 (annotation 1 of image 1: '0')": change(
        "annotations", 0, iscrowd="0"
    ),
    'image_id is a text and the image\'s id a number ("1" and 1), or the reverse: 1 '
    "(annotation 1 of image '1'); write both alike": change("annotations", 0, image_id="1"),
    "coordinates look normalised; expected pixels (x, y, width, height)": lambda coco: each_box(
        coco, [0.1, 0.2, 0.5, 0.3]
    ),
    "not one annotation can be used": lambda coco: each_box(coco, [9, 2, 0, 10]),
    "there is no annotation": lambda coco: coco["annotations"].clear(),
    "there is no category": lambda coco: coco["categories"].clear(),
}


@pytest.mark.parametrize("expected", FATAL)
def test_what_would_break_a_run_is_an_error(expected, tmp_path):
    coco = content()
    FATAL[expected](coco)
    with pytest.raises(ValueError, match="the data must be mended first") as caught:
        check_data(write(tmp_path, coco))
    assert expected in str(caught.value)


REPORTED = {
    "boxes without an area: 1 (annotation 1 of image 1: [9, 2, -4, 10]); dropped": change(
        "annotations", 0, bbox=[9, 2, -4, 10]
    ),
    "boxes outside their image: 1 (annotation 1 of image 1: [40, 2, 5, 5]); dropped": change(
        "annotations", 0, bbox=[40, 2, 5, 5]
    ),
    "boxes that reach over the border of their image: 1 (annotation 1 of image 1: "
    "[30, 2, 15, 5]); clipped": change("annotations", 0, bbox=[30, 2, 15, 5]),
    "boxes that reach over the border of their image: 3 (annotation 1 of image 1: [20, 5, 30, 25], "
    "annotation 2 of image 1: [20, 5, 30, 25], annotation 3 of image 2: [20, 5, 30, 25]); clipped to "
    "the image; they are more than half of all boxes: are they x1, y1, x2, y2?": lambda coco: each_box(
        coco, [20, 5, 30, 25]
    ),
    "annotations of images that are not in the file: 1 (annotation 3 of image 9); left out": change(
        "annotations", 2, image_id=9
    ),
    "classes without an annotation: 1 (dog)": change("annotations", 0, category_id=3),
    "class names twice: 1 (cat)": change("categories", 0, name="cat"),
    "crowd regions: 1 (annotation 2 of image 1); not trained on": change("annotations", 1, iscrowd=1),
    "file names twice: 1 (a.png)": change("images", 1, file_name="a.png"),
}


@pytest.mark.parametrize("expected", REPORTED)
def test_what_is_dropped_or_clipped_is_reported(expected, tmp_path, caplog):
    coco = content()
    REPORTED[expected](coco)
    check_data(write(tmp_path, coco))
    assert expected in remarks(caplog)


def test_images_and_boxes_are_counted_by_the_ids_as_they_are(tmp_path):
    coco = content()
    for annotation in coco["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    assert "2 images without a box" in check_coco(*write(tmp_path, coco)).summary()


def test_all_problems_of_both_sets_come_in_one_message(tmp_path):
    coco, other = content(), content()
    coco["annotations"][0]["bbox"] = [1, 2]
    coco["annotations"][1]["category_id"] = 9
    coco["images"][1]["file_name"] = "gone.png"
    other["categories"].reverse()
    other["categories"][0]["id"] = 6
    train, val = write(tmp_path / "train", coco), write(tmp_path / "val", other)
    with pytest.raises(ValueError) as caught:
        check_data(train, val)
    problems = str(caught.value).splitlines()[1:]
    for number, (problem, expected) in enumerate(
        zip(
            problems,
            (
                "train/set.json: annotations of unknown categories",
                "train/set.json: boxes that are not four finite numbers",
                "train/set.json: missing image files",
                "val/set.json: annotations of unknown categories",
                "val/set.json: the classes in the order of their ids (dog, cat)",
            ),
            strict=True,
        ),
        start=1,
    ):
        assert problem.startswith(f"  {number}. ") and expected in problem


def test_many_records_are_counted_and_the_first_ones_named(tmp_path):
    coco = content()
    coco["images"] = [dict(id=i, file_name=f"{i}.png", width=9, height=9) for i in range(1, 8)]
    with pytest.raises(ValueError, match=r"missing image files: 7 \(1.png, 2.png, 3.png, ...\)"):
        check_data(write(tmp_path, coco))


def test_a_file_that_is_no_image_is_an_error(tmp_path):
    json_file, images = write(tmp_path, content())
    (tmp_path / "images" / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"image files that cannot be read: 1 \(b.png: "):
        check_data((json_file, images))


def test_an_image_of_16_bits_is_an_error(tmp_path):
    """detectron2 reads it as white wherever it is brighter than 255."""
    json_file, images = write(tmp_path, content())
    Image.new("I;16", Image.open(tmp_path / "images" / "b.png").size).save(tmp_path / "images" / "b.png")
    with pytest.raises(ValueError, match=r"cannot be read: 1 \(b.png: more than 8 bits"):
        check_data((json_file, images))


def test_the_rotation_that_a_camera_noted_counts(tmp_path):
    """Training turns the image, so its JSON has the sizes of the turned one."""
    coco = content()
    coco["images"][0].update(file_name="turned.jpg", width=30, height=40)
    files = write(tmp_path, coco)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "turned.jpg", exif=exif)
    check_data(files)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation/>", "is not a JSON file"),
        ("[]", "not in COCO format.*found list"),
        ('{"images": [], "shapes": []}', "not in COCO format.*found images, shapes"),
    ],
)
def test_other_formats_are_named(text, message, tmp_path):
    json_file, images = write(tmp_path, content())
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_data((json_file, images))


def test_an_absent_folder_or_file_is_named(tmp_path):
    json_file, images = write(tmp_path, content())
    with pytest.raises(ValueError, match="no image folder .*/nowhere"):
        check_data((json_file, str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="cannot read the annotations .*/nowhere.json"):
        check_data((str(tmp_path / "nowhere.json"), images))


def test_other_classes_in_the_validation_set_are_an_error(tmp_path):
    """The same number of classes, numbered differently: AP would be 0 and nobody would know why."""
    other = content()
    other["categories"] = [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}]
    train = write(tmp_path / "train", content())
    val = write(tmp_path / "val", other, ("green", "white"))
    with pytest.raises(ValueError, match=r"\(dog, cat\) are not the training set's \(cat, dog\)"):
        check_data(train, val)


def test_other_ids_in_the_same_order_are_no_problem(tmp_path, caplog):
    other = content()
    for category, number in zip(other["categories"], (2, 1)):
        category["id"] = number
    for annotation in other["annotations"]:
        annotation["category_id"] = {5: 2, 3: 1}[annotation["category_id"]]
    check_data(write(tmp_path / "train", content()), write(tmp_path / "val", other, ("green", "white")))
    assert not remarks(caplog)


def test_images_in_both_sets_are_reported(tmp_path, caplog):
    train = write(tmp_path / "train", content())
    val = write(tmp_path / "val", content(), ("green", "white"))
    check_data(train, val)  # the same names, other pictures: as many cameras number them
    assert not remarks(caplog)
    shutil.copy(tmp_path / "train" / "images" / "a.png", tmp_path / "val" / "images" / "a.png")
    check_data(train, val)
    assert "validation images are training images: 1 (a.png)" in remarks(caplog)


def test_names_are_in_the_order_of_the_ids(tmp_path):
    assert category_names(write(tmp_path, content())[0]) == ["cat", "dog"]


def test_boxes_of_negative_size_do_not_reach_training(tmp_path):
    coco = content()
    coco["annotations"][0]["bbox"] = [9, 2, -4, 10]
    json_file, images = write(tmp_path, coco)
    records = coco_dataset(names="test_check_negative", json_file=json_file, image_root=images)
    assert [[a["bbox"] for a in r["annotations"]] for r in records] == [
        [[5, 5, 30, 20]],
        [[0, 0, 40, 30]],
    ]


def test_the_evaluation_needs_no_area_no_iscrowd_and_no_id_but_0(tmp_path):
    """Ground truth given back as detections is found, all of it."""
    coco = content()
    for annotation in coco["annotations"]:
        annotation["id"] -= 1
        del annotation["area"], annotation["iscrowd"]
    json_file, images = write(tmp_path, coco)
    records = coco_dataset(names="test_check_bare", json_file=json_file, image_root=images)

    def average_precision(evaluator):
        evaluator.reset()
        evaluator._predictions = [
            {
                "image_id": record["image_id"],
                "instances": [
                    dict(image_id=record["image_id"], score=0.9, bbox=a["bbox"], category_id=a["category_id"])
                    for a in record["annotations"]
                ],
            }
            for record in records
        ]
        return evaluator.evaluate()["bbox"]["AP"]

    options = dict(dataset_name="test_check_bare", output_dir=str(tmp_path))
    for fast in (None, False):
        assert average_precision(FastCOCOEvaluator(**options, fast=fast)) == pytest.approx(100)
    with pytest.raises(KeyError, match="area|iscrowd"):  # what it is for
        average_precision(COCOEvaluator(**options))
