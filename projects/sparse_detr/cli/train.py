"""Train or evaluate a detector from a LazyConfig.

    sparse-detr train --config-file dino/dino_r50_4scale_12ep --num-gpus 8
    sparse-detr train --config-file ... train.epochs=12 optimizer.lr=1e-4   # overrides
    sparse-detr train --config-file ... --resume                            # continue a run
    sparse-detr train --config-file ... --eval-only train.init_checkpoint=model.pth
    torchrun --nproc-per-node 8 -m sparse_detr train --config-file ...      # or srun

The flags are detectron2's. ``--config-file`` takes a file, the name of a shipped
config, or the output folder of a run.
"""

import argparse
import re
import sys

from detectron2.engine import default_argument_parser

from .. import config, engine
from . import flags


def run_process(args: argparse.Namespace) -> dict:
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
    words: tuple[list[str], list[str]] = [], []  # flags, overrides
    for before, word in zip(["", *argv], argv):
        is_override = before != "--config-file" and re.match(r"\+{0,2}[A-Za-z_][\w.]*=", word)
        words[bool(is_override)].append(word)
    parser = default_argument_parser(epilog=flags.described(__doc__))
    args = parser.parse_args([*words[0], *words[1]])
    if args.num_machines == 1 and args.dist_url == parser.get_default("dist_url"):
        args.dist_url = "auto"
    return args


def main() -> None:
    engine.launch(run_process, arguments(sys.argv[1:]))
