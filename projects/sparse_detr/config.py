"""Finding, loading and overriding LazyConfigs, with errors where detectron2 would guess.

detectron2 merges overrides silently: a mistyped key becomes a new entry that nobody reads. Here a
key must exist in the config, or be an argument of the callable that it configures; ``+key=value``
adds one on purpose.
"""

import contextlib
import copy
import difflib
import inspect
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import published
from .errors import UserError, listed

logger = logging.getLogger(__name__)

_PARTS = ("common", "models", "encoders")  # folders that hold pieces of configs, not whole ones


def list_configs() -> list[str]:
    """Names of the shipped configs, as ``get_config`` takes them: "quick/...", ..."""
    root = _config_root()
    names = []
    for folder, _, files in os.walk(root):
        relative = os.path.relpath(folder, root)
        if relative != "." and relative.split(os.sep)[0] not in _PARTS:
            names += [f"{relative}/{f[:-3]}" for f in files if f.endswith(".py") and f != "__init__.py"]
    return sorted(name.replace(os.sep, "/") for name in names)


def get_config(name: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Loads a shipped config by name, with or without ".py"; ``overrides`` read "a.b=c"."""
    return load_config(name, overrides)


def load_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> DictConfig:
    """Loads a config by its file (``.py``, or a run's ``config.yaml``), a run's folder or a shipped name.

    A ``.py`` file defines ``model``, ``dataloader``, ``train``, ...; or ``cfg`` with all of them, such
    as ``get_config`` returns it.

    Raises:
        UserError: there is no such config, or an override does not fit it.
    """
    cfg = LazyConfig.load(config_path(path))
    if "model" not in cfg and isinstance(cfg.get("cfg"), DictConfig):
        # a copy: interpolations count from its root
        cfg = OmegaConf.create(cfg.cfg, flags={"allow_objects": True})
    apply_overrides(cfg, overrides)
    return cfg


def resolve_config(config: str | os.PathLike | DictConfig, overrides: Iterable[str] = ()) -> DictConfig:
    """The config of a model that can be built: found, overridden, and its classes known.

    Args:
        config: what ``load_config`` takes; or a loaded config, of which this is a copy.
        overrides: "a.b=c", as on the command line.

    ``train.init_checkpoint=published`` becomes the link of the config's published weights.

    Raises:
        UserError: see ``load_config``, ``resolve_classes`` and ``published_weights``.
    """
    if isinstance(config, DictConfig):
        cfg = copy.deepcopy(config)
        apply_overrides(cfg, overrides)
    else:
        cfg = load_config(config, overrides)
    resolve_classes(cfg)
    if OmegaConf.select(cfg, "train.init_checkpoint") == "published":
        cfg.train.init_checkpoint = published_weights(config)
    return cfg


def published_weights(config: str | os.PathLike | DictConfig) -> str:
    """``published://NAME``, the weights that belong to a shipped config, given by its name or file.

    Raises:
        UserError: none do, or it is another config, or a loaded one, which has no name.
    """
    what = "a loaded config" if isinstance(config, DictConfig) else config_path(config)
    shipped = re.search(r"/configs/(\w+/\w+)\.py$", os.path.realpath(what).replace(os.sep, "/"))
    if shipped is None or shipped[1] not in list_configs():
        raise UserError(
            f'"published" means the weights of a shipped config, and {what} is none: name one, as in '
            "published://dino/dino_r50_4scale_12ep (docs/model_zoo.md)"
        )
    published.find(shipped[1])
    return published.PREFIX + shipped[1]


def resolve_classes(cfg: DictConfig) -> None:
    """Fills ``model.num_classes`` and ``data.classes`` where a config leaves them to the data.

    Configs for data of one's own (``common/data/custom.py``) set both to None; the answer is in the
    training set, or in the validation set where no other is given. Does nothing to other
    configs, and once the classes are known, as in a run's ``config.yaml``, reads no file.

    Raises:
        UserError: there is no file to read them from, or ``model.num_classes`` was given and is
            another number.
    """
    data = cfg.get("data")
    if not data or "classes" not in data:
        return
    source = data.get("yolo") or data.get("voc") or data.train_json or data.val_json
    given = cfg.model.num_classes
    stored = data.classes is not None
    stored_classes(cfg)  # refuses what is no list of names
    if not stored and (source if given is None else os.path.exists(str(source or ""))):
        from .data import own_classes

        data.classes = [_stored_name(name) for name in own_classes(data)]
    if data.classes is None and given is None:
        raise UserError(
            "model.num_classes is not known: pass data.train_json=... (or data.yolo=..., data.voc=...), from "
            "which it is read (or the number itself: model.num_classes=...)"
        )
    if given is None:
        cfg.model.num_classes = len(data.classes)
    elif data.classes is not None and len(data.classes) != given:
        raise UserError(
            f"model.num_classes={given}, but {'data.classes' if stored else source} has "
            f"{len(data.classes)} classes ({listed(stored_classes(cfg) or (), 5)}): "
            + (
                "to read them from other data, pass data.classes=null model.num_classes=null"
                if stored
                else "leave model.num_classes out, it is read from the file"
            )
        )


def stored_classes(cfg: DictConfig) -> list[str] | None:
    """The names in ``data.classes``, as they were in the JSON; None if there are none."""
    from .data import class_list

    return class_list(cfg.get("data") or {})


def _stored_name(name: str) -> str:
    """A class name as a config can hold it: OmegaConf takes ??? and ${...} for syntax of its own.

    These, and what begins like them once they are quoted, become JSON texts without ? and $.
    """
    if name == "???" or "${" in name or name.startswith('"'):
        return json.dumps(name).replace("?", "\\u003f").replace("$", "\\u0024")
    return name


def config_path(name: str | os.PathLike) -> str:
    """The file behind a path, a run's folder or a shipped config's name."""
    name = os.fspath(name)
    if not name:
        raise UserError(
            "no config is named: pass --config-file with a file, a run's folder, or a shipped config "
            "such as custom/sparse_detr_r50 or dino/dino_r50_4scale_12ep (sparse_detr.list_configs() has all)"
        )
    for file in (name, os.path.join(name, "config.yaml")):
        if os.path.isfile(file):
            return file
    shipped = name.removeprefix("configs/").removesuffix(".py")
    shipped_path = os.path.join(_config_root(), *shipped.split("/")) + ".py"
    if os.path.isfile(shipped_path):  # also the pieces that list_configs() leaves out
        return shipped_path
    if os.path.isdir(name):
        raise UserError(f"{name} is no output folder of a run: it holds no config.yaml")
    close = difflib.get_close_matches(shipped, list_configs(), n=3)
    raise UserError(
        f"there is no config {name!r}, neither a file nor a shipped one. "
        + (f"Did you mean {', '.join(close)}?" if close else "sparse_detr.list_configs() has them")
    )


def _config_root() -> str:
    return str(resources.files(__package__ + ".configs"))


def apply_overrides(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Applies "a.b=c" overrides in place; values follow Hydra's grammar: null, true, [1,2], {x: 1}.

    A value that has a "/" and does not fit the grammar is a path, taken as it stands. So is the value of
    a key that is text or a path's, such as ``train.output_dir=2024``, whatever it looks like.

    Raises:
        UserError: an override cannot be read, names a key that the config does not have (with "did
            you mean"), or puts another kind of value in the place of a section, list or switch.
    """
    for text in overrides:
        override = _parse(text)
        key = override.key_or_group
        if override.is_delete():
            raise UserError(f"override {text!r}: deleting a key is not supported; set it to null")
        if not isinstance(override.value(), str | list | Mapping | None) and _is_text(cfg, key):
            override = _as_text(text)
        if not override.is_add():
            for name, value in _items(key, override.value()):
                if not _accepts(cfg, name):
                    raise UserError(
                        f"override {text!r}: the config has no {name!r}.{_did_you_mean(cfg, name)} "
                        f"(+{key}=... adds a new key on purpose)"
                    )
                if expected := _other_kind(cfg, name, value):
                    raise UserError(f"override {text!r}: {name} {expected}")
        try:
            LazyConfig.apply_overrides(cfg, [override.input_line])
        except (KeyError, OmegaConfBaseException) as error:
            raise UserError(f"override {text!r} does not fit the config: {error}") from error


def _parse(text: str) -> Override:
    parser = OverridesParser.create()
    key, _, value = text.partition("=")
    try:
        override = parser.parse_override(text)
        if not override.is_sweep_override():
            return override
        problem = f"a list is written [{value}]"
    except Exception as error:  # Hydra's own exceptions differ between versions
        problem = f"expected path.key=value ({str(error).splitlines()[0]})"
    if "/" in value and value[0] not in "[{('\"":
        with contextlib.suppress(Exception):  # the key cannot be read either
            return _as_text(text)
    raise UserError(
        f"cannot read the override {text!r}: {problem}. A value with special characters is quoted "
        """twice, once for the shell: "path.key='a (b)'\""""
    )


# Ends of the names of keys that hold files or folders, and may be None until they do.
_PATH_KEY = re.compile(
    r"(^|_|\.)(dir|path|file|folder|root|json|yolo|voc|checkpoint|weights)$|(?<!num)_images$"
)


def _is_text(cfg: DictConfig, key: str) -> bool:
    now = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    return isinstance(now, str) or (now is None and bool(_PATH_KEY.search(key)))


def _as_text(text: str) -> Override:
    """The override with its value as it stands, a path's "~" apart."""
    key, _, value = text.partition("=")
    quoted = QuotedString(os.path.expanduser(value), Quote.single).with_quotes()
    return OverridesParser.create().parse_override(f"{key}={quoted}")


def _items(key: str, value: object) -> Iterator[tuple[str, object]]:
    """The dotted keys that an override writes, its own or those inside its dict, and their values."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _items(f"{key}.{name}", item)
    else:
        yield key, value


def _other_kind(cfg: DictConfig, key: str, value: object) -> str | None:
    """What ``key`` must be, unless ``value`` is of that kind."""
    if value == "None":
        return "cannot be None: write null"
    if isinstance(value, str) and "${" in value:
        return None
    now = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    if isinstance(now, bool) and not isinstance(value, bool):
        return "is true or false"
    if isinstance(now, DictConfig) and not isinstance(value, Mapping | None):
        return f"is a section: set one of its keys, {key}.{next(iter(now), 'key')!s}=..., or null"
    if isinstance(now, ListConfig) and not isinstance(value, list | None):
        return f"is a list: write [{value}]"
    return None


def _accepts(cfg: DictConfig, key: str) -> bool:
    node: object = cfg
    for part in _split(key):
        if isinstance(node, DictConfig) and part in node.keys():
            node = node._get_node(part)
        elif isinstance(node, DictConfig) and part in _arguments(node):
            node = None  # an argument left at its default
        elif isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node._get_node(int(part))
        else:
            return False
    return True


def _split(key: str) -> list[str]:
    return [part for part in re.split(r"[.\[\]]", key) if part]


def _arguments(node: DictConfig) -> list[str]:
    """Names of the arguments that the callable of an ``L(...)`` node takes."""
    if "_target_" not in node:
        return []
    target = locate(node._target_) if isinstance(node._target_, str) else node._target_
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _did_you_mean(cfg: DictConfig, key: str) -> str:
    known = list(_all_keys(cfg))
    last = _split(key)[-1]
    matches = [k for k in known if k.rsplit(".", 1)[-1] == last]  # right name, wrong place
    matches = difflib.get_close_matches(key, matches, n=3, cutoff=0) + difflib.get_close_matches(
        key, known, n=3
    )
    matches = list(dict.fromkeys(matches))[:3]
    return f" Did you mean {', '.join(matches)}?" if matches else ""


def _all_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in dict.fromkeys([*node.keys(), *_arguments(node)]):
        if name == "_target_":
            continue
        yield f"{prefix}{name!s}"
        child = node._get_node(name) if name in node.keys() else None
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from _all_keys(child, f"{prefix}{name!s}.")
