"""Uploading an export."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from more_ds.errors import UserError


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a model repository of the hub, which is made private if it is not there; returns its address.

    Raises:
        UserError: the hub cannot be reached or refuses; the folder stays as it is.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder} could not be pushed to '{repository}': {reason}; it is still there") from error
    return str(url)
