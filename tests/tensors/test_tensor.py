"""The lazy tensor: one object for equal tensors, and what its graph tells of files, parts and bytes."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from deltamerge.formats.peft.lora import low_rank, update_of
from deltamerge.plan.memory import cost
from deltamerge.tensors import tensor as module
from deltamerge.tensors.experts import join, turned
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import depth_first, schedule
from deltamerge.tensors.tensor import Graph, Read, Tensor, TensorInfo, part_of, stored, view, viewed
from deltamerge.tensors.views import gather, in_memory, moves_rows, zeros_like

FILE, OTHER = Path("a.safetensors"), Path("b.safetensors")


def named(name: str, begin: int = 0, shape: tuple[int, ...] = (4, 6), file: Path = FILE) -> TensorInfo:
    return TensorInfo(name, stored(file, begin, shape, "BF16", name))


def lora(base: TensorInfo) -> Tensor:
    a, b = named("a", 100, (2, 6), OTHER), named("b", 200, (4, 2), OTHER)
    return viewed(low_rank, [base, a, b], base.shape, base.dtype, scale=0.5, transposed=False)


def test_equal_tensors_are_one_object() -> None:
    base = named("w")
    assert stored(FILE, 0, (4, 6), "BF16", "w") is base.tensor
    assert lora(base) is lora(named("w"))
    assert zeros_like(base) is zeros_like(named("w"))
    assert stored(FILE, 2, (4, 6), "BF16", "w") is not base.tensor
    assert stored(OTHER, 0, (4, 6), "BF16", "w") is not base.tensor
    assert stored(FILE, 0, (6, 4), "BF16", "w") is not base.tensor
    assert stored(FILE, 0, (4, 6), "F16", "w") is not base.tensor
    assert lora(named("w", 2)) is not lora(base)


def test_memory_is_no_other_memory() -> None:
    data = memoryview(bytes(8))
    one, other = (in_memory("x", "F32", (2,), data) for _ in range(2))
    assert one.tensor is not other.tensor
    assert not one.is_same(other)


def test_the_same_bytes_under_two_names_are_the_same() -> None:
    tied, head = named("embed"), TensorInfo("lm_head", stored(FILE, 0, (4, 6), "BF16", "lm_head"))
    assert tied.is_same(head)
    assert not tied.is_same(named("embed", 2))
    assert not tied.is_same(named("embed", file=OTHER))
    assert update_of(TensorInfo("w", lora(tied)), head) is not None
    assert update_of(TensorInfo("w", lora(tied)), named("embed", 2)) is None


def test_tensors_that_nobody_has_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of interned tensors does not grow with the plans that a process has made."""
    monkeypatch.setattr(module, "_LEAST", 64)
    monkeypatch.setattr(module, "_sweep_at", 64)
    monkeypatch.setattr(module, "_INTERNED", {})
    alive = [named(f"t{i}", 2 * i) for i in range(8)]
    for i in range(2000):
        named("passing", 2 * i, file=OTHER)
    gc.collect()
    assert len(module._INTERNED) < 64 + len(alive)
    assert all(named(info.name, info.begin).tensor is info.tensor for info in alive)


def test_leaves_are_the_stored_tensors_below() -> None:
    base = named("w")
    joined = viewed(join, [lora(base), base], (8, 6), "BF16")
    assert {leaf.name for leaf in joined.leaves()} == {"w", "a", "b"}
    assert len(list(joined.leaves())) == 3
    assert list(base.tensor.leaves()) == [base.tensor]
    assert {leaf.path for leaf in joined.leaves()} == {FILE, OTHER}
    assert joined.path == FILE


def test_parts_of_parts_are_parts_of_the_whole() -> None:
    base = named("w", 10)
    assert base.part(6, (1, 6)).tensor is stored(FILE, 10 + 12, (1, 6), "BF16", "w")
    whole = lora(base)
    once, twice = part_of(whole, 6, (3, 6)), part_of(part_of(whole, 6, (3, 6)), 6, (1, 6))
    assert twice is part_of(whole, 12, (1, 6))
    assert once.whole is twice.whole is whole
    assert part_of(whole, 0, (4, 6)) is whole


def test_parts_of_elements_that_share_bytes_begin_at_their_bits() -> None:
    packed = stored(FILE, 8, (4, 6), "F4")
    assert (packed.nbytes, part_of(packed, 12, (2, 6)).begin, part_of(packed, 12, (2, 6)).nbytes) == (12, 14, 6)


def test_the_engine_sees_no_inputs_of_views() -> None:
    """A weight with a LoRA is one tile to it; a reader reads base, A and B."""
    graph, base = Graph(), named("w")
    root = graph.node("m:subtract", [graph.read(lora(base)), graph.read(base)], shape=base.shape)
    order = depth_first(root)
    assert [tensor.kind for tensor in order] == ["view", "stored", "map"]
    assert [len(nodes) for nodes in schedule(root).passes] == [3]
    assert cost(graph.read(lora(base))).passes == 1


def test_rows_that_move_are_told_by_the_graph() -> None:
    infos = [named("x"), named("y", 48)]
    moved = gather(infos[0], infos, np.array([[3, -1], [-1, 0]], np.int32), 0)
    assert moves_rows(moved)
    assert moves_rows(moved.part(0, (1, 6)))
    assert not any(map(moves_rows, (*infos, TensorInfo("w", lora(infos[0])), turned(named("s", shape=(2, 3, 4))))))


def test_a_name_of_a_view_is_one_function() -> None:
    def part(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"test_tensor and deltamerge.tensors.tensor both have a view part"):
        view()(part)


def test_a_range_beyond_the_end_is_refused() -> None:
    tensor = in_memory("x", "F32", (2,), memoryview(bytes(8)))
    with Reader() as reader, pytest.raises(ValueError, match=r"bytes \[4, 12\) of x, which has 8"):
        reader.read_into(tensor, 1, bytearray(8))
