"""What huggingface_hub raises, as one line of ours and a hint, which never hold the token."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltamerge.errors import DeltamergeError, InputError
from deltamerge.models.hub_guard import NETWORK

AGAIN = "push again: what has arrived is not sent again"


class UnreachableError(InputError):
    """The hub cannot be reached, and its cache lacks what is needed."""


@contextmanager
def explained_upload() -> Iterator[None]:
    """Turn what huggingface_hub raises during an upload into one line and a hint, which never hold the token."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    try:
        yield
    except DeltamergeError:
        raise
    except Exception as raised:
        # the client wraps failures of its threads
        error = raised.__cause__ if type(raised) is RuntimeError and raised.__cause__ else raised
        if isinstance(error, hub.HfHubHTTPError):
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403, 404):
                hint = "`hf auth login` with a token that may write"
                raise InputError("may not be written", hint=hint) from raised
            raise InputError(f"{constants.ENDPOINT} answered {status or 'an error'}", hint=AGAIN) from raised
        if constants.HF_HUB_OFFLINE:
            raise InputError("HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE") from raised
        if type(error).__module__.partition(".")[0] in NETWORK or isinstance(error, ConnectionError):
            raise InputError(f"{constants.ENDPOINT} cannot be reached", hint=AGAIN) from raised
        raise


@contextmanager
def explained(hub_id: str, revision: str | None, folder: Path, config: str = "config.json") -> Iterator[None]:
    """Turn what huggingface_hub raises into one line and a hint."""
    try:
        yield
    except DeltamergeError:
        raise
    except Exception as error:
        explained = _explain(error, hub_id, revision, folder, config)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, hub_id: str, revision: str | None, folder: Path, config: str) -> InputError | None:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    here, page = f"no such folder in {folder}", f"{constants.ENDPOINT}/{hub_id}"
    if isinstance(error, hub.GatedRepoError):
        return InputError("is gated on the hub", hint=f"accept its terms at {page}, then `hf auth login`")
    if isinstance(error, hub.RepositoryNotFoundError | hub.HFValidationError):
        return InputError(
            f"{here}, and no such model on the hub",
            hint=near(hub_id, folder) or "write the path of a local folder; for a private model `hf auth login`",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return InputError(f"has no revision {revision}", hint=f"see its branches, tags and commits at {page}/tree/main")
    if isinstance(error, hub.HfHubHTTPError) and not isinstance(error, hub.EntryNotFoundError):
        status = error.response.status_code if error.response is not None else "an error"
        return InputError(f"{constants.ENDPOINT} answered {status}", hint="try again; HF_HUB_OFFLINE=1 uses the cache")
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        return InputError(f"has no {config} on the hub", hint=f"see {page}/tree/main")
    if constants.HF_HUB_OFFLINE:
        return UnreachableError(
            f"{here}, not (wholly) in the hub's cache, and HF_HUB_OFFLINE is set",
            hint=near(hub_id, folder) or "unset HF_HUB_OFFLINE, or write the path of a local folder",
        )
    if isinstance(error.__cause__, hub.FileMetadataError):
        hint = "HF_ENDPOINT may name what is no hub"
        return InputError("the hub's answer lacks its commit, ETag or length: what arrives is not known", hint=hint)
    network = type(error).__module__.partition(".")[0] in NETWORK
    if network or isinstance(error, hub.LocalEntryNotFoundError | ConnectionError):
        return UnreachableError(
            f"{here}, not (wholly) in the hub's cache, and {constants.ENDPOINT} cannot be reached",
            hint=near(hub_id, folder) or "see the connection and HF_ENDPOINT, or write the path of a local folder",
        )
    if isinstance(error, OSError):
        return InputError(f"cannot be downloaded: {error.strerror or type(error).__name__}")
    return None


def near(reference: str, folder: Path) -> str | None:
    """A hint that names the folder that was probably meant, or None."""
    parent, name = os.path.split(os.path.expanduser(reference).rstrip("/"))
    try:
        names = [entry.name for entry in os.scandir(folder / parent) if entry.is_dir()]
    except OSError:
        return None
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f"did you mean {os.path.join(os.path.split(reference.rstrip('/'))[0], found[0])}?" if found else None
