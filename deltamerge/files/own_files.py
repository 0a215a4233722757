"""Files that are written beside a user's, under names that follow from his: known again by a mark, a last line with the
hash of what was written, and replaced only as long as they are what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from deltamerge import errors
from deltamerge.errors import OutputError
from deltamerge.errors.shown import shown
from deltamerge.files.atomic import refuse_taken, replace_file

COMMENTS = {".svg": ("<!-- ", " -->")}  # of all others: #
WORDS = "written by deltamerge, which replaces it while it is unchanged: "
MOST = 1 << 26  # bytes of a file that may be one of these


def replace_own(path: Path, text: str, of: str) -> None:
    """Write `text` and its mark to `path`, of the recipe file named `of`. OutputError: as `replace_file`."""
    raw = text.encode() if text.endswith("\n") or not text else f"{text}\n".encode()
    replace_file(path, raw + _mark(path, raw, of))


def refuse_others(
    path: Path, of: str, *, force: bool = False, unmarked: Callable[[Path], bool] = lambda path: False
) -> None:
    """OutputError: `path` is a link or a folder; or, but by `force`, a file that was not written of the recipe file
    named `of`, or that somebody has changed since.

    `unmarked` says of a file without a mark, of an earlier version, whether it was written so.
    """
    with errors.context(str(path)):
        refuse_taken(path)
        if force or not path.exists():
            return
        try:
            with path.open("rb") as file:
                raw = file.read(MOST + 1)
        except OSError as error:
            raise OutputError(f"is there, and cannot be read: {error.strerror}", hint="move it away") from None
        text, mark = _parted(raw)
        if mark == _mark(path, text, of) if mark else unmarked(path):
            return
        hint = "move it away, or replace it with --force"
        if mark:
            raise OutputError(f"was changed since it was written, or is of another recipe than {shown(of)}", hint=hint)
        raise OutputError(f"is there, and was not written for {shown(of)} by deltamerge", hint=hint)


def _mark(path: Path, text: bytes, of: str) -> bytes:
    begin, end = COMMENTS.get(path.suffix, ("# ", ""))
    digest = blake3(text + b"\0" + of.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return f"{begin}{WORDS}{digest}{end}\n".encode()


def _parted(raw: bytes) -> tuple[bytes, bytes]:
    """The text of a file, and from its mark on what follows; nothing if there is no mark."""
    at = raw.rfind(WORDS.encode())
    begin = raw.rfind(b"\n", 0, at) + 1 if at >= 0 else len(raw)
    return raw[:begin], raw[begin:]
