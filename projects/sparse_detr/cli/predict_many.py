"""Detect in many images, by folders, globs and lists of paths; the results survive a kill.

    sparse-detr predict-many --run output/my_run --input photos/ --output found
    sparse-detr predict-many --run output/my_run --input list.txt 'scans/**/*.jpg' --output found
    torchrun --nproc-per-node 8 -m sparse_detr predict-many --config-file output/my_run \\
        --input photos/ --output found
    sparse-detr predict-many --run output/my_run --input photos/ --output found --coco found.json

The same command again goes on where it was. --output is a folder: part-*.jsonl has one line per image,
errors-*.jsonl one per file that could not be read. Exit status: 0 if every file has a result, 3 if some
have an error instead; with several processes 0 for both, since torchrun stops the others at any other.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from ..bulk import BulkDetector, find_files, in_share, weights_digest
from ..engine.processes import started_process
from ..errors import UserError
from ..predictor import Predictor
from ..results import BOX_FORMATS, ResultsWriter, read_errors, write_coco, write_parquet
from . import flags


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = flags.parser(__doc__)
    flags.add_model(parser)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, folders (all below them), globs, lists (.txt: a path per line)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--threshold", type=float, default=0.05, metavar="SCORE", help="lowest score kept (default: 0.05)"
    )
    parser.add_argument("--box-format", choices=BOX_FORMATS, default="xyxy", help="in pixels (default: xyxy)")
    parser.add_argument("--batch-size", type=int, default=8, help="most images in a batch (default: 8)")
    parser.add_argument("--num-workers", type=int, default=4, help="processes that read (default: 4)")
    parser.add_argument(
        "--max-padding",
        type=float,
        metavar="SHARE",
        help="of a batch that may be padding (default: 0.1 for models with exact_sizes and pad_features, "
        "else 0)",
    )
    parser.add_argument("--coco", metavar="FILE", help="at the end, write a COCO JSON of all results, too")
    parser.add_argument(
        "--coco-ids", metavar="FILE", help="COCO annotations that give --coco its image ids, by file name"
    )
    parser.add_argument("--parquet", metavar="FILE", help="at the end, write a Parquet file, too (pyarrow)")
    flags.add_keep_ratio(parser)
    flags.add_dtype(parser)
    flags.add_device(parser)
    flags.add_opts(parser)
    args = parser.parse_args(arguments)
    if args.coco_ids and not args.coco:
        parser.error("--coco-ids belongs to --coco")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see this module's docstring. Returns its exit status."""
    args = parse(arguments)
    started = started_process(os.environ) or {}
    process, processes = int(started.get("RANK", 0)), int(started.get("WORLD_SIZE", 1))
    if processes > 1 and (args.coco or args.parquet):
        raise UserError(
            "--coco and --parquet read what all processes wrote: pass them to the same command, without "
            "torchrun, when these are done"
        )
    files = [name for name in find_files(args.input) if in_share(name, process, processes)]
    predict = Predictor(
        args.run or args.config_file,
        args.weights,
        overrides=args.opts,
        device=_device(args.device, int(started.get("LOCAL_RANK", 0))),
        threshold=args.threshold,
        keep_ratio=args.keep_ratio,
        dtype=args.dtype,
    )
    detect = BulkDetector(
        predict,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        max_padding=args.max_padding,
        box_format=args.box_format,
    )
    settings = {
        "model": args.weights or args.run or args.config_file,
        "weights": weights_digest(predict.model),
        "overrides": args.opts,
        "keep_ratio": args.keep_ratio,
        "dtype": str(predict.dtype),
        "threshold": args.threshold,
        "box_format": args.box_format,
        "class_names": predict.class_names,
        "category_ids": predict.category_ids,
    }
    writer = ResultsWriter(args.output, settings, process, processes)
    _run(detect, files, writer, process, processes)
    if args.coco:
        write_coco(args.output, args.coco, args.coco_ids)
    if args.parquet:
        write_parquet(args.output, args.parquet)
    errors = {record["file_name"] for record in read_errors(args.output)}.intersection(files)
    if errors:
        print(f"{len(errors)} files have no result, see {args.output}/errors-*.jsonl")
    return 3 if errors and processes == 1 else 0


def _run(
    detect: BulkDetector, files: Sequence[str], writer: ResultsWriter, process: int, processes: int
) -> None:
    """Detects in the files that have no line yet, and says what came of it."""
    done = writer.done()
    todo = [name for name in files if name not in done]
    begin, found = time.perf_counter(), 0
    bar = tqdm(
        total=len(files),
        initial=len(files) - len(todo),
        unit="image",
        disable=process > 0,
        mininterval=0.1 if sys.stderr.isatty() else 60,  # a line each in a log
    )
    try:
        for records in detect(todo):
            writer.write(records)
            bar.update(len(records))
            found += sum(len(record.get("scores", ())) for record in records)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where this one was") from None
    finally:
        bar.close()
        writer.close()
    seconds = time.perf_counter() - begin
    print(
        f"process {process + 1} of {processes}: "
        * (processes > 1)
        + f"{len(todo)} images in {seconds:.1f} s ({len(todo) / max(seconds, 1e-9):.1f} per second), "
        f"{found} detections; {len(files) - len(todo)} images were done before"
    )


def _device(name: str, local_rank: int) -> str:
    """Of the processes of a machine, each its own GPU."""
    if name == "auto" and torch.cuda.is_available():
        return f"cuda:{local_rank % torch.cuda.device_count()}"
    return name
