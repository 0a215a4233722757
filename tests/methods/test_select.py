"""Exact top-k by counting, against a stable sort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamerge.methods.prune import select
from deltamerge.tensors.schedule import REDUCTIONS, depth_first
from deltamerge.tensors.tensor import Graph
from deltamerge.tensors.tiles import Tile, block_elements
from deltamerge.tensors.traits import function_of, traits_of


def keep(delta: np.ndarray, k: int, tile_blocks: int = 1) -> tuple[np.ndarray, set[str]]:
    """What the passes of a run compute, tile by tile, and the functions that it took."""
    graph, flat = Graph(), torch.from_numpy(delta.reshape(-1).copy())
    step = block_elements(delta.shape) * tile_blocks
    tiles = [Tile(i, min(flat.numel(), i + step), delta.shape) for i in range(0, flat.numel(), step)]
    source = graph.node("delta", kind="stored", shape=delta.shape)
    values, taken = {source: flat}, set()
    for node in depth_first(select.largest(graph.node, source, k)):
        call, inputs = node.function, [values.get(x) for x in node.inputs]
        needless = traits_of(call).needless if node.kind in REDUCTIONS else None
        if node is source or (needless and needless(*inputs[1:])):
            continue
        taken.add(call.partition(":")[2])
        if node.kind == "small":
            values[node] = function_of(call)(*inputs, **dict(node.parameters))
            continue
        parts = [function_of(call)(flat[t.start : t.stop], *inputs[1:], tile=t) for t in tiles]
        values[node] = sum(parts) if node.kind == "sum" else np.concatenate(parts)
    return (values[node] if taken else flat.numpy()).reshape(delta.shape), taken


@given(st.data())
def test_the_k_largest_are_kept_and_the_first_among_equals(data):
    shape = data.draw(st.sampled_from([(7,), (3, 5), (300_000,), (3, 40_000), (2, 3, 4)]))
    levels = data.draw(st.sampled_from([2, 5, 1000, 10**9]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = np.random.Generator(np.random.PCG64(seed))
    delta = (generator.integers(-levels, levels + 1, shape) / levels).astype(np.float32)
    k = data.draw(st.integers(1, delta.size))
    most = data.draw(st.sampled_from([0, 1000, select.MOST]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "MOST", most)
        kept, _ = keep(delta, k, data.draw(st.integers(1, 3)))
    np.testing.assert_array_equal(kept, reference.keep_top(delta, k))


LISTED, COUNTED = {"sample", "bracketed"}, {"high_histogram", "low_histogram"}


@pytest.mark.parametrize(
    ("name", "k", "passes"),
    [
        ("normal", 300_000, LISTED),
        ("steps of bfloat16", 300_000, LISTED),
        ("mostly zero", 2_000_000, LISTED),
        ("a few rows", 20_000, LISTED | COUNTED),
        ("what the sample sees", 500_000, LISTED | COUNTED | {"equal_counts"}),
    ],
)
def test_a_sample_tells_where_to_look_or_else_all_is_counted(name, k, passes):
    """Three million entries, of which the sample sees one in 92."""
    shape = (3000, 1000)
    delta = np.random.Generator(np.random.PCG64(5)).standard_normal(shape).astype(np.float32)
    if name == "steps of bfloat16":
        delta = np.round(delta * 8) / 8
    elif name == "mostly zero":
        delta[delta < 1.2] = 0
    elif name == "a few rows":
        delta[:20] += 10
        delta[:20, ::2] = 10
    elif name == "what the sample sees":
        flat, step, run = delta.reshape(-1), block_elements(shape), select.sampled_run(shape)
        flat[:] = np.random.Generator(np.random.PCG64(6)).integers(1, 5, flat.size)
        for number, start in enumerate(range(0, flat.size, step)):
            first = start + select.run_start(number, min(step, flat.size - start), run)
            flat[first : first + run] = 1e-3
    kept, taken = keep(delta, k)
    np.testing.assert_array_equal(kept, reference.keep_top(delta, k))
    assert taken & (LISTED | COUNTED | {"equal_counts"}) == passes


def test_a_tensor_of_one_block_takes_one_pass_before_the_mask():
    """All of its magnitudes are a sample, so that no bracket is needed."""
    delta = np.random.Generator(np.random.PCG64(3)).integers(-3, 4, (128, 256)).astype(np.float32)
    for k in (1, 500, 20_000, delta.size - 1):
        kept, taken = keep(delta, k)
        np.testing.assert_array_equal(kept, reference.keep_top(delta, k))
        assert taken == {"magnitudes", "pick_largest", "rank_of_block", "keep_largest"}
    assert "bracketed" in keep(np.ones(select.SAMPLE_LEAST + 1, np.float32), 5)[1]


@pytest.mark.parametrize("shape", [(1,), (70_000,), (5, 3), (300, 333), (1, 5_000_000), (40_000, 4000), (2**20, 2**11)])
def test_a_sample_is_a_run_of_each_block(shape):
    size, step, run = math.prod(shape), block_elements(shape), select.sampled_run(shape)
    blocks = -(-size // step)
    assert 1 <= run <= step
    assert min(size, select.SAMPLE_LEAST) <= blocks * run <= max(2 * select.SAMPLE_MOST, size)
    starts = [select.run_start(number, step, run) for number in range(min(blocks, 2000))]
    assert all(0 <= start <= step - run for start in starts)
    assert run == step or blocks < 3 or len(set(starts)) > 1


@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 100), (31, 7), (2, 3, 10)])
def test_rows_keep_their_own_largest(shape, density):
    delta = np.random.Generator(np.random.PCG64(1)).integers(-4, 5, shape).astype(np.float32)
    flat = torch.from_numpy(delta.reshape(-1))
    kept = select.keep_largest_rows(flat, tile=Tile(0, delta.size, shape), density=density)
    np.testing.assert_array_equal(kept.numpy().reshape(shape), reference.magnitude_rows(delta, density))


def test_nothing_is_kept_for_a_density_that_rounds_to_no_entry():
    flat = torch.tensor([3.0, -4.0])
    kept = select.keep_largest(flat, select.nothing(), select.no_ranks(), tile=Tile(0, 2, (2,)))
    assert torch.equal(kept, torch.zeros(2))


def test_specials_rank_as_their_bits_do():
    delta = np.array([1.0, -np.inf, 0.0, -0.0, 1e-42, 2.0], np.float32)
    np.testing.assert_array_equal(keep(delta, 2)[0], np.array([0, -np.inf, 0, 0, 0, 2.0], np.float32))
