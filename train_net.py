#!/usr/bin/env python
"""Train or evaluate a detector from a LazyConfig.

    python train_net.py --config-file configs/deformable_detr/....py --num-gpus 8
    python train_net.py --config-file ... train.epochs=12 optimizer.lr=1e-4   # overrides
    python train_net.py --config-file ... --resume                            # continue a run
    python train_net.py --config-file ... --eval-only train.init_checkpoint=model.pth
    torchrun --nproc-per-node 8 train_net.py --config-file ...                # or srun

The flags are detectron2's. ``--config-file`` takes a file, the name of a shipped
config, or the output folder of a run.
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
from sparse_detr.errors import told_in_one_line  # noqa: E402


def main(args: argparse.Namespace) -> dict:
    """Runs one process; returns COCOEvaluator's results in the main process."""
    cfg = config.resolve_config(args.config_file, args.opts)
    engine.setup(cfg, args)
    if args.eval_only:  # the run's weights, unless others are named here
        named = any(word.lstrip("+").startswith("train.init_checkpoint=") for word in args.opts)
        return engine.evaluate(cfg, resume=args.resume or not named)
    return engine.train(cfg, resume=args.resume)


def arguments(argv: list[str]) -> argparse.Namespace:
    """detectron2's, but flags may also follow the overrides: argparse would take them for some.

    The default port is a free one: detectron2's is the same for all runs of a user.
    """
    flags, overrides = [], []
    for before, word in zip(["", *argv], argv):
        is_override = before != "--config-file" and re.match(r"\+{0,2}[A-Za-z_][\w.]*=", word)
        (overrides if is_override else flags).append(word)
    parser = default_argument_parser(epilog=__doc__)
    args = parser.parse_args([*flags, *overrides])
    if args.num_machines == 1 and args.dist_url == parser.get_default("dist_url"):
        args.dist_url = "auto"
    return args


if __name__ == "__main__":
    with told_in_one_line():
        engine.launch(main, arguments(sys.argv[1:]))
