"""The names of GGUF files: which of a folder's are models, and the parts of one."""

from __future__ import annotations

import re
from collections.abc import Collection

from deltamerge.errors import InputError

SUFFIX = ".gguf"
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MOST_PARTS = 10_000


def parts_of(name: str, names: Collection[str]) -> list[str]:
    """The files of the model that begins with the file `name`. InputError: one of them is not among `names`."""
    found = SPLIT.fullmatch(name)
    if found is None:
        return [name]
    count = int(found["count"])
    parts = [f"{found['stem']}-{i:05d}-of-{count:05d}{SUFFIX}" for i in range(1, min(count, MOST_PARTS) + 1)]
    if missing := [part for part in parts if part not in names]:
        raise InputError(f"missing part {missing[0]}", hint="download it, or the whole model again")
    return parts


def first_parts(names: Collection[str]) -> list[str]:
    """The GGUF files among `names` that are models: of one in parts the first. Projectors of pictures are none."""
    found = sorted(name for name in names if name.endswith(SUFFIX) and not name.startswith("mmproj"))
    numbers = {name: match["number"] for name in found if (match := SPLIT.fullmatch(name))}
    return [name for name in found if numbers.get(name, "00001") == "00001"]


def the_model(names: Collection[str]) -> str | None:
    """The only GGUF model among a folder's file names, its first part; None if there is none.

    InputError: there are several.
    """
    found = first_parts(names)
    if len(found) > 1:
        hint = f"name one: FOLDER/{found[0]}, or org/name:{found[0]} on the hub"
        raise InputError(f"{len(found)} GGUF models", hint=hint)
    return found[0] if found else None
