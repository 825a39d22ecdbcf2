"""The folder of a base: found on disk or fetched from the Hugging Face Hub, and checked before anything is loaded."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ptuning.errors import BaseError, suggest
from ptuning.model.safetensors_files import INDEX, WHOLE, index_files, stored_tensors
from ptuning.paths import locate
from ptuning.settings.fields import HUB_ID
from ptuning.settings.messages import quoted
from ptuning.settings.model import ModelConfig

BUILTIN = Path(__file__).parent.parent / "builtin" / "base"

DESCRIPTION = ["*.json", "*.model", "*.txt", "*.jinja"]
"""Files of a base that are not weights."""


def find_folder(config: ModelConfig) -> Path:
    """The folder of a base. Of a base on the Hub, only the files that are read are fetched.

    Raises:
        BaseError: there is no such folder, and no such base on the Hub.
    """
    if config.path == "builtin":
        return BUILTIN
    folder = locate(config.path)
    if folder.is_dir():
        return folder.absolute()
    fix = suggest(config.path, ["builtin"], "correct the path", shown=quoted)
    if not HUB_ID.fullmatch(config.path) or fix != "correct the path":
        raise BaseError(f"model.path: {config.path} is neither an existing folder nor a Hugging Face id; {fix}")
    try:
        return _fetch(config)
    except BaseError as error:
        raise BaseError(f"model.path: {error}") from None
    except Exception as error:  # the hub client raises many types (offline, unknown, gated); the fix is the same
        reason = str(error).splitlines()[0]
        raise BaseError(
            f"model.path: {config.path} was not found on the Hugging Face Hub or in its cache ({reason}); "
            "check the id, log in, or give a folder"
        ) from None


def _fetch(config: ModelConfig) -> Path:
    """The files at the top of the repository, and of its weights those that the index lists."""

    names = [*DESCRIPTION, *(["*.py"] if config.trust_remote_code else [])]
    folder = Path(snapshot_download(config.path, revision=config.revision, allow_patterns=names, ignore_patterns=["*/*"]))
    if (folder / "adapter_config.json").is_file():
        return folder  # refused by `check_folder`

    def fetch(*names: str) -> None:  # of the same commit
        snapshot_download(config.path, revision=folder.name, allow_patterns=list(names), ignore_patterns=["*/*"])

    if (folder / INDEX).is_file():
        fetch(*map(glob.escape, index_files(folder / INDEX)))
    else:
        fetch(WHOLE)
        if not (folder / WHOLE).is_file():
            fetch("*.safetensors")
    return folder


def check_folder(config: ModelConfig, folder: Path) -> None:
    """Refuse a folder that cannot be loaded as it is, or whose loading would do more than reading a model.

    Raises:
        BaseError: names what is missing or in the way.
    """
    if not (folder / "config.json").is_file():
        raise BaseError(f"model.path: {config.path} has no config.json; give a Hugging Face id or a folder with a model")
    _check_code(config, folder)
    if (folder / "adapter_config.json").is_file():
        raise BaseError(
            f"model.path: {config.path} contains a PEFT adapter (adapter_config.json), which transformers would apply to the "
            "base; give a folder with the base alone, or merge the adapter into it"
        )
    try:
        for _ in stored_tensors(folder):  # the headers of all files
            pass
    except BaseError as error:
        raise BaseError(f"model.path: {str(error).replace(str(folder), config.path, 1)}") from None


def read_config_json(config: ModelConfig, folder: Path) -> dict[str, Any]:
    """The content of a base's config.json.

    Raises:
        BaseError: it is not a JSON object.
    """
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise BaseError(f"model.path: {config.path} has a config.json that is not a JSON object; use another copy")
    return described


def _check_code(config: ModelConfig, folder: Path) -> None:
    """Refuse a folder whose config loads code from elsewhere, unless the experiment allows it.

    `auto_map` alone is harmless: transformers uses its own class if it knows the model type, and refuses otherwise. But the
    name of an attention implementation may be a Hub repository, from which transformers downloads and runs code without asking
    if the package `kernels` is installed (5.23, modeling_utils.py).
    """
    if config.trust_remote_code:
        return
    described = read_config_json(config, folder)
    for place in (described, *(each for each in described.values() if isinstance(each, dict))):  # such as a nested text_config
        for key, value in place.items():
            if key.strip("_").startswith(("attn_implementation", "experts_implementation")) and _is_foreign(value):
                raise BaseError(
                    f"model.path: {config.path} has {key} = {str(value)[:80]!r} in its config.json, which is code from "
                    "elsewhere; remove it, or set model.trust_remote_code = true if you trust it"
                )


def _is_foreign(value: Any) -> bool:
    return any(map(_is_foreign, value.values())) if isinstance(value, dict) else "/" in str(value)
