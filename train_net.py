#!/usr/bin/env python
"""Train or evaluate a detector from a LazyConfig.

    python train_net.py --config-file configs/deformable_detr/....py --num-gpus 8
    python train_net.py --config-file ... train.epochs=12 optimizer.lr=1e-4   # overrides
    python train_net.py --config-file ... --resume                            # continue a run
    python train_net.py --config-file ... --eval-only train.init_checkpoint=model.pth
    torchrun --nproc-per-node 8 train_net.py --config-file ...                # or srun

The flags are detectron2's. ``--config-file`` takes a file or the name of a shipped config.
"""

import argparse
import importlib.util
import re
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=r"`torch\.jit\.")  # detectron2's import
if importlib.util.find_spec("sparse_detr") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent / "projects"))

from detectron2.engine import default_argument_parser  # noqa: E402

from sparse_detr import config, engine  # noqa: E402


def main(args: argparse.Namespace) -> dict:
    """Runs one process; returns COCOEvaluator's results in the main process."""
    args.config_file = config.config_path(args.config_file)
    cfg = config.load_config(args.config_file, args.opts)
    engine.setup(cfg, args)
    if args.eval_only:  # the run's weights, unless others are named here
        named = any(word.lstrip("+").startswith("train.init_checkpoint=") for word in args.opts)
        return engine.evaluate(cfg, resume=args.resume or not named)
    return engine.train(cfg, resume=args.resume)


def arguments(argv: list[str]) -> argparse.Namespace:
    """detectron2's, but flags may also follow the overrides: argparse would take them for some."""
    ordered = sorted(argv, key=lambda word: re.match(r"\+{0,2}[A-Za-z_][\w.]*=", word) is not None)
    return default_argument_parser(epilog=__doc__).parse_args(ordered)


if __name__ == "__main__":
    engine.launch(main, arguments(sys.argv[1:]))
