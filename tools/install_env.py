"""Set up the environment: what `make install` runs.

    python tools/install_env.py [--venv .venv]

A new environment gets the tested set of packages (requirements/), detectron2 and this package in
editable mode. What is there already is respected: when the Python that runs this script has a
working detectron2, the new environment is laid over that Python's packages and only adds what is
missing; an environment that this script didn't make also only gets what it lacks. An installed
detectron2 is never replaced.

The script is idempotent: a stamp inside the environment makes the next call a no-op, an interrupted
call is continued by the next one. Standard library only; the environment's packages are looked at
through its own interpreter.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
# When one of these changes, the environment has to be brought up to date.
FINGERPRINTED = ("requirements/*.txt", "setup.py", "pyproject.toml", "tools/install_env.py")
GIGABYTES_NEEDED = 7
START = time.monotonic()


class InstallError(Exception):
    """Something only the user can fix. Shown as one message, without a traceback."""


def say(text):
    print(f"[{time.monotonic() - START:4.0f} s] {text}", flush=True)


# ---------------------------------------------------------------------------------------------
# Which Python (this file must stay readable for an old one, which gets a message from here)


def supported_pythons():
    """Minor versions of Python 3 for which a tested set of packages exists, ascending."""
    names = (path.stem for path in REQUIREMENTS.glob("constraints-py3*.txt"))
    return sorted(int(name[len("constraints-py3") :]) for name in names)


def check_python(version=sys.version_info):
    minors = supported_pythons()
    if version[0] == 3 and version[1] in minors:
        return
    others = [name for name in (f"python3.{minor}" for minor in minors) if runs(name)]
    raise InstallError(
        f"Python 3.{minors[0]} to 3.{minors[-1]} is needed, "
        f"but {sys.executable} is Python {version[0]}.{version[1]}.\n"
        + (
            f"Run: make install PYTHON={others[-1]}"
            if others
            else "Install one and run: make install PYTHON=/path/to/python3.11"
        )
    )


def runs(name):
    if not shutil.which(name):
        return False
    return subprocess.call([name, "-c", ""], stderr=subprocess.DEVNULL) == 0


# ---------------------------------------------------------------------------------------------
# The environment, seen from outside


class Environment:
    """A directory with `bin/python`, and what this script notes down in it."""

    def __init__(self, root):
        self.root = Path(root).absolute()
        self.python = self.root / "bin" / "python"
        self.state = self.root / ".sparse_detr"
        self.stamp = self.state / "stamp"
        self.log = self.state / "install.log"
        self.owned = self.state / "made-here"  # exists if this script made the environment
        self.base = self.state / "base.json"  # package folders of the Python it is laid over

    def ask(self, code, *arguments):
        """JSON value that `code` prints when the environment's interpreter runs it."""
        return ask(self.python, code, *arguments)

    def absent(self, modules):
        """Those of `modules` (import names) that the environment doesn't have."""
        code = """
import importlib.util, json, sys
specs = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
# a folder without __init__.py, such as an uninstalled package leaves, has a spec without an origin
print(json.dumps([name for name, spec in specs.items() if spec is None or spec.origin is None]))
"""
        return self.ask(code, *modules)

    def base_folders(self):
        return json.loads(self.base.read_text()) if self.base.exists() else []

    def site_packages(self):
        code = "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"
        return Path(self.ask(code))

    def fingerprint(self):
        """Changes when the environment has to be brought up to date."""
        digest = hashlib.sha256(f"{ROOT}\n".encode())
        digest.update(self.ask("import json, sys; print(json.dumps(sys.version))").encode())
        for pattern in FINGERPRINTED:
            for path in sorted(ROOT.glob(pattern)):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def is_current(self):
        return (
            self.python.exists()
            and self.stamp.is_file()
            and self.stamp.read_text() == self.fingerprint()
            and not self.absent(["torch", "detectron2", "sparse_detr"])
        )

    @contextlib.contextmanager
    def lock(self):
        """One installation at a time. The lock is handed on to pip: an orphaned pip keeps it."""
        self.state.mkdir(parents=True, exist_ok=True)
        with open(self.state / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another installation is at work in {self.root}; waiting for it to end")
                fcntl.flock(file, fcntl.LOCK_EX)
            os.set_inheritable(file.fileno(), True)
            yield


def ask(python, code, *arguments):
    # Not from the current folder: `-c` would put it on sys.path.
    command = [str(python), "-c", code, *arguments]
    result = subprocess.run(command, cwd=REQUIREMENTS, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        raise InstallError(f"{python} doesn't run (exit code {result.returncode}).")
    return json.loads(result.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------
# Steps


def create(env):
    """Make the environment, unless there is one. An unfinished one is completed."""
    if env.python.exists() and not (env.owned.exists() and env.absent(["pip"])):
        version = tuple(env.ask("import json, sys; print(json.dumps(sys.version_info[:2]))"))
        if version != sys.version_info[:2]:
            raise InstallError(
                f"{env.root} has Python {version[0]}.{version[1]}, but {sys.executable} "
                f"is {platform.python_version()}.\nRemove it first: rm -rf {env.root}"
            )
        return
    if env.python.is_symlink() and not env.python.exists():
        raise InstallError(f"The Python that {env.root} was made with is gone.\nRun: rm -rf {env.root}")
    if not env.owned.exists():
        # Written before the environment exists, so that an interrupted call is continued alike.
        env.base.write_text(json.dumps(packages_to_build_on()))
        env.owned.touch()
    say(f"creating {env.root} with Python {platform.python_version()}")
    if env.base_folders() and importlib.util.find_spec("pip"):
        # Own pip and setuptools would hide those of the base, which may be newer.
        run([sys.executable, "-m", "venv", "--without-pip", env.root], env)
        return
    if not importlib.util.find_spec("venv") or not importlib.util.find_spec("ensurepip"):
        raise InstallError(
            f"{sys.executable} can't make environments: its venv or ensurepip module is missing.\n"
            f"On Debian and Ubuntu: apt install python3.{sys.version_info[1]}-venv"
        )
    run([sys.executable, "-m", "venv", env.root], env)


def packages_to_build_on():
    """Package folders of this Python if it has a detectron2 that works, else none."""
    probe = """
import importlib.util, json, os, sys, warnings
warnings.simplefilter("ignore")
folders, error = [], None
if importlib.util.find_spec("detectron2"):
    try:
        import torch, detectron2.engine, detectron2.evaluation
        names = ("site-packages", "dist-packages")
        folders = [path for path in sys.path if os.path.basename(path) in names]
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
print(json.dumps([folders, error]))
"""
    folders, error = ask(sys.executable, probe)
    if error:
        say(f"{sys.executable} has a detectron2 that doesn't work, so it isn't used: {error}")
    elif folders:
        say(f"{sys.executable} has a working detectron2: using it and its packages as they are")
    return folders


def build_on(env, folders):
    """Make the packages in `folders` importable, behind the environment's own."""
    lines = (f"import site; site.addsitedir({folder!r})\n" for folder in folders)
    (env.site_packages() / "_sparse_detr_base.pth").write_text("".join(lines))


def install_packages(env):
    """The tested set in an environment of our own, else only what is missing."""
    files = [REQUIREMENTS / f"{name}.txt" for name in ("runtime", "detectron2-runtime", "dev")]
    tested = REQUIREMENTS / f"constraints-py3{sys.version_info[1]}.txt"
    if env.owned.exists() and not env.base_folders():
        remove_half_installed(env.site_packages())
        if shutil.disk_usage(env.root).free < GIGABYTES_NEEDED << 30:
            say(f"warning: less than {GIGABYTES_NEEDED} GB are free, which may not be enough")
        say("installing the tested set of packages (a few GB to download at the first time)")
        pip(env, "install", "-c", tested, *(part for file in files for part in ("-r", file)))
        return

    wanted = {import_name(line): line for file in files for line in requirement_lines(file)}
    missing = [wanted[name] for name in env.absent(wanted)]
    if not missing:
        say("all packages are there already")
        return
    say("adding only what is missing: " + ", ".join(missing))
    pins = installed_versions(env)  # nothing that is there may change
    if wanted["torch"] in missing:  # without torch there is nothing that the tested set can clash with
        lines = (line.split("==") for line in requirement_lines(tested))
        pins = {**dict(lines), **pins}
    constraints = env.state / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    pip(env, "install", "-c", constraints, *missing)


def installed_versions(env):
    """{normalised name: version} of what the environment's interpreter finds first."""
    code = """
import importlib.metadata, json
found = [(d.metadata["Name"], d.version) for d in importlib.metadata.distributions()]
print(json.dumps([pair for pair in reversed(found) if all(pair)]))
"""
    standard = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[\w.]+)?")
    found = ((re.sub("[-_.]+", "-", name).lower(), version) for name, version in env.ask(code))
    return {name: version for name, version in found if standard.fullmatch(version)}


def requirement_lines(file):
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line]


def import_name(requirement):
    name = re.match(r"[\w.-]+", requirement)[0]
    different = {"hydra-core": "hydra", "opencv-python-headless": "cv2", "Pillow": "PIL"}
    return different.get(name, name.replace("-", "_"))


def remove_half_installed(site_packages):
    """Make pip forget what it was killed over: it writes RECORD last, but looks for METADATA."""
    for info in site_packages.glob("*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)


def install_detectron2(env):
    """Unpack the snapshot pinned in requirements/detectron2.txt, unless there is a detectron2.

    The wheel is labelled for Python 3.10, but only one file in it is: the compiled `_C`, which
    needs CUDA 12 and an old torch, and detectron2 can do without it. It also has a stray top-level
    `tools` package. Both are left out, and the folder appears in one piece.
    """
    if not env.absent(["detectron2"]):
        say("detectron2 is there already: used as it is")
        return
    say("installing detectron2")
    work = env.state / "detectron2"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    pip(
        env,
        *("download", "--no-deps", "--only-binary=:all:", "--python-version=3.10"),
        *("--require-hashes", "-r", REQUIREMENTS / "detectron2.txt", "-d", work),
    )
    (wheel,) = work.glob("*.whl")
    unpacked = unpack_detectron2(wheel, work / "unpacked")
    site_packages = env.site_packages()
    for folder in sorted(unpacked.iterdir(), key=lambda path: path.name == "detectron2"):
        shutil.rmtree(site_packages / folder.name, ignore_errors=True)
        folder.rename(site_packages / folder.name)
    run([env.python, "-m", "compileall", "-q", site_packages / "detectron2"], env)
    shutil.rmtree(work)


def unpack_detectron2(wheel, target):
    """Unpack the pure Python part of detectron2 and its metadata into `target`, and return it."""

    def wanted(name):
        top = name.split("/")[0]
        if top != "detectron2" and not top.endswith(".dist-info"):
            return False
        return not re.match(r"detectron2/_C\..*so$", name)

    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, filter(wanted, archive.namelist()))
    for record in target.glob("*.dist-info/RECORD"):  # the list of files that pip uninstall removes
        lines = record.read_text().splitlines()
        record.write_text("".join(line + "\n" for line in lines if wanted(line.split(",")[0])))
    return target


def install_this_package(env):
    say("installing sparse_detr (editable)")
    builders = ["setuptools.command.bdist_wheel", "wheel"]  # in setuptools since 70.1
    # Without isolation nothing is downloaded, but setuptools must be complete.
    isolation = [] if env.absent(builders) == builders else ["--no-build-isolation"]
    pip(env, "install", "--no-deps", *isolation, "-e", ROOT)


def check(env):
    say("checking")
    command = [str(env.python), str(ROOT / "tools" / "check_install.py")]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
        raise InstallError("The environment is not complete, see above.")


# ---------------------------------------------------------------------------------------------
# Running pip

# In pip's output -> what is wrong, what to do. The first match counts.
CAUSES = (
    (
        r"No space left on device|Errno 28",
        "The disk is full.",
        f"About {GIGABYTES_NEEDED} GB are needed; `pip cache purge` may free some.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "The certificate of the package index is not trusted.",
        "Tell pip about your network's certificates: export PIP_CERT=/path/to/ca-bundle.pem",
    ),
    (
        r"NewConnectionError|NameResolutionError|ConnectTimeoutError|ReadTimeoutError|ProxyError"
        r"|Failed to establish a new connection|Temporary failure in name resolution"
        r"|Read timed out|Network is unreachable",
        "The package index can't be reached.",
        "Check the network (behind a proxy: HTTPS_PROXY; own index: PIP_INDEX_URL).",
    ),
    (
        r"THESE PACKAGES DO NOT MATCH THE HASHES",
        "A downloaded file is not the one that was tested.",
        "Remove pip's cache (`pip cache purge`); if that doesn't help, don't trust your index.",
    ),
    (
        r"(\S+): No module named pip",
        "The environment has no pip.",
        "Give it one: {} -m ensurepip",
    ),
    (
        r"No matching distribution found for (\S+)",
        "The package index doesn't have {} for this Python and machine.",
        "See docs/install.md for the tested versions.",
    ),
)
SHOWN = re.compile(
    r"\s*(Downloading \S+ \([\d.]+ [MG]B\)|Installing collected packages|WARNING: Retrying.{,90})"
)


def pip(env, *arguments):
    run([env.python, "-m", "pip", "--no-input", *arguments], env)


def run(command, env):
    """Run `command`, its output into the log, only the lines that show progress on the screen."""
    settings = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **settings},
        close_fds=False,  # hands the lock on
    )
    output = []
    try:
        with open(env.log, "a") as log:
            print("$", *command, file=log, flush=True)
            for line in process.stdout:
                print(line, end="", file=log, flush=True)
                output.append(line)
                shown = SHOWN.match(line)
                if shown:
                    print("        ", shown[1], flush=True)
        process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        how = f"{Path(command[0]).name} ended with exit code {process.returncode}."
        raise InstallError(f"{explain(''.join(output))}\n{how} Its whole output is in {env.log}")


def explain(output):
    """The cause of a failure of pip in words, or else the end of what it printed."""
    for pattern, cause, advice in CAUSES:
        found = re.search(pattern, output)
        if found:
            text = f"{cause}\n{advice}".format(*found.groups())
            return f"{text}\nThen run make install again: it continues."
    return "\n".join(output.splitlines()[-15:])


# ---------------------------------------------------------------------------------------------


def install(root):
    check_python()
    env = Environment(root)
    if env.is_current():
        print(f"environment ready: {env.root}")
        return
    if not env.python.exists() and not env.owned.exists() and env.root.exists():
        if any(path != env.state for path in env.root.iterdir()):
            raise InstallError(f"{env.root} is neither empty nor a Python environment.")
    with env.lock():
        if env.is_current():  # another call has just done it
            return
        env.stamp.unlink(missing_ok=True)
        create(env)
        if env.base_folders():
            build_on(env, env.base_folders())
        install_packages(env)
        install_detectron2(env)
        install_this_package(env)
        check(env)
        env.stamp.write_text(env.fingerprint())
        say(f"the environment is ready: {env.root}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", default=ROOT / ".venv", help="environment (default: %(default)s)")
    # So that a terminated installation doesn't leave pip at work.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        install(parser.parse_args().venv)
    except InstallError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the next `make install` continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
