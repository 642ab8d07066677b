"""Detection in many images: batches, workers, restarts, broken files, several processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from PIL import Image

import sparse_detr
from sparse_detr import bulk, results
from sparse_detr.cli import predict_many
from sparse_detr.engine import Checkpointer
from sparse_detr.errors import UserError

from .modeling.tiny import reveal, shrink

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(40, 60), (50, 50), (64, 96), (44, 60), (52, 52), (40, 62), (60, 40), (40, 60)]  # height, width


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The output of a (very short) run on three classes, with exact sizes."""
    folder = tmp_path_factory.mktemp("run")
    cfg = sparse_detr.get_config("custom/sparse_detr_r50")
    shrink(cfg.model)
    cfg.dataloader.test.mapper.augmentations.short_edge = 64
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    torch.manual_seed(0)
    model = reveal(sparse_detr.build_model(cfg, device="cpu"))
    for head in model.transformer.heads.class_heads:
        torch.nn.init.normal_(head.weight, std=0.3)
        torch.nn.init.zeros_(head.bias)  # scores that differ, many above the threshold
    checkpointer = Checkpointer(model, str(folder))
    checkpointer.class_names = ["cat", "dog", "cow"]
    checkpointer.save("model_final")
    checkpointer.tag_last_checkpoint("model_final.pth")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight images in two folders, and two files that are none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for index, size in enumerate(SIZES):
        pixels = np.random.default_rng(index).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if index % 2 else ".") / f"{index}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.md").write_text("is not looked at")
    return folder


@pytest.fixture(scope="module")
def alone(run_folder, images):
    """What `Predictor` says of each image alone, by file name."""
    predict = sparse_detr.Predictor(str(run_folder), device="cpu", threshold=0.05)
    return {
        str(path): predict(np.asarray(Image.open(path))[:, :, ::-1])["instances"]
        for path in sorted(images.rglob("*.png"))
    }


def command(run_folder, images, output, *more):
    return ["--run", str(run_folder), "--input", str(images), "--output", str(output), *more] + [
        "--device=cpu",
        "--num-workers=0",
    ]


def check(records, alone):
    """Each image has one record, which is what it has alone."""
    records = list(records)
    assert sorted(r["file_name"] for r in records) == sorted(alone)
    for record in records:
        expected = alone[record["file_name"]]
        assert (record["height"], record["width"]) == expected.image_size
        assert record["scores"] == pytest.approx(expected.scores.tolist(), abs=2e-5)
        assert [c - 1 for c in record["category_ids"]] == expected.pred_classes.tolist()
        names = [["cat", "dog", "cow"][c] for c in expected.pred_classes]
        assert record["class_names"] == names and names
        boxes = expected.pred_boxes.tensor
        torch.testing.assert_close(torch.tensor(record["boxes"]), boxes, atol=0.011, rtol=0)


def test_batches_and_workers_give_what_each_image_has_alone(run_folder, images, alone, tmp_path, capsys):
    arguments = command(run_folder, images, tmp_path / "found", "--batch-size", "3")
    arguments[-1] = "--num-workers=2"
    assert predict_many.main(arguments) == 3  # of nine files one is broken
    check(results.read_results(tmp_path / "found"), alone)
    (error,) = results.read_errors(tmp_path / "found")
    assert error["file_name"] == str(images / "broken.jpg") and "cannot identify" in error["error"]
    said = capsys.readouterr().out
    assert "9 images in" in said and "1 files have no result" in said
    lines = (tmp_path / "found" / "part-00000.jsonl").read_bytes()
    assert predict_many.main(arguments) == 3  # again: nothing is left to do, and the error is still one
    assert "9 images were done before" in capsys.readouterr().out
    assert (tmp_path / "found" / "part-00000.jsonl").read_bytes() == lines


def entries(*sizes):
    return [{"image": np.zeros((3, *size), np.uint8), "number": n} for n, size in enumerate(sizes)]


def test_batches_hold_images_of_one_size_or_with_little_padding():
    mixed = entries(*[(64, 96), (96, 64), (64, 92), (64, 64)] * 6)
    for limit in (0.0, 0.05, 0.4):
        batches = list(bulk.in_batches(iter(mixed), 4, limit))
        assert sorted(e["number"] for b in batches for e in b) == list(range(24))
        padding = [bulk._padding([e["image"].shape[1:] for e in b]) for b in batches]
        assert max(padding) <= limit and all(len(b) <= 4 for b in batches)
        assert (max(padding) > 0) == (limit > 0)
    first, *_ = bulk.in_batches(iter(mixed), 4, 0.0)
    assert [e["number"] for e in first] == [0, 4, 8, 12]  # the one that waits longest, and its like
    assert next(bulk.in_batches(iter([mixed[0], {"error": "x"}]), 4, 0.0)) == [{"error": "x"}]


def test_published_models_get_images_of_one_size_and_exact_ones_may_be_padded(run_folder):
    predict = sparse_detr.Predictor(str(run_folder), device="cpu")
    assert bulk.BulkDetector(predict).max_padding == 0.1
    predict.model.pad_features = False  # as where the backbone's batch norms learn
    assert bulk.BulkDetector(predict).max_padding == 0.0
    predict.model.pad_features = True
    predict.model.exact_sizes = False
    assert bulk.BulkDetector(predict).max_padding == 0.0
    for wrong in ({"batch_size": 0}, {"max_padding": 1.0}, {"box_format": "cxcywh"}):
        with pytest.raises(UserError, match=str(next(iter(wrong.values())))):
            bulk.BulkDetector(predict, **wrong)


# Writes a batch, then dies as by `kill -9` in the middle of a line of the next.
KILLED = """
import os, sys
from sparse_detr import bulk, results
from sparse_detr.cli import predict_many
write = results.ResultsWriter.write
def dying(self, records):
    write(self, records)
    file = self._files["part"]
    if file.tell() > 1:
        file.write(b'{"file_name": "' + os.fsencode(sys.argv[4]))
        file.flush()
        os.kill(os.getpid(), 9)
results.ResultsWriter.write = dying
predict_many.main(sys.argv[1:])
"""


def test_killed_in_the_middle_of_a_line_it_goes_on_where_it_was(run_folder, images, alone, tmp_path):
    output = tmp_path / "found"
    arguments = command(run_folder, images, output, "--batch-size", "3", "--max-padding", "0.3")
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "projects")}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, *arguments], env=settings)
    assert done.returncode == -9
    left = (output / "part-00000.jsonl").read_bytes()
    assert not left.endswith(b"\n") and 0 < left.count(b"\n") < 8
    assert len(list(results.read_results(output))) == left.count(b"\n")  # the torn line is none
    assert predict_many.main(arguments) == 3
    check(results.read_results(output), alone)
    kept = left[: left.rindex(b"\n") + 1]
    assert (output / "part-00000.jsonl").read_bytes().startswith(kept)


def settings(**changed):
    return {"box_format": "xyxy", "class_names": ["cat"], "category_ids": [1], "model": "x", **changed}


def test_a_long_torn_line_is_cut_off_and_an_unreadable_one_named(tmp_path):
    for torn in (b'{"file_name": "' + b"x" * 200000, b"\0" * 65536, b'{"a": 1}'):
        part = tmp_path / "part-00000.jsonl"
        for whole in (b"", b'{"file_name": "a"}\n'):
            part.write_bytes(whole + torn)
            results.ResultsWriter(tmp_path, settings()).close()
            assert part.read_bytes() == whole
    part.write_bytes(b'{"file_name": "a"}\n{"file\n')
    with pytest.raises(UserError, match=r"part-00000.jsonl, line 2, is no JSON: remove the line"):
        results.ResultsWriter(tmp_path, settings()).done()


def test_a_folder_takes_the_lines_of_one_run_only(tmp_path):
    first = results.ResultsWriter(tmp_path, settings())
    with pytest.raises(UserError, match="another process is writing .*part-00000.jsonl"):
        results.ResultsWriter(tmp_path, settings())
    first.close()
    results.ResultsWriter(tmp_path, settings(model="moved")).close()
    with pytest.raises(UserError, match="box_format xyxy, now xywh.*another --output"):
        results.ResultsWriter(tmp_path, settings(box_format="xywh"))
    with pytest.raises(UserError, match="is no folder of results"):
        next(results.read_results(tmp_path / "nothing"))


@pytest.mark.parametrize("processes", [(3, 2, 1), (1, 3)])
def test_parts_are_complete_whatever_the_number_of_processes(
    run_folder, images, alone, tmp_path, monkeypatch, processes
):
    """Each start with another number, and all but the last ended early: as torchrun's variables say it."""
    output = tmp_path / "found"
    variables = {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    detect = bulk.BulkDetector.__call__
    for start, count in enumerate(processes):
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(count))
            last = start == len(processes) - 1
            short = detect if last else lambda self, names: list(detect(self, names))[:1]
            monkeypatch.setattr(bulk.BulkDetector, "__call__", short)
            predict_many.main(command(run_folder, images, output, "--batch-size", "1"))
            with open(output / f"part-{rank:05d}.jsonl", "ab") as file:
                file.write(b'{"torn' * (not last))
        assert len(list(results.read_results(output))) < 8 or last
    check(results.read_results(output), alone)
    assert len(list(results.read_errors(output))) == 1
    assert len(list(output.glob("part-*"))) == max(processes)
    assert all(path.read_bytes().endswith((b"}\n", b"")) for path in output.glob("*.jsonl"))


@pytest.mark.slow
def test_torchrun_starts_several(run_folder, images, alone, tmp_path):
    output = tmp_path / "found"
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    words = command(run_folder, images, output)
    words[0] = (
        "--config-file"  # --run would be an abbreviation of one of torchrun's flags, before Python 3.12
    )
    tool = [str(ROOT / "tools" / "predict.py"), *words]
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", *tool],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2: " in done.stdout and "process 2 of 2: " in done.stdout
    check(results.read_results(output), alone)
    for process in range(2):  # each wrote its share, which may be none of so few
        lines = (output / f"part-{process:05d}.jsonl").read_text().splitlines()
        names = {json.loads(line)["file_name"] for line in lines}
        assert names == {name for name in alone if bulk.in_share(name, process, 2)}


def test_a_batch_that_needs_too_much_memory_is_halved(run_folder, images, alone, monkeypatch):
    predict = sparse_detr.Predictor(str(run_folder), device="cpu", threshold=0.05)
    detect = bulk.BulkDetector(predict, batch_size=4, max_padding=0.9)
    model, seen = predict.detect, []

    def small(entries):
        seen.append(len(entries))
        if len(entries) > 1 or entries[0]["file_name"].endswith("/2.png"):
            raise torch.OutOfMemoryError("CUDA out of memory.\nand more")
        return model(entries)

    monkeypatch.setattr(predict, "detect", small)
    records = [r for batch in detect(sorted(alone)) for r in batch]
    (error,) = [r for r in records if "error" in r]
    assert error == {"file_name": str(images / "2.png"), "error": "CUDA out of memory."}
    assert {1, 2, 4} <= set(seen)
    check((r for r in records if r is not error), {k: v for k, v in alone.items() if k != error["file_name"]})


def test_inputs_are_folders_globs_and_lists_and_each_file_counts_once(images, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{images}/./0.png\n\n{images}/is_not_there.png\n")
    found = bulk.find_files([str(listed), str(images), f"{images}/**/*.png"])
    assert found[:2] == [str(images / "0.png"), str(images / "is_not_there.png")]
    assert len(found) == 10 and str(images / "more" / "1.png") in found
    for nothing in ("nowhere/*.png", str(tmp_path / "empty.txt")):
        (tmp_path / "empty.txt").touch()
        with pytest.raises(UserError, match="no such file or glob"):
            bulk.find_files([nothing])
    shares = [{name for name in found if bulk.in_share(name, p, 3)} for p in range(3)]
    assert set.union(*shares) == set(found) and sum(map(len, shares)) == len(found)


def test_coco_results_of_both_box_formats(run_folder, images, alone, tmp_path):
    from pycocotools.coco import COCO

    truth = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)]}
    for index, path in enumerate(sorted(alone), 100):
        name = str(Path(path).relative_to(images))
        truth["images"].append({"id": index, "file_name": name, "width": 1, "height": 1})
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    boxes = []
    for box_format in results.BOX_FORMATS:
        coco = tmp_path / f"{box_format}.json"
        more = ["--box-format", box_format, "--coco", str(coco), "--coco-ids", str(tmp_path / "truth.json")]
        predict_many.main(command(run_folder, images, tmp_path / box_format, *more))
        written = json.loads(coco.read_text())
        assert [i["id"] for i in sorted(written["images"], key=lambda i: i["id"])] == list(range(100, 108))
        loaded = COCO(str(tmp_path / "truth.json")).loadRes(written["annotations"])
        expected = alone[sorted(alone)[3]]
        found = loaded.loadAnns(loaded.getAnnIds(103))
        assert [f["score"] for f in found] == pytest.approx(expected.scores.tolist(), abs=2e-5)
        x0, y0, x1, y1 = expected.pred_boxes.tensor[0].tolist()
        assert found[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=0.03)
        boxes.append([f["bbox"] for f in found])
    np.testing.assert_allclose(*boxes, atol=0.021)
    results.write_coco(tmp_path / "xywh", tmp_path / "counted.json")
    assert json.loads((tmp_path / "counted.json").read_text())["images"][-1]["id"] == 8
    truth["images"].pop()
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(UserError, match=r"7.png is no image of the annotation file"):
        results.write_coco(tmp_path / "xywh", tmp_path / "counted.json", tmp_path / "truth.json")


def test_parquet(run_folder, images, alone, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    predict_many.main(
        command(run_folder, images, tmp_path / "found", "--parquet", str(tmp_path / "found.parquet"))
    )
    check(parquet.read_table(tmp_path / "found.parquet").to_pylist(), alone)
    results.write_parquet(tmp_path / "found", tmp_path / "groups.parquet", rows=3)
    check(parquet.read_table(tmp_path / "groups.parquet").to_pylist(), alone)


@pytest.mark.slow
def test_the_recipe_for_ray(run_folder, images, alone, tmp_path, monkeypatch):
    """The code of docs/predict.md on a local Ray with two workers: the detections of one process."""
    ray = pytest.importorskip("ray")
    parquet = pytest.importorskip("pyarrow.parquet")
    page = (ROOT / "docs" / "predict.md").read_text()
    (code,) = [c for c in re.findall("```python\n(.*?)```", page, re.S) if "import ray" in c]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "my_run").symlink_to(run_folder)
    (tmp_path / "photos").symlink_to(images)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        exec(code, {})
    finally:
        ray.shutdown()
    rows = [
        row for path in (tmp_path / "found").glob("*.parquet") for row in parquet.read_table(path).to_pylist()
    ]
    failed = [row for row in rows if row["error"]]
    assert [row["file_name"] for row in failed] == ["photos/broken.jpg"]
    found = [
        {**r, "file_name": str(images / r["file_name"][len("photos/") :])} for r in rows if not r["error"]
    ]
    check(found, alone)
