"""Buffers on their way to files: what arrives, in which order they may be sent, and what a failing disk does."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import pytest

from deltamerge.errors import InputError, OutputError
from deltamerge.files import outbox
from deltamerge.files.journal import Spans
from deltamerge.files.outbox import LEAST, READ, Outbox
from deltamerge.formats import audit
from deltamerge.formats import safetensors as writer
from deltamerge.formats.safetensors import Layout, Writer, plan_layout

ELEMENTS = 3_000_001
PIECE = LEAST + 4


@pytest.fixture
def layout() -> Layout:
    return plan_layout([("a", "U8", (ELEMENTS,)), ("b", "F32", (500_000,)), ("c", "BF16", (3,))], 10**9)


def pieces(layout: Layout, seed: int | None) -> Iterator[tuple[str, int, int]]:
    """Every byte of the layout in pieces, in order of place, or shuffled."""
    names = sorted(layout.tensors, key=lambda name: layout.tensors[name].offset)
    every = [
        (name, start, min(PIECE, layout.tensors[name].nbytes - start))
        for name in names
        for start in range(0, layout.tensors[name].nbytes, PIECE)
    ]
    if seed is not None:
        random.Random(seed).shuffle(every)
    yield from every


def write(folder: Path, layout: Layout, seed: int | None, threads: int = 1) -> tuple[bytes, str]:
    """The file as it should be, and the hash that was found."""
    whole = np.random.default_rng(0).integers(0, 100, layout.files[0].size, np.uint8)
    whole[: len(layout.files[0].header)] = np.frombuffer(layout.files[0].header, np.uint8)
    todo, lock = pieces(layout, seed), threading.Lock()

    def work(out: Writer) -> None:
        while True:
            with lock:
                item = next(todo, None)
            if item is None:
                return
            name, start, nbytes = item
            at = layout.tensors[name].offset + start
            memory = out.lend(name, start, nbytes)
            memory[:] = whole[at : at + nbytes]
            out.give(name, start, memory)

    with Writer(folder, layout) as out:
        workers = [threading.Thread(target=work, args=(out,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found = out.finish()
    return whole.tobytes(), found.hashes[layout.files[0].name]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("room", [LEAST, 1 << 25])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_every_byte_arrives_and_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, direct: bool, room: int, seed: int | None
) -> None:
    monkeypatch.setattr(outbox, "ROOM", room)
    if not direct:
        monkeypatch.setattr(outbox, "takes_direct", lambda _: False)
    whole, found = write(tmp_path, layout, seed, threads=1 if seed is None else 3)
    assert (tmp_path / "model.safetensors").read_bytes() == whole
    assert found == f"blake3:{blake3.blake3(whole).hexdigest()}"


@pytest.mark.parametrize("limit", [None, 1, 5000])
def test_a_disk_that_takes_no_direct_writes_or_only_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, limit: int | None
) -> None:
    """EINVAL for each write of whole pages, or fewer bytes written than asked for."""
    pwrite = os.pwrite

    def odd(fd: int, data: Any, offset: int) -> int:
        if limit is None and len(data) >= LEAST // 2 and offset % 4096 == 0:
            refused.append(offset)
            if len(refused) == 1:
                raise OSError(errno.EINVAL, "no")
        return pwrite(fd, data[: max(limit, len(data) // 2)] if limit else data, offset)

    refused: list[int] = []
    monkeypatch.setattr(os, "pwrite", odd)
    whole, found = write(tmp_path, layout, None)
    assert (tmp_path / "model.safetensors").read_bytes() == whole
    assert found == f"blake3:{blake3.blake3(whole).hexdigest()}"
    assert refused or limit


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failure_behind_the_back_is_met_by_who_writes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout, code: int
) -> None:
    pwrite = os.pwrite

    def fail(fd: int, data: Any, offset: int) -> int:
        if len(data) >= LEAST // 2:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, data, offset)

    with Writer(tmp_path, layout) as out:
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(OutputError, match="cannot be written") as caught:  # noqa: PT012
            for start in range(0, ELEMENTS, PIECE):
                out.write("a", start, bytes(min(PIECE, ELEMENTS - start)))
            out.finish()
    assert caught.value.where == ["model.safetensors"]


def test_who_writes_does_not_wait_for_a_reader_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    def fail(*_: Any) -> None:
        raise InputError("cannot be read: no")

    monkeypatch.setattr(outbox, "ROOM", PIECE)
    monkeypatch.setattr(writer, "PIECE", PIECE)
    monkeypatch.setattr(audit, "count_nonfinite", fail)
    with Writer(tmp_path, layout) as out, pytest.raises(InputError, match="no"):
        out.write("b", 0, bytes(2_000_000))


def test_memory_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "ROOM", PIECE)
    path = tmp_path / "x"
    path.write_bytes(bytes(40 * PIECE))
    written: list[int] = []
    box = Outbox(tmp_path, lambda _, start, __: written.append(start), lambda *_: 0, path)
    addresses = set()
    for start in range(0, 40 * PIECE, PIECE):
        memory = box.lend(start, PIECE)
        assert (memory.ctypes.data - start) % 4096 == 0
        addresses.add(memory.base.ctypes.data)
        memory[:] = start // PIECE
        box.send("x", start, memory)
        assert isinstance(box.follow("x", start, 40 * PIECE), np.ndarray)
        box.finished("x", start)
    box.drain()
    box.close()
    assert sorted(written) == [*range(0, 40 * PIECE, PIECE)]
    assert len(addresses) <= 4
    assert path.read_bytes() == bytes(i for i in range(40) for _ in range(PIECE))


def test_what_a_resumed_run_sends_again_is_read_from_the_file(tmp_path: Path) -> None:
    """An earlier run wrote the first half of a piece, which is read before the whole piece is sent."""
    half, size = READ, 3 * READ
    path = tmp_path / "x"
    path.write_bytes(bytes(size))
    spans = Spans([(0, 2 * half)])
    box = Outbox(
        tmp_path, lambda _, start, nbytes: spans.add(start, start + nbytes), lambda _, at: spans.reach(at), path
    )
    assert box.follow("x", 0, size) == 2 * half
    memory = box.lend(half, 2 * half)
    memory[:] = 7
    box.send("x", half, memory)
    assert box.follow("x", 2 * half, size) == size
    box.drain()
    assert box._bytes == 0  # it would fill up, and who makes more would wait for ever
    box.close()
    assert path.read_bytes() == bytes(half) + bytes([7]) * (2 * half)


@pytest.mark.parametrize(("workers", "expected"), [(1, True), (16, False)])
def test_pieces_of_many_workers_are_hashed_from_memory(
    workers: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 threads end in any order, two pieces of each before the first: with room for these none is read back from its
    file, however late the system wakes the reader."""
    monkeypatch.setattr(outbox, "ROOM", 4 * LEAST)
    monkeypatch.setattr(outbox, "SLAB", LEAST)
    count, path = 96, tmp_path / "x"
    path.write_bytes(bytes(count * LEAST))
    forgotten: list[int] = []
    forget = Outbox._forget
    monkeypatch.setattr(Outbox, "_forget", lambda self: (forgotten.append(1), forget(self))[1])
    spans, lock = Spans(), threading.Lock()

    def wrote(_: str, start: int, nbytes: int) -> None:
        with lock:
            spans.add(start, start + nbytes)

    def reach(_: str, at: int) -> int:
        with lock:
            return spans.reach(at)

    class Late(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            woken = super().wait(timeout)
            if threading.current_thread() is reader:
                self.release()
                time.sleep(0.02)
                self.acquire()
            return woken

    box = Outbox(tmp_path, wrote, reach, path, outbox.room_for(workers))
    box._changed = Late()

    def follow() -> None:
        at = 0
        while at < count * LEAST:
            found = box.follow("x", at, count * LEAST)
            assert found is not None
            if isinstance(found, int):
                at = found
            else:
                box.finished("x", at)
                at += len(found)

    reader = threading.Thread(target=follow)
    reader.start()
    for first in range(0, count, 32):
        for piece in reversed(range(first, first + 32)):  # the first is made last
            box.send("x", piece * LEAST, box.lend(piece * LEAST, LEAST))
    reader.join()
    box.drain()
    box.close()
    assert bool(forgotten) == expected
