"""Arguments that several commands share. Only the standard library is imported here: some scripts run where
nothing else is installed."""

import argparse
import os
import sys

from . import COMMANDS


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows ``description``, a command's docstring, as it stands."""
    return argparse.ArgumentParser(
        description=described(description or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def described(text: str) -> str:
    """A command's docstring; its calls are those of a checkout's script where that was called."""
    if sys.argv[0].endswith(".py"):
        for name, (_, script, _) in COMMANDS.items():
            if script and os.path.basename(script) == os.path.basename(sys.argv[0]):
                return text.replace(f"-m sparse_detr {name} ", f"{script} ").replace(
                    f"sparse-detr {name} ", f"python {script} "
                )
    return text


def image_size(text: str) -> tuple[int, int]:
    """ "800x1066" -> (800, 1066), height first."""
    height, width = (int(side) for side in text.lower().split("x"))
    return height, width


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("opts", nargs="*", help="config overrides, path.key=value")


def add_opts(parser: argparse.ArgumentParser) -> None:
    """The same as a flag, where the command has lists of other things."""
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY=VALUE", help="config overrides, path.key=value"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help='"cuda", "cpu" (default: the GPU if any)')


def add_model(parser: argparse.ArgumentParser) -> None:
    """A run's model, or a config's with a checkpoint."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="output folder of a run; its last checkpoint")
    source.add_argument("--config-file", metavar="FILE", help="a config or a shipped one's name")
    parser.add_argument("--weights", default="", metavar="FILE", help="a checkpoint")


def add_keep_ratio(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-ratio",
        type=float,
        metavar="RATIO",
        help="share of tokens the encoder refreshes, instead of the config's",
    )


def add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--latency-ms",
        type=float,
        metavar="MS",
        help="milliseconds an image may take, instead of a keep ratio: measured here, at the first image of "
        "each size",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        default="float32",
        help='precision: "bfloat16"; "auto": bfloat16 where the hardware has it (default: float32)',
    )
