"""Data sets of the hub: ids, commits, and their first rows. No torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from deltamerge.errors import InputError
from deltamerge.models.hub_client import commit_of

WITHOUT_DATA = "pip install 'deltamerge[data]', or give a .jsonl, .csv or .txt file"
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>(?!.*\.\.)\w[\w./-]*))?", re.ASCII)
SHOWN_OF_ERROR = 200  # characters of a foreign error that are shown


def is_hub_id(source: str) -> bool:
    """Tell whether `source` has the form org/name or org/name@revision."""
    return HUB_ID.fullmatch(source) is not None


@cache
def commit(source: str) -> str | None:
    """Return the commit of `org/name[@revision]`; offline the revision that the source states, or None."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    found = HUB_ID.fullmatch(source)
    assert found is not None
    name, revision = found["id"], found["revision"]
    if constants.HF_HUB_OFFLINE or (revision and re.fullmatch("[0-9a-f]{40}", revision)):
        return revision
    page = f"{constants.ENDPOINT}/datasets/{name}"
    try:
        return commit_of(f"datasets/{name}", revision)
    except InputError:
        raise
    except hub.GatedRepoError:
        raise InputError("is gated on the hub", hint=f"accept its terms at {page}, then `hf auth login`") from None
    except hub.RepositoryNotFoundError:
        raise InputError(
            "no such file, and no such data set on the hub",
            hint="give a .jsonl, .csv or .txt file beside the recipe; for a private data set `hf auth login`",
        ) from None
    except hub.RevisionNotFoundError:
        raise InputError(f"has no revision {revision}", hint=f"see {page}/tree/main") from None
    except Exception as error:
        raise InputError(
            f"{constants.ENDPOINT} cannot be asked for it: {one_line(error)}", hint="HF_HUB_OFFLINE=1 uses the cache"
        ) from None


@cache
def read_hub(source: str, *, config: str | None, split: str, limit: int) -> tuple[Mapping[str, Any], ...]:
    """Return the first `limit` rows; streamed, or offline from the cache of `datasets`.

    InputError: `datasets` is missing, or cannot read the data set.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("reading a hub data set needs the datasets package", hint=WITHOUT_DATA) from None
    from huggingface_hub import constants

    found = HUB_ID.fullmatch(source)
    assert found is not None
    offline = bool(constants.HF_HUB_OFFLINE)
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(found["id"], config, split=split, revision=commit(source), streaming=not offline)
        return tuple(itertools.islice(rows, limit))
    except InputError:
        raise
    except Exception as error:
        hint = "see calibration.config and calibration.split"
        if offline:
            hint = "HF_HUB_OFFLINE is set: unset it, or load the data set once with datasets.load_dataset"
        raise InputError(f"datasets cannot read it: {one_line(error)}", hint=hint) from None


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= SHOWN_OF_ERROR else f"{text[:SHOWN_OF_ERROR]}…"
