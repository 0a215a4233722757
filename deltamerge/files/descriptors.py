"""Reads, writes and copies at offsets of files, from any thread, and locks; the number of open files is bounded."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deltamerge.errors import DeltamergeError, InputError, OutputError

MAX_OPEN = 64
COPY_PIECE = 4 << 20
# Opens a file for writing past the page cache; offsets and memory must be page-aligned. 0: the system has no such flag.
DIRECT = getattr(os, "O_DIRECT", 0)
PAGE = 4096
# Opens no link, and refuses a pipe instead of waiting for its writer.
NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK

_FREE = "free space, or choose another folder with --out"
_OTHER = "choose another folder with --out"
_REASONS = {
    errno.ENOSPC: ("no space left on the device", _FREE),
    errno.EDQUOT: ("the disk quota is exceeded", _FREE),
    errno.EFBIG: ("the file would be larger than the file system or `ulimit -f` allows", "use a smaller shard_size"),
    errno.EACCES: ("permission denied", _OTHER),
    errno.EPERM: ("not permitted", _OTHER),
    errno.ENOENT: ("no such folder", _OTHER),
    errno.ENOTDIR: ("a file is where a folder should be", _OTHER),
    errno.EEXIST: ("it is there already", _OTHER),
    errno.EROFS: ("the file system is read-only", _OTHER),
    errno.EBUSY: ("it is in use; is it a mount point?", "choose a folder inside it with --out"),
}


def input_error(error: OSError) -> InputError:
    """Return the InputError for an OSError on a source."""
    reason = "it vanished" if error.errno == errno.ENOENT else error.strerror
    return InputError(f"cannot be read: {reason}")


def output_error(error: OSError) -> OutputError:
    """Return the OutputError for an OSError on a target, with a hint."""
    reason, hint = _REASONS.get(error.errno or 0, (error.strerror, None))
    return OutputError(f"cannot be written: {reason}", hint=hint)


def check_folder(path: Path, hint: str | None = None, *, makes: bool = False) -> None:
    """Raise OutputError unless files can be made in the folder `path`. `makes`: it is made, where it is missing.

    So a command learns it before it computes what it writes there.
    """
    whole = place = Path(os.path.abspath(path))
    while makes and not os.path.lexists(place):
        place = place.parent
    code = errno.EACCES
    if not place.is_dir():
        code = errno.ENOTDIR if os.path.lexists(place) else errno.ENOENT
    elif os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return
    elif os.statvfs(place).f_flag & os.ST_RDONLY:
        code = errno.EROFS
    cause = output_error(OSError(code, ""))
    raise OutputError(f"{path if place == whole else place}: {cause}", hint=hint or cause.hint)


@contextmanager
def reading() -> Iterator[None]:
    """Turn an OSError on a source into the InputError for it."""
    try:
        yield
    except OSError as error:
        raise input_error(error) from error


@contextmanager
def writing(where: Path | None = None) -> Iterator[None]:
    """Turn an OSError on a target into the OutputError for it; `where` is named in front of it."""
    try:
        yield
    except OSError as error:
        found = output_error(error)
        found.where = [] if where is None else [str(where)]
        raise found from error


@contextmanager
def opened(path: str | Path, flags: int = os.O_RDONLY, folder: int | None = None) -> Iterator[int]:
    """Yield an open file or folder (of an open `folder`), closed at the end. OSError: it cannot be opened."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666, dir_fd=folder)
    try:
        yield fd
    finally:
        os.close(fd)


def open_plain(path: Path, flags: int) -> int:
    """Open a file of ours, creating it if `flags` say so. OutputError: it is a link or no plain file."""
    try:
        fd = os.open(path, flags | NO_LINK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise OutputError(f"{path}: is a link, which no run wrote", hint="remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OutputError(f"{path}: is no plain file, which no run wrote", hint="remove it")
    return fd


def lock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file at once, or return False where another holds it. The system drops the lock with the process.

    filelock's only shared lock is a transaction on an SQLite file, which cannot name its holder. So a `shared` lock is
    `flock` itself, the call that filelock's exclusive lock makes too: the two exclude each other.
    """
    if not shared:
        from filelock import lock_descriptor

        return lock_descriptor(fd, blocking=False)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def refuse_link(path: Path) -> None:
    """Raise InputError if `path`, a file of a model, is a link that leaves the model's folder.

    A stranger's model must not name the user's own files. Links of the hub's cache may lead from snapshots to blobs,
    and on to blobs that repositories share.
    """
    if not path.is_symlink():
        return
    home = path.parent.resolve()
    homes = [home]
    for snapshot in (home, *home.parents):
        repository = snapshot.parent.parent
        cached = repository.name.startswith("models--")
        if snapshot.parent.name == "snapshots" and (cached or snapshot == home):
            homes = [repository, *([repository.parent / "blobs"] if cached else [])]
            break
    target = Path(os.path.realpath(path))  # Path.resolve raises where links go round
    if not any(map(target.is_relative_to, homes)):
        raise InputError(f"{path.name} is a link that leaves the folder", hint="put the file itself there")


class Descriptor:
    """An open file that is closed with its last user; `fd` is valid while this object is held."""

    __slots__ = ("fd",)

    def __init__(self, path: Path, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # modules are gone when the interpreter ends
        if self.fd >= 0:
            close(self.fd)


class Descriptors:
    """Files opened with `flags` on first use; the last `MAX_OPEN` used stay open. Thread-safe."""

    def __init__(self, flags: int, fault: Callable[[OSError], DeltamergeError]) -> None:
        self._flags = flags
        self._fault = fault
        self._open: OrderedDict[Path, Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> Descriptor:
        """Return the open file at `path`. OSError: it cannot be opened."""
        with self._lock:
            held = self._open.get(path)
            if held is None:
                try:
                    held = self._open[path] = Descriptor(path, self._flags)
                except OSError as error:
                    raise self._fault(error) from error
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return held

    def close(self) -> None:
        with self._lock:
            self._open.clear()


def flat(buffer: Any) -> memoryview:
    """Return the bytes of a contiguous buffer of any element type and shape."""
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")


def read_at(fd: int, offset: int, out: memoryview) -> None:
    """Fill `out` with the bytes from `offset`. InputError: the file ends before, or cannot be read."""
    done = 0
    while done < len(out):
        try:
            count = os.preadv(fd, [out[done:]], offset + done)
        except OSError as error:
            raise input_error(error) from error
        if count == 0:
            raise InputError(f"truncated while reading: {len(out) - done} bytes are missing at {offset + done}")
        done += count


def write_at(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data` from `offset`. OutputError: no space, no permission, or another failure."""
    done = 0
    with writing():
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)


def takes_direct(path: Path) -> bool:
    """Return whether a file can be opened for writing past the page cache."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC | DIRECT))
    except OSError:
        return False
    return DIRECT != 0


def write_direct(fd: int, offset: int, data: memoryview) -> int:
    """Write whole pages of `data` to a file opened with DIRECT, and return the number of bytes written.

    It is less than all only if the system takes no more past its cache.

    OutputError: no space, no permission, or another failure.
    """
    done = 0
    while done < len(data) and done % PAGE == 0:
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL:
                break
            raise output_error(error) from error
    return done


def reserve(fd: int, size: int) -> None:
    """Give an open file its size and, where the file system can, reserve its space. OSError: the system's."""
    if os.fstat(fd).st_size != size:
        os.ftruncate(fd, size)
    # not os.posix_fallocate: where the file system cannot, glibc touches every block instead
    fallocate = getattr(system(), "fallocate64", None)
    if fallocate is None:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if size and fallocate(fd, 0, 0, size):
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(code, os.strerror(code))


def sync(fd: int) -> None:
    """Sync the data of an open file to the disk. OutputError: some of it could not be written."""
    with writing():
        getattr(os, "fdatasync", os.fsync)(fd)


def sync_path(path: Path) -> None:
    """Sync a file's data, or a folder's entries, to the disk. OutputError: it failed."""
    with writing(), opened(path) as fd:
        sync(fd)


def start_writing(fd: int, offset: int, nbytes: int) -> None:
    """Ask the system to start writing a range to the disk, where it can be asked; `sync` waits for it and reports
    errors."""
    call = getattr(system(), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        call(fd, offset, nbytes, 2)  # SYNC_FILE_RANGE_WRITE


@cache
def system() -> ctypes.CDLL:
    """Return the C library, for calls that Python lacks."""
    return ctypes.CDLL(None, use_errno=True)


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """Yield a temporary folder: the system's, else one in `beside`. OutputError: neither can be made."""
    try:
        folder = TemporaryDirectory(prefix="deltamerge-")
    except OSError:
        try:
            folder = TemporaryDirectory(prefix=".deltamerge-", dir=beside)
        except OSError as error:
            raise OutputError(
                f"{beside}: {output_error(error)}, nor is there a folder for temporary files",
                hint="let TMPDIR name a folder that can be written",
            ) from error
    with folder as path:
        yield Path(path)


def copy_at(source: int, offset: int, nbytes: int, target: int, target_offset: int) -> None:
    """Copy bytes between files: inside the kernel (sharing extents where it can), else through a buffer.

        source          open file
        offset          first byte in it
        nbytes          number of bytes
        target          open file
        target_offset   where they go

    InputError, OutputError: as of `read_at` and `write_at`.
    """
    done = 0
    if hasattr(os, "copy_file_range"):
        try:
            while done < nbytes:
                count = os.copy_file_range(source, target, nbytes - done, offset + done, target_offset + done)
                if count == 0:
                    break
                done += count
        except OSError:
            pass  # not between these files (EXDEV, EINVAL, …), or a fault that the loop below meets and names
    buffer = memoryview(bytearray(min(COPY_PIECE, nbytes - done)))
    while done < nbytes:
        piece = buffer[: nbytes - done]
        read_at(source, offset + done, piece)
        write_at(target, target_offset + done, piece)
        done += len(piece)


# The content of a folder; links are not followed.


DEEPEST = 4  # folders inside one another
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


def is_plain_folder(folder: str) -> bool:
    """Return whether a folder of an output lies below the output's own, under plain names."""
    parts = folder.split("/")
    return len(parts) <= DEEPEST and all(_PART.fullmatch(part) and not part.endswith(".") for part in parts)


def files_of(folder: Path) -> dict[str, Path]:
    """Return path below `folder`, with slashes -> path, of every file in it and in its folders."""
    return {name: folder / name for name, _ in _entries(folder, "")}


def folders_in(folder: Path) -> list[Path]:
    """Return `folder` and the folders in it, the innermost first."""
    inner = {path.parent for path in files_of(folder).values()}
    above = {parent for path in inner for parent in (path, *path.parents) if parent.is_relative_to(folder)}
    return sorted(above | {folder}, key=lambda path: (-len(path.parts), path))


def entries(folder: Path, listed: Collection[str]) -> dict[str, int]:
    """Return the mode of every entry of `folder`, by its path below it. OSError: one cannot be read.

    Folders of `listed` files are entered; any other folder is one entry.
    """
    held = {parent.as_posix() for name in listed if is_inside(name) for parent in Path(name).parents}
    found: dict[str, int] = {}
    left = [""]
    while left:
        start = left.pop()
        for entry in os.scandir(folder / start):
            name = f"{start}/{entry.name}" if start else entry.name
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode) and name in held:
                left.append(name)
            else:
                found[name] = mode
    return found


def is_inside(name: str) -> bool:
    """Return whether a name in a lock is a file of the output's folder, or of a component's folder in it."""
    folder, slash, file = name.rpartition("/")
    plain = file not in ("", ".", "..") and "\\" not in file and "\0" not in file
    return plain and (not slash or is_plain_folder(folder))


def leads_out(folder: Path, name: str) -> bool:
    """Return whether a folder on the way from `folder` to its file `name` is a link."""
    return any((folder / parent).is_symlink() for parent in Path(name).parents if parent.parts)


def _entries(folder: Path, start: str) -> Iterator[tuple[str, int]]:
    for entry in sorted(os.scandir(folder / start), key=lambda entry: entry.name):
        name = f"{start}/{entry.name}" if start else entry.name
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield from _entries(folder, name)
        else:
            yield name, mode
