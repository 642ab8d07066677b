"""Detect objects in images, folders, globs and videos; write pictures and COCO-style JSON.

    sparse-detr predict --run output/my_run --input photos/ --output pictures
    sparse-detr predict --run output/my_run --input 'photos/*.jpg' more.png --json found.json
    sparse-detr predict --config-file dino/dino_r50_4scale_12ep --weights model.pth --input a.jpg
    sparse-detr predict --run output/my_run --video-input film.mp4 --output pictures --latency-ms 80

The flags are those of detectron2's demo.py. The JSON has the sections of a COCO annotation file, with
a `score` in each annotation; the list under "annotations" is what COCO evaluators read as results.
"""

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils.logger import setup_logger
from PIL import Image
from tqdm import tqdm

from ..data.image import EXTENSIONS, ImageError, read_image
from ..errors import UserError
from ..predictor import Predictor
from ..visualize import draw_detections, readable_scale
from . import flags


class Results:
    """Detections of many images as the sections of a COCO annotation file.

    Attributes:
        best: the highest score of all, below the threshold too, and its image.
    """

    def __init__(self, predict: Predictor, threshold: float) -> None:
        self.predict, self.threshold = predict, threshold
        self.best = (0.0, "")
        classes = zip(predict.category_ids, predict.class_names)
        self.sections = {
            "images": [],
            "categories": [{"id": number, "name": name} for number, name in classes],
            "annotations": [],
        }

    def add(self, file_name: str, image: np.ndarray, draw: bool) -> np.ndarray | None:
        """Detects in ``image``, BGR; draws on it what is found, RGB, if asked."""
        instances = self.predict(image)["instances"].to("cpu")
        if len(instances):
            self.best = max(self.best, (float(instances.scores[0]), file_name))
        instances = instances[instances.scores >= self.threshold]
        self._note(file_name, instances)
        if not draw:
            return None
        rgb = np.ascontiguousarray(image[:, :, ::-1])
        return draw_detections(
            rgb,
            instances,
            self.predict.metadata,
            threshold=self.threshold,
            scale=readable_scale(*image.shape[:2]),
        )

    def summary(self) -> str:
        count, images = (len(self.sections[part]) for part in ("annotations", "images"))
        if count or not self.best[1]:
            return f"{count} detections of at least {self.threshold} in {images} images"
        score, name = self.best
        return (
            f"no detection of at least {self.threshold} in {images} images; the best score is {score:.3f}, "
            f"in {name}: pass a lower --threshold to see it"
        )

    def _note(self, file_name: str, instances) -> None:
        images, annotations = self.sections["images"], self.sections["annotations"]
        height, width = instances.image_size
        images.append({"id": len(images) + 1, "file_name": file_name, "height": height, "width": width})
        for found in instances_to_coco_json(instances, len(images)):
            found["category_id"] = self.predict.category_ids[found["category_id"]]
            area = found["bbox"][2] * found["bbox"][3]
            annotations.append({"id": len(annotations) + 1, **found, "area": area, "iscrowd": 0})


def find_images(inputs: list[str]) -> list[Path]:
    """The images among files, folders and globs, in order, each once.

    Raises:
        UserError: one of ``inputs`` holds no image, or two images would get the same name.
    """
    paths: dict[Path, None] = {}
    for entry in inputs:
        if Path(entry).is_dir():
            found = [p for p in sorted(Path(entry).iterdir()) if p.suffix.lower() in EXTENSIONS]
        elif Path(entry).is_file():
            found = [Path(entry)]
        else:
            found = [Path(p) for p in sorted(glob.glob(entry, recursive=True)) if Path(p).is_file()]
        if not found:
            raise UserError(
                f"--input {entry}: no such file or glob, or no image in that folder "
                f"({' '.join(sorted(EXTENSIONS))})"
            )
        paths.update(dict.fromkeys(found))
    names: dict[str, Path] = {}
    for path in paths:
        other = names.setdefault(path.name, path)
        if other != path:
            raise UserError(
                f"{other} and {path} would be written under the same name: call this once per "
                "folder, with an --output for each"
            )
    return list(paths)


def drawings(images: list[Path], video: Path | None, output: Path) -> dict[Path, Path]:
    """Where what is drawn of each input goes, in a format that PIL and OpenCV write.

    Raises:
        UserError: that is the input itself.
    """
    targets = {
        path: output / (path.name + ".png" * (path.suffix.lower() not in EXTENSIONS)) for path in images
    }
    if video is not None:
        targets[video] = output / f"{video.stem}.mp4"
    for path, target in targets.items():
        if target.resolve() == path.resolve():
            raise UserError(f"--output {output} would overwrite the input {path}: take another")
    return targets


def run_images(paths: list[Path], targets: dict[Path, Path], results: Results) -> None:
    for path in tqdm(paths, unit="image"):
        try:
            image = read_image(str(path), "BGR")
        except ImageError as error:
            tqdm.write(f"skipped {path}: {error.problem}; {error.advice}", file=sys.stderr)
            continue
        picture = results.add(path.name, image, draw=path in targets)
        if picture is not None:
            Image.fromarray(picture).save(targets[path])


def run_video(path: Path, target: Path | None, results: Results) -> None:
    """Frame by frame; the frames are named ``<video>/000000`` and so on in the results."""
    video, writer = cv2.VideoCapture(str(path)), None

    def frames() -> Iterator[np.ndarray]:
        more, frame = video.read()
        if not more:
            raise UserError(f"--video-input {path}: not a video that OpenCV can read")
        while more:
            yield frame
            more, frame = video.read()

    total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    try:
        for index, frame in enumerate(tqdm(frames(), total=max(total, 0) or None, unit="frame")):
            picture = results.add(f"{path.name}/{index:06d}", frame, draw=target is not None)
            if picture is None:
                continue
            if writer is None:
                writer = cv2.VideoWriter(
                    str(target),
                    cv2.VideoWriter.fourcc(*"mp4v"),
                    video.get(cv2.CAP_PROP_FPS) or 25.0,
                    picture.shape[1::-1],
                )
                if not writer.isOpened():
                    raise UserError(f"{target}: OpenCV cannot write a video (codec mp4v) there")
            writer.write(np.ascontiguousarray(picture[:, :, ::-1]))
    finally:
        video.release()
        if writer is not None:
            writer.release()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.parser(__doc__)
    flags.add_model(parser)
    parser.add_argument("--input", nargs="+", default=[], metavar="PATH", help="images, folders, globs")
    parser.add_argument("--video-input", metavar="FILE", help="a video (needs OpenCV)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for the pictures (default: output/pictures, or none if --json)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the detections here")
    parser.add_argument(
        "--threshold",
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score shown (default: 0.5)",
    )
    flags.add_keep_ratio(parser)
    flags.add_latency(parser)
    flags.add_dtype(parser)
    flags.add_device(parser)
    flags.add_opts(parser)
    args = parser.parse_args(arguments)
    if not args.input and not args.video_input:
        parser.error("pass images by --input, or a video by --video-input")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    images = find_images(args.input)
    video = Path(args.video_input) if args.video_input else None
    output = Path(args.output or "output/pictures") if args.output or not args.json else None
    targets = {} if output is None else drawings(images, video, output)
    if args.latency_ms is not None:
        setup_logger(name="sparse_detr")  # shows what was measured
    predict = Predictor(
        args.run or args.config_file,
        args.weights,
        overrides=args.opts,
        device=args.device,
        keep_ratio=args.keep_ratio,
        latency_ms=args.latency_ms,
        dtype=args.dtype,
    )
    for folder in filter(None, (output, args.json and Path(args.json).parent)):
        folder.mkdir(parents=True, exist_ok=True)
    results = Results(predict, args.threshold)
    # Opened before the work, written also after what interrupts it.
    with open(args.json or os.devnull, "w", encoding="utf-8") as file:
        try:
            if images:
                run_images(images, targets, results)
            if video is not None:
                run_video(video, targets.get(video), results)
        finally:
            json.dump(results.sections, file)
    print(results.summary())
    for written in filter(None, (output, args.json)):
        print(written)
