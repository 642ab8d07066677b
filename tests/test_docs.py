"""Commands and links in the docs name what exists: files, flags, configs, keys. Some commands run;
tests/run_docs.py runs all."""

import ast
import itertools
import re
import shlex
from pathlib import Path

import pytest

from sparse_detr import cli
from sparse_detr.config import apply_overrides, get_config, list_configs, load_config
from tests import run_docs
from tests.run_docs import NOTEBOOKS, PAGES

ROOT = Path(__file__).resolve().parents[1]

PYTHON = re.compile(r"(\S*/)?python3?")
ONE_PER_FOLDER = {name.split("/")[0]: name for name in list_configs()}.values()
RUN_OUTPUT = re.compile(r"output/(?P<name>.+?)(/config\.yaml)?")  # of a run with a shipped config


def scripts(page):
    """(script, arguments) of every call of one of the project's Python scripts."""
    for _, command in run_docs.commands(page):
        words = shlex.split(command)
        if len(words) < 2 or not PYTHON.fullmatch(words[0]) or not words[1].endswith(".py"):
            continue
        if not words[1].startswith("$"):  # of another checkout
            yield words[1], words[2:]


COMMANDS = [
    pytest.param(script, arguments, id=f"{page.relative_to(ROOT)}: {' '.join([script, *arguments])}")
    for page in PAGES
    for script, arguments in scripts(page)
]
LINKS = [
    (page, link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    if "://" not in link and not link.startswith("mailto:")
]


def known_flags(script):
    """The flags that a script adds to its parser, and detectron2's where it uses them."""
    source = (ROOT / script).read_text(encoding="utf-8")
    package = ROOT / "projects" / "sparse_detr" / "cli"
    if command := re.search(r'\brun\("([\w-]+)"\)', source):  # it only calls the package's command
        source = (package / f"{cli.COMMANDS[command[1]][0]}.py").read_text(encoding="utf-8")
    called = re.findall(r"(?:_checkout|flags)\.(\w+)\(", source)
    shared = ast.parse((package / "flags.py").read_text(encoding="utf-8")).body
    parts = [ast.parse(source), *(x for x in shared if getattr(x, "name", None) in called)]
    flags = {"--help"}
    for node in itertools.chain.from_iterable(map(ast.walk, parts)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            flags |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    if "default_argument_parser" in source:
        from detectron2.engine import default_argument_parser

        flags |= set(default_argument_parser()._option_string_actions)
    return flags


def config_of(arguments):
    """The config that a command names, or the one whose run it names; None if it is left open."""
    name = arguments[arguments.index("--config-file") + 1] if "--config-file" in arguments else "..."
    if name == "..." or name == "output/my_run":
        return None
    run = RUN_OUTPUT.fullmatch(name)
    if run and run["name"] in list_configs():
        return get_config(run["name"])
    return load_config(str(ROOT / name) if (ROOT / name).is_file() else name)


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_a_command_names_what_exists(script, arguments):
    assert (ROOT / script).is_file(), f"there is no {script}"
    flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
    assert flags <= known_flags(script), f"{script} has no {flags - known_flags(script)}"
    overrides = [word for word in arguments if re.match(r"\+?[a-z]\w*(\.\w+)+=", word)]
    cfg = config_of(arguments)
    if cfg is not None:
        apply_overrides(cfg, overrides)
        return
    for override in overrides:  # the config is left open: some shipped one must have the key
        assert any(accepts(name, override) for name in ONE_PER_FOLDER), f"no config has {override}"


def accepts(name, override):
    try:
        apply_overrides(get_config(name), [override])
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("page", "link"), LINKS, ids=[f"{p.name}: {x}" for p, x in LINKS])
def test_a_link_leads_somewhere(page, link):
    target, _, anchor = link.partition("#")
    path = (page.parent / target).resolve() if target else page
    assert path.exists(), f"{page.name}: there is no {target}"
    if anchor and path.suffix == ".md":
        titles = re.findall(r"^#+ +(.+)$", path.read_text(encoding="utf-8"), re.M)
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in slugs, f"{path.name} has no section {anchor}"


def test_the_index_has_every_page_once():
    index = ROOT / "docs" / "README.md"
    listed = [(index.parent / link).resolve() for page, link in LINKS if page == index]
    pages = {*PAGES, ROOT / "projects" / "sparse_detr" / "README.md"} - {index, ROOT / "README.md"}
    assert sorted(listed) == sorted(pages)
    assert "docs/README.md" in [link for page, link in LINKS if page == ROOT / "README.md"]


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_import_what_exists(page):
    statements = ast.parse(run_docs.program(page)).body
    imports = [n for n in statements if isinstance(n, ast.Import | ast.ImportFrom)]
    own = [n for n in imports if (getattr(n, "module", None) or "").startswith("sparse_detr")]
    exec(compile(ast.Module(own, []), str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_in_the_text_exist(page):
    """Names in backticks that start like a shipped config's: `custom/dino_r50`."""
    folders = "|".join({name.split("/")[0] for name in list_configs()})
    text = page.read_text(encoding="utf-8")
    for name in re.findall(rf"`(?:configs/)?((?:{folders})/\w+)(?:\.py)?`", text):
        assert name in list_configs(), f"{page.name}: there is no config {name}"


def test_a_wrong_command_is_found():
    check = test_a_command_names_what_exists
    custom = ["--config-file", "configs/custom/dino_r50.py"]
    check("train_net.py", [*custom, "data.train_json=x"])
    for arguments in (
        ["--config-file", "configs/custom/dyno_r50.py"],
        [*custom, "data.train_jsn=x"],
        ["--config-file", "...", "train.epoch=3"],
    ):
        with pytest.raises((ValueError, AssertionError)):
            check("train_net.py", arguments)
    with pytest.raises(AssertionError, match="has no {'--sauce'}"):
        check("tools/visualize_data.py", [*custom, "--sauce", "annotation"])
    with pytest.raises(AssertionError, match="there is no tools/nothing.py"):
        check("tools/nothing.py", [])


@pytest.mark.slow
def test_commands_run(tmp_path):
    """Own data from its check to the trained model's use; the demo on a folder."""
    own = run_docs.jobs(ROOT / "docs/own_data.md", "check_data|init_checkpoint|python blocks")
    todo = [*own, *run_docs.jobs(ROOT / "docs/predict.md", "demo.py.*--input photos/")]
    assert len(todo) == 6
    assert run_docs.run_all(todo, tmp_path) == 0  # the report is in the captured output


def test_a_command_that_fails_or_hangs_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_docs, "TIME_LIMIT", 0.5)
    assert run_docs.run(["echo found; exit 3"], tmp_path)[::2] == ("exit status 3", "found\n")
    assert run_docs.run(["true", "sleep 60 & sleep 60"], tmp_path)[0] == "not done after 0.5 s"


def test_commands_are_read_as_a_shell_would(tmp_path, monkeypatch):
    monkeypatch.setattr(run_docs, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "Call `python a.py`.\n```bash\n# not this\npython b.py \\\n    --x 'y z'  # why\n"
        "run --machine-rank 0\nrun --machine-rank 1\n```\n```text\nnor this\n```\n```python\nx = 1\n```\n"
    )
    assert list(run_docs.commands(page)) == [
        (1, "python a.py"),
        (4, "python b.py --x 'y z'"),
        (6, "run --machine-rank 0"),
        (7, "run --machine-rank 1"),
    ]
    assert run_docs.program(page).splitlines()[12:] == ["x = 1"]
    *_, machines, _ = run_docs.jobs(page)  # of two machines at once, and last the Python blocks
    assert machines.commands == ["run --machine-rank 0", "run --machine-rank 1"]


def test_blocks_of_packages_that_are_missing_are_left_out(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\nimport no_such_package as n\n```\n```python\nimport json\n```\n")
    assert "no_such_package" in run_docs.program(page)
    monkeypatch.setattr(run_docs, "OPTIONAL", {"no_such_package": "no_such_package", "json": "json"})
    assert run_docs.program(page).split() == ["import", "json"]
