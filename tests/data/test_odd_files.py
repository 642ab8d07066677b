"""Annotation files as tools of all kinds write them: each works, or one line says why not.

Where they work, the ground truth itself, given back as detections, scores 100 with either evaluator,
and training reads every sound box.
"""

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from sparse_detr.data import DetrDatasetMapper, FastCOCOEvaluator, check_coco, check_data, coco_dataset
from sparse_detr.data.check import LIMITS
from sparse_detr.data.evaluation import detection_limits
from sparse_detr.errors import UserError

NAME = "test_odd_files"
HUGE = 2**70


def content():
    """Two images of 96x80 pixels, three boxes of two classes, all of medium size."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 96, "height": 80},
            {"id": 2, "file_name": "b.png", "width": 96, "height": 80},
        ],
        "annotations": [
            dict(id=1, image_id=1, category_id=1, bbox=[8, 8, 30, 40], area=1200, iscrowd=0),
            dict(id=2, image_id=1, category_id=2, bbox=[50, 20, 40, 30], area=1200, iscrowd=0),
            dict(id=3, image_id=2, category_id=1, bbox=[20, 10, 50, 50], area=2500, iscrowd=0),
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def renamed(part, new):
    """The ids of ``part`` become ``new``, also where annotations refer to them."""

    def apply(coco):
        old = [record["id"] for record in coco[part]]
        ids = dict(zip(old, new, strict=True))
        for record in coco[part]:
            record["id"] = ids[record["id"]]
        key = {"images": "image_id", "categories": "category_id"}.get(part)
        for annotation in coco["annotations"] if key else ():
            annotation[key] = ids[annotation[key]]

    return apply


def each(key, *values):
    """The annotations' ``key`` becomes these values, in turn."""

    def apply(coco):
        for index, annotation in enumerate(coco["annotations"]):
            annotation[key] = values[index % len(values)]

    return apply


def write(folder, coco):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (96, 80), colour).save(folder / "images" / f"{name}.png")
    (folder / "set.json").write_text(json.dumps(coco))
    return str(folder / "set.json"), str(folder / "images")


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.setattr(logging.getLogger("sparse_detr"), "propagate", True)
    yield
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def remarks(caplog):
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


def ground_truth_as_detections(records, folder, **options):
    """The evaluator's results; its files are in ``folder``."""
    evaluator = FastCOCOEvaluator(NAME, output_dir=str(folder), **options)
    evaluator.reset()
    for record in records:
        image = record["image_id"]
        found = [
            dict(image_id=image, score=0.9, bbox=a["bbox"], category_id=a["category_id"])
            for a in record["annotations"]
            if not a["iscrowd"]
        ]
        evaluator._predictions.append({"image_id": image, "instances": found})
    return evaluator.evaluate()["bbox"]


@pytest.fixture(params=[False, True], ids=["pycocotools", "faster"])
def fast(request):
    if request.param:
        pytest.importorskip("faster_coco_eval")
    return request.param


WORK = {
    "annotation ids are uuids": renamed("annotations", ["5f1c-1", "5f1c-2", "5f1c-3"]),
    "annotation ids are numbers as text": renamed("annotations", ["1", "2", "3"]),
    "annotation ids are negative": renamed("annotations", [-1, -2, -3]),
    "annotation ids are 0, huge and mixed": renamed("annotations", [0, HUGE, "x"]),
    "annotation ids are floats": renamed("annotations", [1.0, 2.0, 3.0]),
    "annotation ids are missing": lambda coco: [a.pop("id") for a in coco["annotations"]],
    "image ids are texts": renamed("images", ["f_1", "f_2"]),
    "image ids are mixed": renamed("images", ["x1", 2]),
    "image ids are negative and huge": renamed("images", [-5, HUGE]),
    "category ids are texts": renamed("categories", ["c", "d"]),
    "category ids are mixed": renamed("categories", ["c", 2]),
    "category ids are negative and huge": renamed("categories", [HUGE, -1]),
    "polygons are empty": each("segmentation", [[]]),
    "polygons are flat": each("segmentation", [8, 8, 38, 8, 38, 48]),
    "one polygon is flat": lambda coco: coco["annotations"][0].update(segmentation=[8, 8, 38, 8, 38, 48]),
    "polygons are pairs": each("segmentation", [[8, 8], [38, 8], [38, 48]]),
    "polygons are pairs in a list": each("segmentation", [[[8, 8], [38, 8], [38, 48]]]),
    "polygons have two points": each("segmentation", [[1, 2, 3, 4]]),
    "masks have no size": each("segmentation", {"counts": [10, 20]}),
    "masks are of other types": each("segmentation", "text", None, 3),
    "keypoints are triples": each("keypoints", [[1, 2, 2], [3, 4, 2]]),
    "keypoints are of other types": each("keypoints", "text", None, {"a": 1}),
    "sizes are floats": lambda coco: [i.update(width=96.0, height=80.0) for i in coco["images"]],
}


@pytest.mark.parametrize("fault", WORK)
def test_the_ground_truth_scores_100_and_training_reads_every_box(fault, fast, tmp_path, caplog):
    coco = content()
    WORK[fault](coco)
    json_file, images = write(tmp_path, coco)
    check_data((json_file, images), (json_file, images))
    assert remarks(caplog).count("\n") == 0  # that both sets have the same images
    records = coco_dataset(names=NAME, json_file=json_file, image_root=images)
    mapper = DetrDatasetMapper(is_train=True, augmentations=[])
    assert sorted(len(mapper(record)["instances"]) for record in records) == [1, 2]
    results = ground_truth_as_detections(records, tmp_path, fast=fast)
    for metric in ("AP", "APm", "AP-cat", "AP-dog"):
        assert results[metric] == pytest.approx(100), metric
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    truth = [(a["image_id"], a["category_id"], a["bbox"]) for a in coco["annotations"]]
    found = [(r["image_id"], r["category_id"], r["bbox"]) for r in written]
    assert sorted(map(repr, found)) == sorted(map(repr, truth))  # in the file's own ids


AREAS = [None, "1200", -1200, 0, float("nan"), float("inf"), [1200], True, HUGE, 10**400]


@pytest.mark.parametrize("area", AREAS, ids=lambda area: repr(area)[:9])
def test_an_area_that_is_none_becomes_the_boxs(area, fast, tmp_path, caplog):
    coco = content()
    each("area", area)(coco)
    coco["annotations"][1]["bbox"] = [50, 20, 10, 10]  # the one small box
    json_file, images = write(tmp_path, coco)
    check_data((json_file, images))
    assert (
        "whose area is not a positive finite number (at most 1e10): 3 (annotation 1 of image 1: "
        in remarks(caplog)
    )
    records = coco_dataset(names=NAME, json_file=json_file, image_root=images)
    results = ground_truth_as_detections(records, tmp_path, fast=fast)
    assert [results[k] for k in ("AP", "APs", "APm")] == pytest.approx([100] * 3)


def test_an_area_that_is_one_is_kept(fast, tmp_path, caplog):
    """A mask's area may be far below its box's."""
    coco = content()
    each("area", 900)(coco)
    json_file, images = write(tmp_path, coco)
    check_data((json_file, images))
    assert not remarks(caplog)
    records = coco_dataset(names=NAME, json_file=json_file, image_root=images)
    results = ground_truth_as_detections(records, tmp_path, fast=fast)
    assert results["APs"] == pytest.approx(100) and results["APm"] != results["APm"]


def crowded(count):
    """``count`` objects of 5x5 pixels in each image."""
    coco = content()
    coco["annotations"] = [
        dict(
            id=image * count + k, image_id=image, category_id=1 + k % 2, bbox=[k % 30 * 3, k // 30 * 5, 5, 5]
        )
        for image in (1, 2)
        for k in range(count)
    ]
    return coco


def test_more_objects_than_the_limits_are_remarked_with_the_keys(tmp_path, caplog):
    files = write(tmp_path, crowded(300))
    check_data(files)
    assert "images with more objects than the limits allow: 2 (a.png: 300, b.png: 300)" in remarks(caplog)
    assert (
        "The limits are dataloader.evaluator.max_dets_per_image=100, model.max_detections=100, "
        "model.transformer.query_selection.num_queries=300: raise them to 300, the most of an image (150 of "
    ) in remarks(caplog)


@pytest.mark.parametrize("key", LIMITS)
def test_each_limit_is_enough_where_it_is_reached(key, tmp_path, caplog):
    """The evaluator's counts per class, of which there are two."""
    files = write(tmp_path, crowded(120))
    enough = 60 if "evaluator" in key else 120
    limits = dict.fromkeys(LIMITS, 1000)
    check_data(files, limits={**limits, key: enough})
    assert not remarks(caplog)
    check_data(files, limits={**limits, key: enough - 1})
    assert f"{key}={enough - 1}" in remarks(caplog)


def test_crowd_regions_are_no_objects_of_a_crowded_image(tmp_path):
    coco = crowded(101)
    coco["annotations"][0]["iscrowd"] = coco["annotations"][-1]["iscrowd"] = 1
    assert not any("limits allow" in text for text in check_coco(*write(tmp_path, coco)).remarks)


@pytest.mark.parametrize("limit", [240, [1, 10, 240]])
def test_the_limit_of_the_evaluation_can_be_raised(limit, fast, tmp_path):
    json_file, images = write(tmp_path, crowded(240))
    records = coco_dataset(names=NAME, json_file=json_file, image_root=images)
    scored = ground_truth_as_detections(records, tmp_path, fast=fast)
    assert scored["AP"] == pytest.approx(ground_truth_as_detections(records, tmp_path, fast=False)["AP"])
    assert scored["AP"] < 90
    scored = ground_truth_as_detections(records, tmp_path, fast=fast, max_dets_per_image=limit)
    assert scored["AP"] == scored["APs"] == scored["AP-cat"] == pytest.approx(100)


@pytest.mark.parametrize("limit", [1, 5, 10, 20])
def test_both_evaluators_count_alike_below_the_usual_limit(limit, tmp_path):
    pytest.importorskip("faster_coco_eval")
    json_file, images = write(tmp_path, crowded(60))
    records = coco_dataset(names=NAME, json_file=json_file, image_root=images)
    official, faster = (
        ground_truth_as_detections(records, tmp_path, fast=fast, max_dets_per_image=limit)
        for fast in (False, True)
    )
    assert 0 < official["AP"] < 100
    assert faster == pytest.approx(official, nan_ok=True)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "300", [300], [1, 10], [10, 1, 300], [1, 10, "300"], {}])
def test_a_limit_of_another_kind_is_one_line(value):
    with pytest.raises(UserError, match=r"max_dets_per_image=.*expected a positive integer.*\[1,10,300\]"):
        detection_limits(value)


def test_the_usual_limits_are_cocos():
    assert detection_limits(None) == detection_limits(100) == [1, 10, 100]
    assert detection_limits((1, 20, 300)) == [1, 20, 300]


REFUSED = {
    "annotations whose category_id is a text and the category's id a number": (
        each("category_id", "1", "2"),
        "3 (annotation 1 of image 1: '1', annotation 2 of image 1: '2', annotation 3 of image 2: '1'); "
        "write both alike",
    ),
    "annotations whose category_id is not a whole number or a text": (
        each("category_id", 1.0, 2.0),
        "3 (annotation 1 of image 1: 1.0, float, ",
    ),
    "annotations whose image_id is not a whole number or a text": (
        each("image_id", 1.0),
        "3 (annotation 1 of image 1.0: 1.0, float, ",
    ),
    "annotations whose image_id is a text and the image's id a number": (
        each("image_id", "1"),
        "(annotation 1 of image '1', ",
    ),
    "images whose id is not a whole number or a text": (
        renamed("images", [1.0, True]),
        "2 (a.png: 1.0, float, b.png: True, bool)",
    ),
    "images whose width is not a positive number of pixels": (
        lambda coco: coco["images"][0].update(width="96"),
        "1 (a.png: '96', str)",
    ),
    "annotations of unknown categories": (
        each("category_id", "cat"),
        "(annotation 1 of image 1: category 'cat', ",
    ),
    "all annotations (3) are crowd regions": (each("iscrowd", 1), "nothing can be learned or measured"),
    "boxes that are not four finite numbers": (
        lambda coco: coco["annotations"][0].update(bbox=[8, 8, True, 10**400]),
        "1 (annotation 1 of image 1: [8, 8, True, 1000",
    ),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_refused_is_told_with_values_and_types(problem, tmp_path):
    coco = content()
    change, details = REFUSED[problem]
    change(coco)
    with pytest.raises(UserError) as caught:
        check_data(write(tmp_path, coco))
    line = next(line for line in str(caught.value).splitlines() if problem in line)
    assert details in line
    assert "add the" not in str(caught.value) and "there is no annotation" not in str(caught.value)


VALUES = [
    *(None, True, 0, -1, 2, 1.0, 1.5, float("nan"), float("inf"), HUGE, 10**400),
    *("", "1", "x", "???", "\x00", [], [1], [[]], {}, {"a": 1}, [8, 8, 30, 40], ["8", 8, 30, 40]),
]


@pytest.mark.parametrize("every", [False, True], ids=["one", "all"])
@pytest.mark.parametrize(
    ("part", "key"),
    [
        *(("images", key) for key in ("id", "file_name", "width", "height")),
        *(("categories", key) for key in ("id", "name")),
        *(("annotations", key) for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")),
        *(("annotations", key) for key in ("ignore", "segmentation", "keypoints")),
    ],
)
def test_whatever_stands_there_it_works_or_is_one_error(part, key, every, tmp_path):
    """No other exception than UserError, and that one from the check; what passes can be trained on
    and evaluated."""
    files = write(tmp_path, content())
    passed = 0
    for value in VALUES:
        coco = content()
        for record in coco[part] if every else coco[part][:1]:
            record[key] = value
        (tmp_path / "set.json").write_text(json.dumps(coco))
        try:
            check_data(files, files)
        except UserError:
            continue
        passed += 1
        MetadataCatalog.pop(NAME, None)
        DatasetCatalog.pop(NAME, None)
        records = coco_dataset(names=NAME, json_file=files[0], image_root=files[1])
        mapper = DetrDatasetMapper(is_train=True, augmentations=[])
        assert sum(len(mapper(record)["instances"]) for record in records) > 0
        assert ground_truth_as_detections(records, tmp_path, fast=False)["AP"] == pytest.approx(100), value
    assert (passed == len(VALUES)) == (key in ("area", "segmentation", "keypoints"))


def test_detections_of_another_set_are_one_line(tmp_path):
    json_file, images = write(tmp_path, content())
    records = coco_dataset(names=NAME, json_file=json_file, image_root=images)
    records[0]["image_id"] = "other"
    with pytest.raises(UserError, match=r"does not have \('other'\): dataloader.evaluator.dataset_name must"):
        ground_truth_as_detections(records, tmp_path)


def test_sections_of_another_kind_are_named(tmp_path):
    coco = content()
    coco["images"] = {str(i["id"]): i for i in coco["images"]}
    with pytest.raises(UserError, match="found images as an object instead of a list"):
        check_data(write(tmp_path, coco))
    coco = content()
    coco["annotations"][1] = [1, 2]
    with pytest.raises(UserError, match=r"found annotations\[1\] as a list instead of an object: \[1, 2\]"):
        check_data(write(tmp_path, coco))


def test_a_byte_order_mark_is_no_obstacle(fast, tmp_path):
    json_file, images = write(tmp_path, content())
    (tmp_path / "set.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "set.json").read_bytes())
    check_data((json_file, images))
    records = coco_dataset(names=NAME, json_file=json_file, image_root=images)
    assert ground_truth_as_detections(records, tmp_path, fast=fast)["AP"] == pytest.approx(100)


def test_boxes_of_less_than_a_pixel_are_remarked(tmp_path, caplog):
    coco = content()
    coco["annotations"][0]["bbox"] = [8, 8, 1e-6, 40]
    check_data(write(tmp_path, coco))
    assert "lower than a pixel: 1 (annotation 1 of image 1: [8, 8, 1e-06, 40]); kept" in remarks(caplog)


def test_what_the_loader_raises_is_one_line(tmp_path, monkeypatch):
    def broken(*args):
        raise TypeError("no such record: 7\nmore words")

    monkeypatch.setattr("sparse_detr.data.check.load_coco", broken)
    with pytest.raises(UserError, match=r"cannot be loaded \(TypeError: no such record: 7\)"):
        check_data(write(tmp_path, content()))


def test_a_list_of_files_is_one_line(tmp_path):
    json_file, images = write(tmp_path, content())
    for files in ([json_file], [json_file, json_file]):
        with pytest.raises(UserError, match="the path of one annotation file, got a list: .*merge several"):
            check_data((files, images))
        with pytest.raises(UserError, match="the path of one annotation file, got a list: .*merge several"):
            coco_dataset(names=NAME, json_file=files, image_root=images)
    with pytest.raises(UserError, match="the path of one image folder, got a list"):
        check_data((json_file, [images]))


def test_a_list_of_one_name_is_that_name(fast, tmp_path):
    json_file, images = write(tmp_path, content())
    records = coco_dataset(names=[NAME], json_file=json_file, image_root=images)
    evaluator = FastCOCOEvaluator([NAME], output_dir=str(tmp_path), fast=fast)
    assert evaluator._metadata.name == NAME and len(records) == 2


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_other_lists_of_names_are_one_line(names, tmp_path):
    json_file, images = write(tmp_path, content())
    with pytest.raises(UserError, match="one JSON file is one data set"):
        coco_dataset(names=names, json_file=json_file, image_root=images)
    with pytest.raises(UserError, match="expected the name of one data set"):
        FastCOCOEvaluator(names, output_dir=str(tmp_path))
