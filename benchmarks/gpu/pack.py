"""Collects what a machine without a package index lacks, and makes it importable there.

python benchmarks/gpu/pack.py FOLDER [OPTIONS]          collect from this environment, into FOLDER
python benchmarks/gpu/pack.py --use FOLDER/site TARGET   link into TARGET what is not installed here

Pure-Python packages are copied from this environment, so the copy is of versions that work together.
pycocotools has compiled code: its wheel for PYTHON_VERSION (3.12) is downloaded. Of detectron2 the
Python part is enough. FOLDER/peers receives sources of other implementations, to compare with.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import published

# Distribution: its top-level names.
PURE = {
    "detectron2": ["detectron2"],
    "fvcore": ["fvcore"],
    "iopath": ["iopath"],
    "antlr4-python3-runtime": ["antlr4"],
    "omegaconf": ["omegaconf"],
    "hydra-core": ["hydra"],
    "yacs": ["yacs"],
    "portalocker": ["portalocker"],
    "tabulate": ["tabulate"],
    "termcolor": ["termcolor"],
    "cloudpickle": ["cloudpickle"],
    "pytest": ["pytest", "_pytest"],
    "pluggy": ["pluggy"],
    "iniconfig": ["iniconfig"],
    "pygments": ["pygments"],
    "packaging": ["packaging"],
}
COMPILED = ["pycocotools==2.0.11"]
PLATFORMS = [
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
PEERS = ["torch-ms-deform-attn==0.1.1"]
PURE_PEERS = ["deformops==3.0.1"]  # wheels without compiled code; Triton is torch's


def copy_distribution(name: str, tops: list[str], site: Path) -> str:
    """Its modules and metadata, without compiled code and caches. Returns the version."""
    for top in tops:
        origin = Path(importlib.util.find_spec(top).origin)
        if origin.name == "__init__.py":
            ignore = shutil.ignore_patterns("*.so", "__pycache__", "csrc")
            shutil.copytree(origin.parent, site / top, ignore=ignore, dirs_exist_ok=True)
        else:
            shutil.copy(origin, site / origin.name)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # from a source tree
        return "(no metadata)"
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return version


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True)


PHOTOS = ["train.json", "train", "val.json", "val", "backbone.npz"]


def copy_photos(source: Path, target: Path) -> None:
    """A data set in COCO's form and a backbone's weights, to train with there."""
    target.mkdir(parents=True)
    for name in PHOTOS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            shutil.copy(source / name, target / name)


def collect(folder: Path, photos: Path | None, ops: Path | None, without: list[str]) -> None:
    missing = [name for name in PHOTOS if photos is not None and not (photos / name).exists()]
    if missing:
        raise SystemExit(f"--photos {photos} has no {', '.join(missing)}")
    site, peers = folder / "site", folder / "peers"
    shutil.rmtree(folder, ignore_errors=True)
    site.mkdir(parents=True)
    peers.mkdir()
    for name, tops in PURE.items():
        if name in without:
            continue
        print(f"{name} {copy_distribution(name, tops, site)}")
    version = os.environ.get("PYTHON_VERSION", "3.12")
    with tempfile.TemporaryDirectory() as scratch:
        platforms = [x for p in PLATFORMS for x in ("--platform", p)]
        pip(
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--implementation",
            "cp",
            "--python-version",
            version,
            *platforms,
            "-d",
            scratch,
            *COMPILED,
        )
        for wheel in sorted(Path(scratch).glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(site)
            print(wheel.name)
    for peer in PURE_PEERS:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                only = ("--no-deps", "--only-binary=:all:", "--python-version", version)
                pip("download", *only, "-d", scratch, peer)
            except subprocess.CalledProcessError:
                print(f"{peer}: could not be downloaded, the comparison goes without it")
                continue
            for wheel in Path(scratch).glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(site)
                print(wheel.name)
    for peer in PEERS:
        try:
            pip("download", "--no-deps", "--no-binary=:all:", "--no-build-isolation", "-d", str(peers), peer)
            print(f"{peer}, to build there")
        except subprocess.CalledProcessError:
            print(f"{peer}: could not be downloaded, the comparison goes without it")
    if ops is not None:
        published.pack(ops, peers / "published")
    if photos is not None:
        copy_photos(photos, folder / "photos")
    size = sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


def use(site: Path, target: Path) -> int:
    target.mkdir(parents=True, exist_ok=True)
    if not site.is_dir():
        print(f"nothing carried along ({site} does not exist): what is installed has to do")
        return 77
    used = []
    for entry in sorted(site.iterdir()):
        module = entry.name.split(".")[0]
        if entry.suffix == ".dist-info":
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                importlib.metadata.version(entry.stem.rpartition("-")[0].replace("_", "-"))
                continue  # installed here
            (target / entry.name).symlink_to(entry.resolve())
        elif importlib.util.find_spec(module) is None:
            (target / entry.name).symlink_to(entry.resolve())
            used.append(module)
    print("carried along and used:", ", ".join(used) or "nothing, all is installed")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--use", action="store_true")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--photos", type=Path, metavar="DIR", help=f"holds {', '.join(PHOTOS)}")
    parser.add_argument(
        "--published", type=Path, metavar="OPS", help="models/ops of Deformable DETR's repository"
    )
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", choices=PURE)
    args = parser.parse_args()
    if args.use:
        return use(*args.folders)
    collect(*args.folders, photos=args.photos, ops=args.published, without=args.without)
    return 0


if __name__ == "__main__":
    sys.exit(main())
