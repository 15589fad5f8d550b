"""The Hugging Face hub: saved models are uploaded to it and downloaded from it by ``huggingface_hub``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

HUB_PREFIX = "hf-hub:"
"""In front of a repository's name, where a folder could stand."""


def is_on_hub(name: str | Path) -> bool:
    """Whether a name is a repository of the hub, not a folder."""
    return str(name).startswith(HUB_PREFIX)


def upload(folder: Path, repository: str, files: Sequence[str], message: str) -> str:
    """Upload files of a folder in one commit, making the repository if it is not there.

    Args:
        folder: Where the files are.
        repository: "user/name".
        files: Names in the folder.
        message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: It is not a name of a repository.
        huggingface_hub.errors.HfHubHTTPError: The hub refused: no login (``hf auth login``), no right to write ...
    """
    from huggingface_hub import HfApi

    name = repository.removeprefix(HUB_PREFIX)
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"push_to_hub is {repository!r}; give the repository as user/name")
    api = HfApi()
    api.create_repo(name, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name, folder_path=folder, allow_patterns=list(files), commit_message=message
    )
    return str(commit.commit_url)


def download(name: str, files: Sequence[str]) -> Path:
    """Download files of a repository, or take them from the cache.

    Args:
        name: "hf-hub:user/name", or "hf-hub:user/name@revision".
        files: The only ones to fetch.

    Returns:
        The folder in the cache that holds them.

    Raises:
        FileNotFoundError: There is no such repository or revision, or it cannot be reached and is not in the cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    try:
        found = HfApi().snapshot_download(repository, revision=revision or None, allow_patterns=list(files))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} cannot be fetched from the Hugging Face hub ({str(error).partition(chr(10))[0]}); give "
            "hf-hub:user/name of a model that save_pruned(..., push_to_hub=...) put there, or a folder"
        ) from error
    return Path(found)
