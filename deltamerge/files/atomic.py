"""Atomic changes of names: a file is replaced whole or not at all, two folders exchange their names in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import OutputError
from deltamerge.files.descriptors import lock, opened, output_error, system, write_at, writing

# The name of a file until it is complete; a lock on it says that its writer is alive.
PASSING = re.compile(r"\..{1,48}\.[0-9a-f]{16}\.deltamerge", re.DOTALL)
NOREPLACE, EXCHANGE = 1, 2
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
TRIES = 3


def replace_file(path: Path, data: bytes | str, *, new: bool = False) -> None:
    """Write `data` to the disk under the name `path`, which keeps its old content until all of the new is there.

    OutputError: the name is a link, a folder or no plain file; it exists although it must be `new`; or it cannot be
    written.
    """
    raw = data.encode() if isinstance(data, str) else data
    with errors.context(str(path)):
        refuse_taken(path, new=new)
        with writing(), opened(path.parent, os.O_RDONLY | os.O_DIRECTORY) as folder:
            try:
                _replace(folder, path, raw, new=new)
            except FileExistsError:
                raise OutputError("is there already", hint="choose another name") from None


def refuse_taken(path: Path, *, new: bool = False) -> None:
    """Raise OutputError if `path` is a link, a folder or no plain file, or exists although it must be `new`."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise output_error(error) from error
    if stat.S_ISLNK(mode):
        raise OutputError(
            f"is a link, to {os.readlink(path)!r}, and nothing is written through links",
            hint="remove the link, or name the file itself",
        )
    if new:
        raise OutputError("is there already", hint="choose another name")
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no plain file"
        raise OutputError(f"cannot be written: it is {kind}", hint="choose another name")


def sweep(folder: int, name: str = "") -> None:
    """Remove leftovers of killed writers of the file `name` in an open folder; of all files without a name."""
    start = f".{name[:48]}." if name else "."
    for entry in os.listdir(folder):
        if not (entry.startswith(start) and PASSING.fullmatch(entry)):
            continue
        with suppress(OSError), opened(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, folder) as fd:
            if lock(fd):
                os.unlink(entry, dir_fd=folder)


def _replace(folder: int, path: Path, raw: bytes, *, new: bool) -> None:
    name = path.name
    sweep(folder, name)
    for left in reversed(range(TRIES)):
        passing = f".{name[:48]}.{secrets.token_hex(8)}.deltamerge"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(passing, flags, 0o666, dir_fd=folder)
        try:
            with suppress(OSError):
                lock(fd)
            write_at(fd, 0, memoryview(raw))
            with suppress(FileNotFoundError):
                os.fchmod(fd, stat.S_IMODE(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode))
            os.fsync(fd)
            if new:
                _take_name(folder, passing, name)
            else:
                os.rename(path.parent / passing, path)
            break
        except FileNotFoundError:  # swept by another writer, before it was locked
            if not left:
                raise
        except BaseException:
            with suppress(OSError):
                os.unlink(passing, dir_fd=folder)
            raise
        finally:
            os.close(fd)
    os.fsync(folder)


def _take_name(folder: int, passing: str, name: str) -> None:
    """Give a file a free name. FileExistsError: the name is taken."""
    if _renameat2(folder, os.fsencode(passing), folder, os.fsencode(name), NOREPLACE):
        return
    os.link(passing, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.unlink(passing, dir_fd=folder)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders of one file system in one step; False where the system cannot. OSError: it
    failed."""
    here = -100  # AT_FDCWD
    return _renameat2(here, os.fsencode(first), here, os.fsencode(second), EXCHANGE)


def _renameat2(old_folder: int, old: bytes, new_folder: int, new: bytes, flags: int) -> bool:
    """Call renameat2; False where the system or the file system lacks its flags. OSError: it failed."""
    call = getattr(system(), "renameat2", None)
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call(old_folder, old, new_folder, new, flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNABLE:
        return False
    raise OSError(code, os.strerror(code), os.fsdecode(new))
