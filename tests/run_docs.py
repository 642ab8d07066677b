#!/usr/bin/env python
"""Run every command and every Python program of the docs, on a small copy of this checkout.

    python tests/run_docs.py                                   all pages: some minutes on a CPU
    python tests/run_docs.py docs/own_data.md --only train_net
    DETECTRON2=/path/to/checkout python tests/run_docs.py docs/detectron2_scripts.md

Commands run as they stand, one after the other, and at the end of each page its Python blocks (of a
notebook, its cells) as one program. They find what they name: configs whose models, images and runs are
tiny, data sets of a few drawn images (COCO's among them), checkpoints with random weights, a finished run
in `output/my_run`, pictures, a video. What cannot run everywhere is replaced or left out by `CHANGED`; the
report says so.
"""

import argparse
import importlib.util
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "kernels").rglob("*.md")),
    ROOT / "tests" / "parity" / "README.md",
]
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
TIME_LIMIT = 400  # seconds per command


def needs(package: str, command: str, instead: str | None = None) -> list[tuple[str, str | None, str]]:
    """The change of ``command`` where ``package`` is not installed; without ``instead`` it is left out."""
    return [] if importlib.util.find_spec(package) else [(command, instead, f"needs {package}")]


# Regular expression in a command, what stands there instead (None: it is not run), and why. All that
# fit apply, in this order.
CHANGED = [
    (r"^pip install .*", None, "downloads"),
    (r"^python .*hf://.*", None, "downloads"),
    (
        r"^(python tools/export_transformers.py).*",
        r"\1 --help",
        "transformers has no backbones as small as here: tests/engine/test_huggingface.py",
    ),
    (r"^benchmarks/gpu_check.sh --pack\b.*", None, "downloads"),
    (r"^make demo\b", "python tools/demo_quick.py", "without setting up an environment"),
    (r"^make (install|test)\b", r"make -n \1", "sets up an environment, runs the tests: only printed"),
    (
        r"^benchmarks/gpu_check.sh(?! --pack)( --dry-run)?",
        "benchmarks/gpu_check.sh --dry-run --only machine,packages,op",
        "needs a GPU; all of the rehearsal: tests/test_gpu_check.py",
    ),
    (r"^(python benchmarks/learning.py).*", r"\1 --help", "a dozen trainings: tests/test_learning.py"),
    (r"^(python benchmarks/cuda_report.py).*", r"\1 --help", "needs nvcc and minutes"),
    *needs("torchao", r"^(python tools/quantize.py).*", r"\1 --help"),
    *needs("torchao", r" --int8\b", ""),
    *needs("timm", r"_timm\b|_timm_"),
    *needs("transformers", r"\bmake_rt_detr\b|benchmarks/peers\.py"),
    *([] if "DETECTRON2" in os.environ else [(r"\$DETECTRON2/", None, "needs a checkout: DETECTRON2=...")]),
    (r"\btrain\.(max_iter|eval_period)=\d+", r"train.\1=2", "two iterations"),
    (r"train.wandb.enabled=true", "train.wandb.enabled=false", "needs an account"),
    (r"(?<=--num-gpus )8|(?<=--nproc-per-node )8", "2", "two processes instead of eight"),
    (r"\bnode0\b", "127.0.0.1", "both machines are this one"),
    (r"\b29500\b", "{port}", "a free port"),
    (
        r"(?<=--config-file )\.\.\.",
        "configs/deformable_detr/deformable_detr_r50_two_stage_50ep.py",
        "left open in the text",
    ),
    (r"(?<=parity.py tests/parity)", "/cases/sparse_detr", "all cases: tests/parity/test_parity.py"),
    (r"(?<=benchmark.py )op\b", "op --scale 0.08 --rounds 2", "small maps"),
    (r"(?<=benchmark.py )(model\b.*)", r"\1 --size 96x128 --rounds 2", "a small image"),
]

# Appended to the copy of every config.
SMALL = """

from tests.modeling.tiny import shrink as _shrink
_timm = {k: model[k] for k in ("backbone", "in_features")}, model.neck.in_channels
_shrink(model, num_classes=model.num_classes)
if _timm[0]["backbone"].get("name") == "resnet18":  # the default of timm's, for which commands name others
    model.update(_timm[0])
    model.neck.in_channels = _timm[1]
    train.init_checkpoint = ""
dataloader.train.mapper.augmentations.update(
    short_edges=[64, 80], max_size=128, pre_crop_short_edges=[72], crop_size=[48, 64])
dataloader.test.mapper.augmentations.update(short_edge=64, max_size=128)
dataloader.train.num_workers = dataloader.test.num_workers = 0
if "root" in dataloader.train.dataset:
    dataloader.train.dataset.num_images, dataloader.test.dataset.num_images = 16, 4
train.max_iter, train.log_period = 2, 1
"""
SMALL_YACS = {
    "IMS_PER_BATCH": "2",
    "MAX_ITER": "2",
    "STEPS": "()",
    "MIN_SIZE_TRAIN": "[64]",
    "MODEL": "\n  DEVICE: cpu",
}

# Packages that a Python block may need, and the module whose import tells that it does.
OPTIONAL = {
    **{name: name for name in ("sahi", "ray", "supervision", "fiftyone", "openvino", "torchmetrics")},
    "torchao": r"sparse_detr\.quantize",
}

# Checkpoints that the docs name, and the config whose model they hold.
CHECKPOINTS = {
    "cache/sparse_detr/sparse_detr_r50_30.pth": "sparse_detr/sparse_detr_r50_30_50ep",  # "published"
    "cache/sparse_detr/sparse_detr_r50_scrl_30.pth": "sparse_detr/sparse_detr_r50_30_50ep",
    "dino.pth": "dino/dino_r50_4scale_12ep",
    "focus_detr_36ep.pth": "focus_detr/focus_detr_r50_4scale_36ep",
    "model.pth": "deformable_detr/deformable_detr_r50_two_stage_50ep",
    "r50_deformable_detr_plus_iterative_bbox_refinement_plus_plus_two_stage.pth": "deformable_detr/deformable_detr_r50_two_stage_50ep",
    "sparse_detr_r50_30.pth": "sparse_detr/sparse_detr_r50_30_50ep",
}

SRUN = """#!/usr/bin/env bash
# Two tasks on this machine, with the variables that SLURM gives a job step.
export SLURM_JOB_ID=$$ SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!
"""


def code(page: Path) -> Iterator[tuple[int, str, str]]:
    """(line, language, text) of a page's fenced blocks, and of each `python ...` in a sentence. All cells of a
    notebook are one block."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
        yield 1, "python", "\n".join(["display = print  # Jupyter's", *cells])
        return
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$|`(python [^`\n]+)`", text, re.M | re.S):
        language, block, inline = found.groups()
        line = 1 + text.count("\n", 0, found.start())
        yield (line, "bash", inline) if inline else (line + 1, language, block)


def commands(page: Path) -> Iterator[tuple[int, str]]:
    """(line, command) of a page's shell blocks; continued lines are joined, comments left out."""
    for line, language, text in code(page):
        for found in re.finditer(r"(?:.*\\\n)*.+", text if language in ("", "bash", "sh") else ""):
            command = re.sub(r"(^|\s)#.*", "", re.sub(r"\\\n\s*", "", found[0])).strip()
            if command:
                yield line + text.count("\n", 0, found.start()), command


def usable(package: str) -> bool:
    """Whether it is installed, and FiftyOne also has the MongoDB without which it makes no data set."""
    spec = importlib.util.find_spec(package)
    if spec is None or package != "fiftyone":
        return spec is not None
    own = Path(spec.origin or "").parent / "db" / "bin" / "mongod"
    return own.exists() or bool(shutil.which("mongod") or os.environ.get("FIFTYONE_DATABASE_URI"))


def program(page: Path) -> str:
    """A page's Python blocks, each on the lines where it stands in the page; without those that need one of
    ``OPTIONAL`` that is not installed (tests run SAHI's and Ray's with a stand-in)."""
    missing = [module for name, module in OPTIONAL.items() if not usable(name)]
    lines: list[str] = []
    for line, language, text in code(page):
        if language == "python" and not any(
            re.search(rf"^(from|import) {module}\b", text, re.M) for module in missing
        ):
            lines += [""] * (line - 1 - len(lines)) + text.splitlines()
    return "\n".join(lines)


class Job(NamedTuple):
    """What is run at once: a command, those of two machines, or a page's Python blocks."""

    page: Path
    line: int
    commands: list[str]  # as they are run
    runs: bool = True
    changes: list[str] = []  # why they are not as documented


def jobs(page: Path, only: str = "") -> Iterator[Job]:
    """A page's jobs in order; ``only``: a regular expression that is found in their commands."""

    def job(numbered: tuple[int, str]) -> tuple:  # of machines: the same command apart from a rank
        line, command = numbered
        return re.sub(r"-rank \d+", "", command) if "-rank " in command else line

    with socket.socket() as listener:
        listener.bind(("", 0))
        port = str(listener.getsockname()[1])
    for _, group in itertools.groupby(commands(page), job):
        lines, together = zip(*group)
        if not any(re.search(only, command) for command in together):
            continue
        changes = [change for change in CHANGED if re.search(change[0], together[0])]
        runs = all(replacement is not None for _, replacement, _ in changes)
        for pattern, replacement, _ in changes if runs else ():
            new = replacement.replace("{port}", port)
            together = [re.sub(pattern, new, command) for command in together]
        yield Job(page, lines[0], list(together), runs, [reason for _, _, reason in changes])
    if program(page) and re.search(only, "python blocks"):
        yield Job(page, 1, [f"python {page.relative_to(ROOT)}.py"])


def prepare(folder: Path) -> None:
    """Makes the small checkout and everything that the docs name beside it."""
    names = (
        "benchmarks",
        "configs",
        "docs",
        "kernels",
        "projects",
        "requirements",
        "tests",
        "tools",
        "Makefile",
        "README.md",
        "pyproject.toml",
        "setup.py",
        "train_net.py",
    )
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    for page in [*PAGES, *NOTEBOOKS]:
        (folder / f"{page.relative_to(ROOT)}.py").write_text(program(page))
    (folder / "bin").mkdir()
    (folder / "bin" / "srun").write_text(SRUN)
    (folder / "bin" / "srun").chmod(0o755)

    sys.path[:0] = [str(ROOT), str(ROOT / "projects")]
    from sparse_detr.config import list_configs

    for name in list_configs():
        with open(folder / "configs" / f"{name}.py", "a") as file:
            file.write(SMALL)
    for yacs in (folder / "configs" / "yacs").glob("*.yaml"):
        text = yacs.read_text()
        for key, value in SMALL_YACS.items():
            text = re.sub(rf"\b{key}:.*", f"{key}: {value}", text)
        yacs.write_text(text)
    draw_data(folder)
    write_weights(folder)
    result, _, output = run(
        [
            "python train_net.py --config-file custom/sparse_detr_r50 "
            "data.train_json=train.json data.train_images=train data.val_json=val.json "
            "data.val_images=val train.output_dir=my_run"
        ],
        folder,
    )
    assert result == "ok", output


def draw_data(folder: Path) -> None:
    """`train.json`, `val.json` and their images, the same as COCO 2017, some as JPEG and a film."""
    import cv2
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    from sparse_detr.data import generate_shapes

    coco = folder / "datasets" / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split, count in (("train", 16), ("val", 4)):
        content = json.loads(Path(generate_shapes(str(folder), split, num_images=count)).read_text())
        things = [{k: c[k] for k in ("id", "name")} for c in COCO_CATEGORIES if c["isthing"]]
        annotations = coco / "annotations" / f"instances_{split}2017.json"
        annotations.write_text(json.dumps({**content, "categories": things}))
        (coco / f"{split}2017").symlink_to(folder / split)

    draw_other_formats(folder)
    (folder / "photos").mkdir()
    film = cv2.VideoWriter(str(folder / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (160, 128))
    for path in sorted((folder / "val").iterdir()):
        image = cv2.imread(str(path))
        film.write(cv2.resize(image, (160, 128)))
        cv2.imwrite(str(folder / "photos" / f"{path.stem}.jpg"), image)
    film.release()
    cv2.imwrite(str(folder / "image.jpg"), image)
    (folder / "list.txt").write_text("image.jpg\n")


def draw_other_formats(folder: Path) -> None:
    """The same images as `my_set/data.yaml` (YOLO) and, discs as cars and stars as persons, Pascal VOC."""
    classes = json.loads((folder / "train.json").read_text())["categories"]
    names = [c["name"] for c in classes]
    yolo, voc = folder / "my_set", folder / "VOCdevkit" / "VOC2012"
    for part in ("Annotations", "ImageSets/Main"):
        (voc / part).mkdir(parents=True)
    (voc / "JPEGImages").symlink_to(folder / "photos")
    yolo.mkdir()
    (yolo / "data.yaml").write_text(f"train: train/images\nval: val/images\nnames: {names}\n")
    for split in ("train", "val"):
        content = json.loads((folder / f"{split}.json").read_text())
        (yolo / split / "labels").mkdir(parents=True)
        (yolo / split / "images").symlink_to(folder / split)
        for image in content["images"]:
            width, height = image["width"], image["height"]
            boxes = [
                (a["category_id"] - 1, *a["bbox"])
                for a in content["annotations"]
                if a["image_id"] == image["id"]
            ]
            stem = Path(image["file_name"]).stem
            (yolo / split / "labels" / f"{stem}.txt").write_text(
                "".join(
                    f"{c} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
                    for c, x, y, w, h in boxes
                )
            )
            if split == "val":  # the photos
                objects = "".join(
                    f"<object><name>{dict(disc='car', star='person').get(names[c], names[c])}</name><bndbox>"
                    f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
                    "</bndbox></object>"
                    for c, x, y, w, h in boxes
                )
                (voc / "Annotations" / f"{stem}.xml").write_text(
                    f"<annotation><filename>{stem}.jpg</filename><size><width>{width}</width>"
                    f"<height>{height}</height></size>{objects}</annotation>"
                )
    stems = sorted(path.stem for path in (voc / "Annotations").iterdir())
    for split in ("train", "val"):
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))


def write_weights(folder: Path) -> None:
    """The checkpoints, and the backbone where detectron2 would keep it after its download."""
    import numpy as np
    import torch
    from detectron2.config import instantiate

    from sparse_detr.config import load_config

    for file, name in CHECKPOINTS.items():
        model = instantiate(load_config(str(folder / "configs" / f"{name}.py")).model)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict()}, folder / file)
    backbone = {name: weight.numpy() for name, weight in model.backbone.state_dict().items()}
    for kind in ("torchvision", "MSRA"):
        cached = folder / "cache" / "detectron2" / "ImageNetPretrained" / kind / "R-50.pkl"
        cached.parent.mkdir(parents=True)
        cached.write_bytes(pickle.dumps({"model": backbone, "__author__": "random"}))
    shutil.copy(cached, folder)
    np.savez(folder / "backbone.npz", **backbone)


def run(together: list[str], folder: Path) -> tuple[str, float, str]:
    """Runs commands at the same time: "ok" or what went wrong, seconds, and their output."""
    path = [str(folder / "bin"), os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": f"{folder / 'projects'}{os.pathsep}{folder}",
        "FVCORE_CACHE": str(folder / "cache"),
        "DETECTRON2_DATASETS": str(folder / "datasets"),
    }
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        started = [
            subprocess.Popen(
                ["bash", "-c", command],
                cwd=folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            for command in together
        ]
        result = "ok"
        for process in started:
            try:
                if process.wait(max(0.0, begin + TIME_LIMIT - time.perf_counter())):
                    result = f"exit status {process.returncode}"
            except subprocess.TimeoutExpired:
                result = f"not done after {TIME_LIMIT} s"
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        output.seek(0)
        return result, time.perf_counter() - begin, output.read()


def run_all(todo: list[Job], folder: Path) -> int:
    """Runs the jobs in ``folder``, tells how it goes, and returns the number of failures."""
    folder.mkdir(exist_ok=True)
    print(f"preparing {folder}", flush=True)
    prepare(folder)
    failed, page, begin = 0, None, time.perf_counter()
    for number, job in enumerate(todo, 1):
        if page != job.page:  # every page stands for itself
            page = job.page
            shutil.rmtree(folder / "output", ignore_errors=True)
            shutil.copytree(folder / "my_run", folder / "output" / "my_run")
        shown = "\n    ".join(job.commands)
        print(f"[{number}/{len(todo)}] {page.relative_to(ROOT)}:{job.line}\n    {shown}", flush=True)
        if not job.runs:
            print("  not run", flush=True)
            continue
        result, seconds, output = run(job.commands, folder)
        if old := re.search(r"rror: (/.+) holds a run already", output):
            print("  again, without the run that the page shows before it", flush=True)
            shutil.rmtree(old[1])
            result, seconds, output = run(job.commands, folder)
        print(f"  {result}, {seconds:.1f} s", flush=True)
        if result != "ok":
            failed += 1
            print("    | " + "\n    | ".join(output.rstrip().splitlines()[-25:]), flush=True)

    print("\nnot run, or run otherwise than documented:")
    for page, line, together, runs, changes in todo:
        if changes:
            state = "run as " if runs else "not run"
            print(f"{page.relative_to(ROOT)}:{line}  {'; '.join(changes)}\n  {state}  {together[0]}")
    ran = sum(job.runs for job in todo)
    print(
        f"\n{ran - failed} passed, {failed} failed, {len(todo) - ran} not run, "
        f"{time.perf_counter() - begin:.0f} s"
    )
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="(default: all)")
    parser.add_argument("--only", default="", metavar="REGEX", help="commands in which it is found")
    parser.add_argument("--keep", metavar="DIR", help="work in this new folder and do not delete it")
    args = parser.parse_args()
    pages = [Path(page).resolve() for page in args.pages] or [*PAGES, *NOTEBOOKS]
    folder = Path(args.keep or tempfile.mkdtemp(prefix="run_docs_")).resolve()
    try:
        return run_all([job for page in pages for job in jobs(page, args.only)], folder)
    finally:
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
