"""Where weights come from besides files: ``published://NAME``, ``hf://OWNER/NAME`` and ``timm://NAME``.

They are handlers of detectron2's ``PathManager``, beside its own ``detectron2://`` and ``https://``, so that
whatever loads through it, yacs projects too, knows them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir

from ..errors import UserError, listed
from ..published import PREFIX, Published, find

logger = logging.getLogger(__name__)

# What transformers' save_pretrained has written, the newer first.
_TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")


class PublishedHandler(PathHandler):
    """``published://NAME``: NAME is a shipped config's or a checkpoint's of docs/model_zoo.md.

    A file that lies in the cache under the checkpoint's name is taken; else it is fetched.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        entry = find(path.removeprefix(PREFIX))
        file = os.path.join(get_cache_dir(), "sparse_detr", entry.file_name)
        if not os.path.isfile(file):
            file = _fetched(entry, file, force)
        logger.info("%s: %s AP published by %s, in %s", path, entry.ap, entry.repository, file)
        if entry.sha256:
            _check(file, entry)
        return file


def _fetched(entry: Published, by_hand: str, force: bool) -> str:
    """The file in the cache; ``by_hand`` is where a user may put it instead."""
    if entry.needs_browser:
        raise UserError(
            f"the weights {entry.name} cannot be fetched by a program: open {entry.url} "
            f"({entry.note or entry.name}) in a browser and save the file as {by_hand}"
        )
    try:
        return PathManager.get_local_path(entry.url, force=force)
    except OSError as error:
        raise UserError(
            f"cannot fetch the weights {entry.url} ({error}): fetch them elsewhere and save the "
            f"file as {by_hand}"
        ) from None


def _check(file: str, entry: Published) -> None:
    sha256 = hashlib.sha256()
    with open(file, "rb") as content:
        while part := content.read(2**20):
            sha256.update(part)
    if (digest := sha256.hexdigest()) != entry.sha256:
        raise UserError(
            f"{file} is not the published file: its sha256 is {digest}, that of {entry.name} is "
            f"{entry.sha256}. Delete it and start again, or fetch it elsewhere"
        )


class HuggingFaceHandler(PathHandler):
    """``hf://OWNER/NAME``, with ``@REVISION`` and ``/FILE`` behind it where they are others than the newest
    revision and the model's weights. Needs the package huggingface_hub, whose cache and login it uses."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["hf://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", path)
        if match is None:
            raise UserError(
                f"weights: {path}, expected hf://owner/name, hf://owner/name@revision or .../file"
            )
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        except ImportError as error:
            raise UserError(f"{path} needs a package: pip install huggingface_hub") from error
        repository, revision, file = match.groups()
        names = [file] if file else list(_TRANSFORMERS_FILES)
        for name in names:
            try:
                return hf_hub_download(repository, name, revision=revision, force_download=force)
            except (
                LocalEntryNotFoundError
            ) as error:  # neither on the hub, which is out of reach, nor in the cache
                reason: Exception = error
                break
            except EntryNotFoundError as error:
                reason = error
            except (OSError, ValueError) as error:  # no such repository, a bad name, no connection
                reason = error
                break
        said = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise UserError(
            f"cannot fetch {' or '.join(names)} of {path} ({said}): fetch the file elsewhere and pass "
            "train.init_checkpoint=/path/to/it"
        ) from None


class TimmHandler(PathHandler):
    """``timm://NAME`` and ``timm://NAME.TAG``: the ImageNet weights that timm names for its model."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["timm://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path.removeprefix("timm://")
        try:
            import timm
        except ImportError as error:
            raise UserError(f"{path} needs a package: pip install timm") from error
        try:
            found = timm.get_pretrained_cfg(name)
        except RuntimeError as error:  # an unknown tag
            found, reason = None, f" ({error})"
        else:
            reason = ""
        source = found and (f"hf://{found.hf_hub_id}" if found.hf_hub_id else found.url)
        if not source:
            tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
            raise UserError(
                f"timm has no weights {name}{reason}: "
                + (
                    f"take one of {listed(tags)}"
                    if tags
                    else "pass a file, or nothing, as train.init_checkpoint"
                )
            )
        return PathManager.get_local_path(source, force=force)


def weights_in(folder: str) -> str:
    """The weights in a folder that transformers' ``save_pretrained`` has written.

    Raises:
        UserError: there are none.
    """
    for name in _TRANSFORMERS_FILES:
        if os.path.isfile(file := os.path.join(folder, name)):
            return file
    is_run = os.path.isfile(os.path.join(folder, "config.yaml"))
    raise UserError(
        f"weights: {os.path.abspath(folder)} is a folder and holds no {' or '.join(_TRANSFORMERS_FILES)}: "
        + (
            f"pass the run's checkpoint, {os.path.join(folder, 'model_final.pth')}"
            if is_run
            else "pass a file"
        )
    )


for _handler in (PublishedHandler(), HuggingFaceHandler(), TimmHandler()):
    PathManager.register_handler(_handler, allow_override=True)
