"""Commands and links in README.md and docs/*.md name what exists: files, flags, configs, keys."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from sparse_detr.config import apply_overrides, get_config, list_configs, load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PYTHON = re.compile(r"(\S*/)?python3?")
ONE_PER_FOLDER = {name.split("/")[0]: name for name in list_configs()}.values()
RUN_OUTPUT = re.compile(r"output/(?P<name>.+?)(/config\.yaml)?")  # of a run with a shipped config


def code_blocks(page, *languages):
    """(language, text) of the page's fenced blocks."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for language, text in found if language in languages]


def scripts(text):
    """(script, arguments) of every call of one of the project's scripts in a shell block."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):  # environment variables
            words = words[1:]
        if len(words) > 1 and PYTHON.fullmatch(words[0]) and words[1].endswith(".py"):
            yield words[1], words[2:]


COMMANDS = [
    pytest.param(script, arguments, id=f"{page.relative_to(ROOT)}: {' '.join([script, *arguments])}")
    for page in PAGES
    for block in code_blocks(page, "", "bash", "sh", "console")
    for script, arguments in scripts(block)
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
    flags = {"--help"}
    for node in ast.walk(ast.parse(source)):
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_import_what_exists(page):
    for block in code_blocks(page, "python"):
        imports = [n for n in ast.parse(block).body if isinstance(n, ast.Import | ast.ImportFrom)]
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
