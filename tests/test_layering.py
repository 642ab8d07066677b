"""Who may import whom. The rules are the table below; the code is parsed, not imported.

Modules are named as inside the package: `kernels.op`, `modeling.tokens`, `configs.models.dino`,
`__init__` for the package itself. Imports in functions and through `import_module` count; those under
`if TYPE_CHECKING:` are free: only hints need them. A new encoder needs no row here.
"""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "": ROOT / "projects" / "sparse_detr",
    "kernels": ROOT / "kernels",
    "configs": ROOT / "configs",
}

BASE = r"modeling\.(tokens|layers|attention|boxes)"
MODELING = r"modeling(\.(?!encoders).*)?"  # without the encoders

# (importer, what it may import), both as patterns; the first row that matches the importer counts.
RULES = (
    (r"kernels(\..*)?", r"kernels(\..*)?"),
    (BASE, rf"kernels|{BASE}"),
    # ... and its own helpers, see `is_own_helper`
    (
        r"modeling\.encoders\..*",
        rf"kernels|{BASE}|modeling\.(encoder|cascade|elastic|selection|heads|proposals)",
    ),
    (r"modeling\.encoders", r"modeling\.encoders\..*"),
    (
        r"modeling\.(transformer|postprocess|packing|\w*backbone)",
        r"modeling\.(?!encoders|meta_arch|detectors).*|errors",
    ),
    (r"modeling\.meta_arch", r"modeling\.(?!encoders|detectors).*|devices|errors|yacs_config"),
    (r"modeling\.detectors", r"modeling\.meta_arch|errors"),
    (r"modeling", r"modeling\..*"),
    (
        r"modeling\..*",
        rf"{BASE}|modeling\.(?!encoders|meta_arch|detectors|transformer|postprocess|\w*backbone).*",
    ),
    (r"errors", r"errors"),
    (r"devices", r"errors"),
    (r"data(\..*)?", r"data(\..*)?|errors"),
    (r"published", r"errors"),
    (r"engine(\..*)?", rf"engine(\..*)?|data(\..*)?|config|devices|errors|published|{MODELING}"),
    (r"config", r"configs(\..*)?|data(\..*)?|errors|published"),
    (r"yacs_config", r"config|errors"),
    (r"yacs", r"modeling|errors|yacs_config|engine\.(checkpoint|optimizer)"),
    (r"detectron2_env", r"yacs"),
    (r"configs(\..*)?", r"(?!tools|tests|train_net|cli|report|modeling\.encoders).*"),
    (r"__init__", r"(?!tools|tests|train_net|cli|report).*"),
    (r"report(\..*)?", r"report(\..*)?|config|errors|visualize|data\.(evaluation|image)"),
    (r"cli(\..*)?", r"(?!modeling\.encoders).*"),
    (r"__main__", r"cli"),
    (
        r"predictor|calibrate|dial|keep_ratio|analysis|overlays|visualize|export|quantize",
        r"__init__|kernels|modeling(\..*)?|config|devices|errors|engine\.checkpoint|data\.image"
        r"|predictor|calibrate|dial|keep_ratio|analysis|overlays|visualize|export|quantize",
    ),
    (r"results", r"errors"),
    (r"bulk", r"data\.image|errors|predictor|results"),
)
# (importer, the only packages besides the standard library that it may import)
THIRD_PARTY = (
    (r"kernels(\..*)?", {"torch", "ninja"}),
    (BASE, {"torch", "torchvision"}),
)
# Not used anywhere: both need a setuptools that still has pkg_resources.
BANNED = ("detectron2.model_zoo", "pkg_resources")

# Imports of a name that is only known at run time; everything else can be checked here.
# export: the packages that ONNX needs; cli: the modules of its table; check_install: detectron2's parts
COMPUTED = {"__init__", "modeling.encoders", "export", "cli", "cli.check_install"}


def read_modules() -> dict[str, str]:
    """Source of every module of the package, by its name in the package."""
    sources = {}
    for prefix, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = (prefix, *parts) if prefix else parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            sources[name or "__init__"] = path.read_text(encoding="utf-8")
    return sources


SOURCES = read_modules()
ENCODERS = [name for name in SOURCES if name.startswith("modeling.encoders.")]
PACKAGES = {"__init__", "kernels", "configs"} | {
    name for name in SOURCES if any(other.startswith(f"{name}.") for other in SOURCES)
}


# The shared parts know no paper; `detectors` only registers the detectors' names.
PAPER_WORDS = {"dam", "salience"} | {
    word
    for name in ENCODERS
    if re.search(r"^class \w+Encoder\(", SOURCES[name], re.M)
    for word in name.split(".")[2:]
}
REGISTERED = {"SparseDETR", "FocusDETR", "LiteDETR", "SalienceDETR"}
PAPER_FREE = [name for name in SOURCES if not name.startswith(("configs", "modeling.encoders."))]


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield from run_time_nodes(node)


def imported(module: str, source: str) -> Iterator[tuple[str, bool]]:
    """Full name of all that `module` imports, and whether it is a module of this package.

    Own modules are named as inside the package, and names from them stand for their module.
    """
    for node in run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            if not isinstance(name := (node.args or [None])[0], ast.Constant):
                continue  # see `test_names_computed_at_run_time`
            level = len(name.value) - len(name.value.lstrip("."))
            parts = [] if module == "__init__" else module.split(".")
            start = ".".join(["sparse_detr", *parts[: len(parts) - level + (module in PACKAGES)], ""])
            names = [start * bool(level) + name.value[level:]]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = [] if module == "__init__" else module.split(".")
                up = node.level - (module in PACKAGES)
                assert up <= len(parts), f"{module}: relative import leaves the package"
                start = ".".join(["sparse_detr", *parts[: len(parts) - up], *filter(None, [start])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            is_own = name.split(".")[0] == "sparse_detr"
            if is_own:
                name = name.removeprefix("sparse_detr").lstrip(".") or "__init__"
                if name not in SOURCES:  # a name in the module
                    name = name.rpartition(".")[0] or "__init__"
            yield name, is_own


def called(call: ast.Call) -> str:
    """The last name of what is called: of `importlib.import_module(...)`, `import_module`."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def is_own_helper(name: str, module: str) -> bool:
    """Whether `name` is a part of the encoder in `module`: no encoder itself, used by no other file."""
    users = {
        other
        for other in ENCODERS
        if other != name and name in {found for found, _ in imported(other, SOURCES[other])}
    }
    return (
        module.startswith("modeling.encoders.")
        and name in ENCODERS
        and not re.search(r"^class \w+Encoder\(", SOURCES[name], re.M)
        and users <= {module}
    )


def violations(module: str, source: str) -> list[str]:
    """What `source`, as the module of that name, imports against the rules."""
    allowed = next(allowed for importer, allowed in RULES if re.fullmatch(importer, module))
    libraries = next((names for who, names in THIRD_PARTY if re.fullmatch(who, module)), None)
    found = []
    for name, is_own in imported(module, source):
        top = name.split(".")[0]
        if is_own:
            if any(part.startswith("_") and part != "__init__" for part in name.split(".")):
                found.append(f"{module} imports the private {name}")
            if not re.fullmatch(allowed, name) and not is_own_helper(name, module):
                found.append(f"{module} must not import {name}")
        elif name.startswith(BANNED):
            found.append(f"{module} must not import {name}")
        elif libraries is not None and top not in libraries | sys.stdlib_module_names:
            found.append(f"{module} must not import {name}")
    return found


def paper_names(source: str) -> set[str]:
    """Identifiers that contain the name of a paper's method."""
    identifiers = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                identifiers.update(value.split("."))
    own = re.compile("sparse_detr", re.I)  # the package's own name
    return {name for name in identifiers - REGISTERED if PAPER_WORDS & words(own.sub("", name))}


def words(identifier: str) -> set[str]:
    """`SparseDETR` -> {"sparse", "detr"}, `keep_ratio` -> {"keep", "ratio"}"""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_follow_the_rules(module):
    assert violations(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", [name for name in sorted(SOURCES) if "configs" not in name])
def test_imports_within_the_package_are_relative(module):
    """So that the package also works under another name, as `projects.sparse_detr`."""
    absolute = [
        node.lineno
        for node in ast.walk(ast.parse(SOURCES[module]))
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparse_detr"))
        or (isinstance(node, ast.Import) and node.names[0].name.startswith("sparse_detr"))
    ]
    assert absolute == [], f"absolute imports of sparse_detr in {module}, lines {absolute}"


def test_no_import_cycle():
    graph = {
        module: {name for name, is_own in imported(module, source) if is_own} - {module}
        for module, source in SOURCES.items()
        if not module.startswith("configs")
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_names_computed_at_run_time():
    for module, source in SOURCES.items():
        computed = [
            node.lineno
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call)
            and called(node) in ("import_module", "__import__")
            and not isinstance((node.args or [None])[0], ast.Constant)
        ]
        assert not computed or module in COMPUTED, f"{module} imports a computed name, lines {computed}"


@pytest.mark.parametrize("module", sorted(PAPER_FREE))
def test_shared_parts_name_no_paper(module):
    assert paper_names(SOURCES[module]) == set()


@functools.cache
def encoders_own_names() -> set[str]:
    """Attributes that encoders set, and arguments that they are built with, but nothing shared has."""
    names = set()
    for node in (node for name in ENCODERS for node in ast.walk(ast.parse(SOURCES[name]))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names.update(arg.arg for arg in node.args.kwonlyargs)
    return names.difference(*(used_words(SOURCES[n]) for n in SOURCES if re.fullmatch(MODELING, n)))


def used_words(source: str) -> set[str]:
    """Attributes, arguments, and the words of strings without blanks: names and regular expressions."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        for field in ("attr", "arg", "value"):
            value = getattr(node, field, None)
            if isinstance(value, str) and " " not in value:
                used.update(re.findall(r"[A-Za-z]\w+", re.sub(r"\\\w", " ", value)))
    return used


@pytest.mark.parametrize("module", [name for name in sorted(SOURCES) if name.startswith("engine")])
def test_the_engine_knows_no_part_of_a_single_encoder(module):
    """Parameters and settings that only one encoder has: what is to be known of them, it says itself."""
    assert "num_high_levels" in encoders_own_names()
    assert used_words(SOURCES[module]) & encoders_own_names() == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.op", "import numpy"),
        ("kernels.op", "from ..modeling.tokens import Tokens"),
        ("modeling.tokens", "from .encoder import DenseEncoder"),
        ("predictor", "from .cli.predict import find_images"),
        ("configs.models.x", "from sparse_detr.cli import train"),
        ("modeling.layers", "from detectron2.layers import Conv2d"),
        ("modeling.decoder", "from .meta_arch import SetDetector"),
        ("modeling.decoder", "def f():\n    from .encoders import sparse"),
        ("modeling.encoders.sparse", "from .focus import FocusEncoder"),
        ("modeling.encoders.sparse", "from .foreground import foreground_loss"),
        ("modeling.encoders.sparse", "from ..decoder import DeformableDecoder"),
        ("modeling.encoders.dam", "from .sparse import SparseEncoder"),
        ("modeling.encoders.new", "from .foreground import foreground_loss"),
        ("modeling.encoders.new", "from .. import DenseEncoder"),
        ("modeling.meta_arch", "def f():\n    from ..yacs import build_optimizer"),
        ("modeling.meta_arch", "from .encoders.sparse import SparseEncoder"),
        ("modeling.decoder", "import importlib\nimportlib.import_module('..meta_arch', __name__)"),
        ("modeling.decoder", "from importlib import import_module\nimport_module('.encoders', __package__)"),
        ("engine.trainer", "__import__('sparse_detr.modeling.encoders.sparse')"),
        ("configs.encoders.x", "from sparse_detr.modeling.encoders.sparse import SparseEncoder"),
        ("modeling.transformer", "from .encoders.lite import LiteEncoder"),
        ("data.mapper", "from ..engine.trainer import Trainer"),
        ("engine.trainer", "from ..modeling.encoders.sparse import SparseEncoder"),
        ("engine.trainer", "from detectron2 import model_zoo"),
        ("engine.trainer", "import detectron2.model_zoo.model_zoo as zoo"),
        ("predictor", "from .engine.trainer import Trainer"),
        ("configs.models.x", "from sparse_detr.modeling._private import x"),
        ("configs.models.x", "from sparse_detr.tools import demo"),
    ],
)
def test_a_violation_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.op", "import torch, math\nfrom .reference import ms_deform_attn"),
        ("modeling.attention", "from ..kernels import ms_deform_attn"),
        (
            "modeling.encoders.sparse",
            "from .dam import decoder_attention_map\nfrom ..tokens import Tokens",
        ),
        ("modeling.encoder", "if TYPE_CHECKING:\n    from .decoder import DecoderOutput"),
        ("configs.models.x", "from sparse_detr.modeling import DenseEncoder\nfrom .y import model"),
        ("__init__", "from .config import get_config"),
    ],
)
def test_what_is_allowed_is_not_reported(module, source):
    assert violations(module, source) == []


def test_a_paper_name_is_found():
    assert paper_names("class Decoder:\n    def forward(self, x): return self.focus_score(x)")
    assert paper_names("from .encoders.x import SparseEncoder") == {"SparseEncoder"}
    assert not paper_names("class SparseDETR: pass\nsatellite = elite = 1")
