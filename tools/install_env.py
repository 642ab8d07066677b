"""Set up the environment: what `make install` runs.

    python tools/install_env.py [--venv .venv]

A new environment gets the tested set of packages (requirements/), detectron2 and this package in
editable mode. If the Python that runs this script has a working detectron2, the new environment is
laid over that Python's packages. There, and in an environment that this script didn't make, only
what is missing is added: nothing that is installed changes. A stamp makes the next call a no-op; an
interrupted call is continued by the next one. Standard library only.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
FILES = [REQUIREMENTS / f"{name}.txt" for name in ("runtime", "detectron2-runtime", "dev")]
IMPORT_NAMES = {
    "hydra-core": "hydra",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
}


def say(text):
    print(f"--- {text}", flush=True)


def run(*command):
    """Run a program whose output is the user's to see."""
    command = [str(part) for part in command]
    code = subprocess.call(command, stdin=subprocess.DEVNULL, env={**os.environ, "PIP_USER": "0"})
    if code:
        sys.exit(
            f"\nerror: exit code {code} from {' '.join(command)}\nIts messages are above; docs/install.md "
            "explains the common ones. Then run make install again: it continues."
        )


def pip(*arguments):
    run(sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments)


def tested_versions(version=sys.version_info):
    """The constraints file for this Python. Ends with a message if there is none."""
    file = REQUIREMENTS / f"constraints-py{version[0]}{version[1]}.txt"
    if not file.exists():
        minors = sorted(int(path.stem[-2:]) for path in REQUIREMENTS.glob("constraints-py3*.txt"))
        sys.exit(
            f"\nerror: Python 3.{minors[0]} to 3.{minors[-1]} is needed, but {sys.executable} is Python "
            f"{version[0]}.{version[1]}.\nRun: make install PYTHON=/path/to/python3.{minors[-1]}"
        )
    return file


def create(root, base):
    """Make an environment without packages.

    Args:
        base: file for the package folders of this Python, if it has a detectron2 that works. It is
            written first and says from then on that the environment was made here.
    """
    if (root / "bin" / "python").is_symlink():
        sys.exit(f"\nerror: The Python that {root} was made with is gone.\nRun: rm -rf {root}")
    if root.exists() and any(root.iterdir()) and not base.exists():
        sys.exit(f"\nerror: {root} is neither empty nor a Python environment.")
    folders = []
    if importlib.util.find_spec("detectron2"):
        warnings.simplefilter("ignore")
        try:
            import detectron2.engine
            import detectron2.evaluation  # noqa: F401

            folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
            say(f"{sys.executable} has a working detectron2: using it and its packages as they are")
        except Exception as error:
            say(f"{sys.executable} has a detectron2 that doesn't work, so it isn't used: {error}")
    base.parent.mkdir(parents=True, exist_ok=True)
    base.write_text(json.dumps(folders))
    say(f"creating {root} with {sys.executable}")
    run(sys.executable, "-m", "venv", "--without-pip", root)


def absent(modules):
    """Those of `modules` (import names) that this Python, from here on the environment's, lacks."""
    importlib.invalidate_caches()
    specs = ((name, importlib.util.find_spec(name)) for name in modules)
    # A folder without __init__.py, such as an uninstalled package leaves, has a spec without an origin.
    return [name for name, spec in specs if spec is None or spec.origin is None]


def fingerprint():
    """Changes when the environment has to be brought up to date."""
    digest = hashlib.sha256(f"{ROOT} {sys.version}".encode())
    for path in [*sorted(REQUIREMENTS.glob("*.txt")), ROOT / "setup.py", Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def lines_by_name(text):
    """{normalised name: line} of the text of a requirements file."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return {re.sub("[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower(): line for line in lines if line}


def install_tested():
    for info in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
        if not (info / "RECORD").exists():  # pip was killed over it, and would take it for whole
            shutil.rmtree(info)
    say("installing the tested set of packages (a few GB to download at the first time)")
    pip("install", "-c", tested_versions(), *(part for file in FILES for part in ("-r", file)))


def install_missing(constraints):
    wanted = {name: line for file in FILES for name, line in lines_by_name(file.read_text()).items()}
    modules = {IMPORT_NAMES.get(name, name.replace("-", "_")): name for name in wanted}
    missing = [modules[module] for module in absent(modules)]
    if not missing:
        say("all packages are there already")
        return
    say("adding only what is missing: " + ", ".join(missing))
    # Without torch nothing that is there can clash with the tested set.
    pins = lines_by_name(tested_versions().read_text()) if "torch" in missing else {}
    command = [sys.executable, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    pins.update(lines_by_name(subprocess.check_output(command, universal_newlines=True)))  # stays as it is
    constraints.write_text("\n".join(pins.values()))
    pip("install", "-c", constraints, *(wanted[name] for name in missing))


def install_detectron2(work):
    """Install the snapshot pinned in requirements/detectron2.txt.

    Its wheel is labelled for Python 3.10, but only one file in it is: the compiled `_C`, which needs
    an old torch and which detectron2 can do without. It also has a stray package `tools`. Both are
    left out.
    """
    say("installing detectron2")
    shutil.rmtree(work, ignore_errors=True)
    pip(
        *("install", "--no-deps", "--only-binary=:all:", "--python-version=3.10", "--target", work),
        *("--require-hashes", "-r", REQUIREMENTS / "detectron2.txt"),
    )
    for compiled in (work / "detectron2").glob("_C.*.so"):
        compiled.unlink()
    (record,) = work.glob("*.dist-info/RECORD")  # what `pip uninstall` removes: no other `tools`
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if not line.startswith("tools/")))
    for folder in (record.parent, work / "detectron2"):
        target = Path(sysconfig.get_path("purelib")) / folder.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(str(folder), str(target))
    shutil.rmtree(work)


def install(root, base):
    state = base.parent
    folders = json.loads(base.read_text()) if base.exists() else []
    layer = Path(sysconfig.get_path("purelib")) / "_sparse_detr_base.pth"
    if folders and not layer.exists():
        layer.write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in folders))
        for folder in folders:
            site.addsitedir(folder)
    stamp = state / "stamp"
    if stamp.is_file() and stamp.read_text() == fingerprint():
        if not absent(["torch", "detectron2", "sparse_detr"]):
            print(f"environment ready: {root}")
            return
    state.mkdir(exist_ok=True)
    with open(state / "lock", "w") as lock:
        say(f"setting up {root}, after any other call that is at it")
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp.write_text("unfinished")
        if absent(["pip"]):
            run(sys.executable, "-m", "ensurepip", "--upgrade", "--default-pip")
        if base.exists() and not folders:
            install_tested()
        else:
            install_missing(state / "constraints.txt")
        if absent(["detectron2"]):
            install_detectron2(state / "detectron2")
        say("installing sparse_detr (editable)")
        # Without isolation nothing is downloaded; setuptools before 71 needs wheel beside it.
        alone = int(importlib.metadata.version("setuptools").split(".")[0]) > 70 or not absent(["wheel"])
        pip("install", "--no-deps", *["--no-build-isolation"] * alone, "-e", ROOT)
        say("checking")
        run(sys.executable, ROOT / "tools" / "check_install.py")
        stamp.write_text(fingerprint())
        say(f"the environment is ready: {root}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", default=ROOT / ".venv", help="environment (default: %(default)s)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path.pop(0)  # this script's folder has no packages
    tested_versions()
    root = Path(args.venv).absolute()
    base, python = root / ".sparse_detr" / "base.json", root / "bin" / "python"
    if args.inside:
        return install(root, base)
    if not python.exists():
        create(root, base)
    os.execv(str(python), [str(python), __file__, "--venv", str(root), "--inside"])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the next `make install` continues from here")
