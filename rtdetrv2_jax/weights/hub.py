"""From what a user calls a model to a folder on this machine: a path, a carried model, or an id on the hub."""

import os
import re
from pathlib import Path

from rtdetrv2_jax.weights.files import CONFIG, INDEX, PREPROCESSOR

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CARRIED = {"rtdetrv2-demo": Path(__file__).parents[1] / "demo_model"}
"""Models that this package holds, by name: small, for trying things out."""
_WANTED = [CONFIG, PREPROCESSOR, INDEX, "model*.safetensors"]


class SourceError(ValueError):
    """A model that can't be found or fetched."""


def find(source: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The local folder or file of a model: a path as it is, a carried model, a hub id through the hub's cache.

    The hub's own settings hold: `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN`.

    Args:
        source: A path, "rtdetrv2-demo", or an id such as "PekingU/rtdetr_v2_r18vd".
        revision: A branch, tag or commit of the hub's repository.

    Raises:
        SourceError: No such path, no such repository, or neither network nor cached copy.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = os.fspath(source)
    if name in CARRIED:
        return CARRIED[name]
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise SourceError(
            f"there is no file or folder {name!r}, and it is not a hub id such as 'PekingU/rtdetr_v2_r18vd' either"
        )
    return _fetch(name, revision=revision)


def _fetch(name: str, *, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=_WANTED)
    except errors.GatedRepoError:
        raise SourceError(
            f"{name} is gated: accept its terms on {constants.ENDPOINT}/{name} and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(
            f"{name} has no revision {revision!r}: {constants.ENDPOINT}/{name}/tree/main lists them"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"there is no {name!r} on {constants.ENDPOINT}, nor a folder of that name here; "
            "if it is private, set HF_TOKEN"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise SourceError(_unreachable(name, revision or "main", constants.ENDPOINT, error)) from None
    if not any(Path(folder).iterdir()):
        raise SourceError(f"{name} holds none of {', '.join(_WANTED)}: it is not an RT-DETRv2 in safetensors form")
    return Path(folder)


def _unreachable(name: str, revision: str, endpoint: str, error: Exception) -> str:
    cause = str(error).strip().splitlines()
    return (
        f"{name} is not in the local cache and could not be fetched from {endpoint} "
        f"({type(error).__name__}: {cause[0] if cause else 'no reason given'}).\nOther ways to get it:\n"
        f"  - on a machine with internet, download {CONFIG}, {PREPROCESSOR} and model.safetensors from\n"
        f"    {endpoint}/{name}/tree/{revision}, copy the folder here, and give its path instead of the id;\n"
        "  - set HF_ENDPOINT to a mirror that this machine reaches;\n"
        "  - copy another machine's cache and set HF_HOME to it."
    )
