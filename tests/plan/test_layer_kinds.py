"""Stacks of layers of several kinds: config.json follows, or they are refused by the key that cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tensors, make_checkpoint
from running import make_plan, run

from deltamerge.errors import InputError

TENSORS = {"a": "attn.q.weight", "m": "mamba.in.weight", "d": "mlp.up.weight", "x": "experts.up.weight"}


def model(
    folder: Path, kinds: list[str], config: dict[str, Any], outside: dict[str, torch.Tensor] | None = None
) -> Path:
    """A checkpoint whose layer i has a norm and a tensor for each letter of kinds[i]."""
    tensors = {"embed.weight": torch.zeros(4, 2), **(outside or {})}
    for i, kind in enumerate(kinds):
        tensors[f"layers.{i}.norm.weight"] = torch.full((2,), float(i))
        tensors |= {f"layers.{i}.{TENSORS[letter]}": torch.full((2, 2), float(i)) for letter in kind}
    return make_checkpoint(folder, tensors, config={"model_type": "test", "num_hidden_layers": len(kinds)} | config)


def stacked(folder: Path, *ranges: tuple[int, int]) -> Path:
    sources = "".join(f"- sources: [{{model: ./a, layer_range: [{a}, {b}]}}]\n" for a, b in ranges)
    path = folder / "stack.yaml"
    path.write_text(f"merge_method: passthrough\nslices:\n{sources}")
    return path


FOLLOWS: dict[str, tuple[list[str], dict[str, Any], list[tuple[int, int]], dict[str, Any]]] = {
    "numbers of layers": (
        ["m", "a", "m", "a"], {"attn_layer_indices": [1, 3]}, [(0, 2), (0, 4)], {"attn_layer_indices": [1, 3, 5]},
    ),
    "numbers of all layers": (["x"] * 3, {"moe_layers": [0, 1, 2]}, [(0, 3), (2, 3)], {"moe_layers": [0, 1, 2, 3]}),
    "numbers of some layers": (
        ["d", "x", "d", "x"], {"moe_layers": [1, 3], "interleave_moe_layer_step": 2}, [(1, 4)], {"moe_layers": [0, 2]},
    ),
    "a letter a layer": (
        ["m", "d", "m", "a"], {"hybrid_override_pattern": "M-M*"}, [(0, 3), (1, 4)],
        {"hybrid_override_pattern": "M-M-M*"},
    ),
    "a list beside a period": (
        ["m", "a", "m", "a"], {"layer_types": ["l", "f", "l", "f"], "full_attention_interval": 2}, [(1, 4)],
        {"layer_types": ["f", "l", "f"]},
    ),
    "whole periods": (["d", "x"] * 2, {"expert_layer_period": 2, "expert_layer_offset": 1}, [(0, 4), (0, 2)], {}),
    "two periods": (
        ["md", "mx", "ad", "mx"],
        {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
        [(0, 4), (0, 4)], {},
    ),
    "another layer of the kind": (["d", "x"] * 2, {"expert_layer_period": 2}, [(0, 1), (3, 4), (2, 3)], {}),
    "a boundary that stays": (["d", "x", "x"], {"first_k_dense_replace": 1}, [(0, 3), (1, 3)], {}),
    "a boundary that moves": (
        ["d", "d", "x", "x"], {"first_k_dense_replace": 2}, [(1, 4)], {"first_k_dense_replace": 1},
    ),
    "no layer before it": (["d", "x", "x"], {"first_k_dense_replace": 1}, [(1, 3)], {"first_k_dense_replace": 0}),
    "more before it": (["d", "x", "x"], {"first_k_dense_replace": 1}, [(0, 1), (0, 3)], {"first_k_dense_replace": 2}),
    "an end": (
        ["d", "x", "x"], {"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1},
        [(0, 3), (1, 3)], {"moe_layer_end_index": 4},
    ),
    "a boundary and a list": (
        ["md", "ax", "mx", "ax"], {"num_dense_layers": 1, "layer_types": ["m", "a", "m", "a"]}, [(0, 3), (2, 4)],
        {"layer_types": ["m", "a", "m", "m", "a"]},
    ),
    "a table by layer": (
        ["m", "a", "m", "a"],
        {"per_layer_config": {"1": {"head_dim": 2}, "3": {"head_dim": 3}}, "id2label": {"0": "x"}},
        [(0, 2), (1, 4)], {"per_layer_config": {"1": {"head_dim": 2}, "2": {"head_dim": 2}, "4": {"head_dim": 3}}},
    ),
    "the first is special": (["da", "d", "d"], {}, [(0, 3), (1, 3)], {}),
    "a list alone counts": (
        ["m", "d", "a"], {"layers_block_type": ["m", "d", "a"], "num_hidden_layers": None}, [(0, 3), (2, 3)],
        {"layers_block_type": ["m", "d", "a", "a"]},
    ),
    "widths by layer": (
        ["d"] * 3, {"intermediate_size": [2, 3, 4]}, [(0, 3), (1, 2)], {"intermediate_size": [2, 3, 4, 3]},
    ),
    "a window with a list": (
        ["a"] * 4, {"sliding_window_pattern": 2, "layer_types": ["s", "f", "s", "f"]}, [(1, 4)],
        {"layer_types": ["f", "s", "f"]},
    ),
    "a window in whole periods": (["a"] * 4, {"sliding_window_pattern": 2}, [(0, 4), (2, 4)], {}),
    "a window that is off": (["a"] * 4, {"window_interval": 2, "use_sliding_window": False}, [(1, 4)], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLLOWS)
def test_config_follows(tmp_path, case):
    kinds, config, ranges, changes = FOLLOWS[case]
    if config.get("num_hidden_layers", 0) is None:
        model(tmp_path / "a", kinds, config)
        plain = json.loads((tmp_path / "a" / "config.json").read_text())
        del plain["num_hidden_layers"]
        (tmp_path / "a" / "config.json").write_text(json.dumps(plain))
    else:
        model(tmp_path / "a", kinds, config)
    before = json.loads((tmp_path / "a" / "config.json").read_text())
    result = run(stacked(tmp_path, *ranges), tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    sources = [i for a, b in ranges for i in range(a, b)]
    counted = {"num_hidden_layers": len(sources)} if "num_hidden_layers" in before else {}
    assert {key: after[key] for key in after if key not in ("dtype", "torch_dtype")} == before | counted | changes
    tensors = load_tensors(tmp_path / "out")
    assert [float(tensors[f"layers.{i}.norm.weight"][0]) for i in range(len(sources))] == sources
    for key in changes:
        assert any(note.startswith(f"config.json: {key}") for note in result.plan.notes)


PERIODS = {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
REFUSED: dict[str, tuple[list[str], dict[str, Any], list[tuple[int, int]], str, str]] = {
    "a period": (
        ["m", "a", "m", "a"], {"full_attention_interval": 2}, [(1, 4)],
        "./a: layer 1 would be layer 0 of the stack, where config.json builds another kind of layer",
        "full_attention_interval: 2",
    ),
    "periods": (
        ["md", "mx", "ad", "mx"], PERIODS, [(0, 3), (2, 4)], "layer 2 would be layer 3",
        "attn_layer_period: 4, attn_layer_offset: 2",
    ),
    "behind all that are known": (
        ["d", "x"] * 2, {"decoder_sparse_step": 2}, [(0, 4), (1, 4)],
        "layer 1 would be layer 4 of the stack, of which config.json has 4, of several kinds", "decoder_sparse_step: 2",
    ),
    "a list that does not tell": (
        ["d", "x"] * 2, {"decoder_sparse_step": 2, "layer_types": ["f"] * 4, "mlp_only_layers": []}, [(1, 4)],
        "layer 1 would be layer 0", "decoder_sparse_step: 2",
    ),
    "kinds that alternate": (["d", "x"] * 2, {}, [(1, 4)], "layer 1 would be layer 0", "choose ranges"),
    "dense ones inside": (
        ["d", "x", "x"], {"first_k_dense_replace": 1}, [(0, 2), (0, 3)], "layer 0 would be layer 2",
        "first_k_dense_replace: 1",
    ),
    "two boundaries": (
        ["d", "x", "x"], {"first_k_dense_replace": 1, "moe_layer_start_index": 1}, [(1, 3)], "layer 1 would be layer 0",
        "moe_layer_start_index: 1",
    ),
    "a window": (
        ["a"] * 4, {"sliding_window_pattern": 2}, [(1, 4)],
        "./a: layer 1 would be layer 0 of the stack, in another phase of sliding_window_pattern: 2", "multiples of 2",
    ),
    "a window and a list of something else": (
        ["a"] * 4, {"sliding_window_pattern": 2, "flags": [1, 1, 1, 1]}, [(1, 4)],
        "another phase of sliding_window_pattern", "",
    ),
    "rope that no list tells": (
        ["d", "x"] * 2, {"no_rope_layer_interval": 4, "interleave_moe_layer_step": 2}, [(0, 2), (0, 4)],
        "layer 0 would be layer 2 of the stack, in another phase of no_rope_layer_interval: 4", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_follow_is_refused(tmp_path, case):
    kinds, config, ranges, message, hint = REFUSED[case]
    model(tmp_path / "a", kinds, config)
    with pytest.raises(InputError) as caught:
        make_plan(stacked(tmp_path, *ranges))
    assert message in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_a_tensor_with_a_part_for_each_layer_cannot_follow(tmp_path):
    outside = {"embed_tokens_per_layer.weight": torch.zeros(4, 6)}
    model(tmp_path / "a", ["d"] * 3, {}, outside)
    assert make_plan(stacked(tmp_path, (0, 2), (2, 3))).outputs
    with pytest.raises(InputError, match=r"embed_tokens_per_layer\.weight has a part for each of 3 layers"):
        make_plan(stacked(tmp_path, (0, 3), (1, 3)))


def test_norms_of_heads_may_differ(tmp_path):
    tensors = {f"layers.{i}.{name}.weight": torch.zeros(size) for i in range(2)
               for name, size in (("norm", 2), ("q_norm", 2 + i))}  # fmt: skip
    config = {"num_hidden_layers": 2, "layer_types": ["s", "f"]}
    make_checkpoint(tmp_path / "a", tensors, config=config)
    assert make_plan(stacked(tmp_path, (0, 2), (0, 2))).config["layer_types"] == ["s", "f", "s", "f"]


def test_a_window_by_code_alone_is_noted(tmp_path):
    model(tmp_path / "a", ["a"] * 4, {"sliding_window": 8})
    note = "config.json: sliding_window: 8 and no list by layer: check which layers attend in windows"
    assert note in make_plan(stacked(tmp_path, (1, 4))).notes
    assert note not in make_plan(stacked(tmp_path, (0, 4), (0, 4))).notes
