"""Build the operators that this machine can use, ahead of time: `python -m sparse_detr.kernels`."""

import argparse
import logging
import sys

import torch

from . import build


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say what would be used, build nothing")
    args = parser.parse_args()
    wanted = ["cpu"]
    if torch.cuda.is_available() or build.mode() == "cuda":
        wanted.append("cuda")
    ok = True
    for device_type in wanted:
        found = build.status(device_type, load=not args.check)
        print(f"{device_type}: {found.backend}: {found.reason}")
        if found.cache_dir:
            print(f"  {found.cache_dir}")
        ok = ok and found.backend != "reference"
    return 0 if ok else 1


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    sys.exit(main())
