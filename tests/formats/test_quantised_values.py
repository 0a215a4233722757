"""What quantised weights are read as: float64 references by the formula, the libraries that defined the schemes bit for
bit, and files at fault, each refused in a line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LEVELS, make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_files import check_the_loop
from quantised_models import fp8

from deltamerge.engine import kernels
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.models.checkpoint import Checkpoint, decoded, open_checkpoint
from deltamerge.tensors.dtypes import DTYPES
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.tensor import stored as leaf

W = "model.layers.0.mlp.up_proj.weight"
E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2
E8M0 = torch.float8_e8m0fnu


def opened(folder: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any] | None) -> Any:
    config = {"model_type": "llama"} | ({"quantization_config": dict(settings)} if settings is not None else {})
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return decoded(open_checkpoint(make_checkpoint(folder, held, config=config)))


def read(info: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray[Any, Any]:
    count = int(np.prod(info.shape)) - start if stop is None else stop - start
    out = np.full(count, np.nan, np.float32)
    with Reader() as reader:
        reader.read_into(info, start, out)
        if stop is None and not start:
            check_the_loop(info, reader, out)
    return out


def computed_at(asked: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(kernels.SWITCH, asked)
    kernels.native.cache_clear()
    yield asked
    monkeypatch.undo()
    kernels.native.cache_clear()
    kernels.native()


@pytest.fixture(params=[*LEVELS[:1], kernels.OFF])
def level(request, monkeypatch):
    """The kernels, and numpy."""
    yield from computed_at(request.param, monkeypatch)


@pytest.fixture(params=[*LEVELS, kernels.OFF])
def every_level(request, monkeypatch):
    """The kernels of each level of processors, and numpy."""
    yield from computed_at(request.param, monkeypatch)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values.view(-1)[::7] *= 1e-3
    values.view(-1)[::11] = 0
    return values


BLOCK = {"quant_method": "fp8", "weight_block_size": [4, 8]}
# shape, block, dtype of codes and of scales, suffix, config
FP8: dict[str, tuple[tuple[int, ...], tuple[int, int], torch.dtype, torch.dtype, str, dict[str, Any] | None]] = {
    "blocks": ((8, 16), (4, 8), E4, torch.float32, "_scale_inv", BLOCK),
    "blocks that do not divide": ((11, 21), (4, 8), E4, torch.float32, "_scale_inv", BLOCK),
    "e5m2": ((12, 24), (4, 8), E5, torch.float32, "_scale_inv", BLOCK),
    "bfloat16 scales": ((12, 24), (4, 8), E4, torch.bfloat16, "_scale_inv", BLOCK),
    "exponents": ((12, 24), (4, 8), E4, E8M0, "_scale_inv", BLOCK),
    "exponents of blocks that do not divide": ((11, 21), (4, 8), E4, E8M0, "_scale_inv", BLOCK),
    "as DeepSeek names them": ((12, 24), (4, 8), E4, E8M0, ".scale", BLOCK),
    "experts": ((3, 12, 24), (4, 8), E4, torch.float32, "_scale_inv", BLOCK),
    "experts whose blocks do not divide": ((3, 11, 21), (4, 8), E4, torch.float32, "_scale_inv", BLOCK),
    "blocks unsaid": ((8, 16), (4, 8), E4, torch.float32, "_scale_inv", None),
    "rows": ((8, 16), (1, 16), E4, torch.float32, "_scale", {"quant_method": "fbgemm_fp8"}),
    "columns of experts": ((3, 8, 6), (8, 1), E4, torch.float32, "_scale", {"quant_method": "fbgemm_fp8"}),
    "tensor": ((8, 16), (8, 16), E4, torch.float32, "_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "groups": ((8, 16), (1, 4), E4, torch.bfloat16, "_scale", {"quant_method": "compressed-tensors"}),
}  # fmt: skip


@pytest.mark.parametrize("case", FP8)
def test_fp8_is_its_codes_times_their_scales(case, level, tmp_path):
    shape, block, codes, scales, suffix, settings = FP8[case]
    tensors, expected = fp8(W, drawn(*shape), block, codes=codes, scales=scales, suffix=suffix)
    more = {W.replace("weight", "input_scale"): torch.ones(1), "norm.weight": torch.ones(4)}
    model = opened(tmp_path, tensors | more, settings)
    assert set(model.tensors) == {W, "norm.weight"}
    info = model.tensors[W]
    assert (info.dtype, info.shape, info.output_dtype) == ("F32", shape, "BF16")
    wanted = expected.numpy().astype(np.float32).reshape(-1)
    assert read(info).tobytes() == wanted.tobytes()
    assert read(info, 5, 41).tobytes() == wanted[5:41].tobytes()
    if all(side % by == 0 for side, by in zip(shape[-2:], block, strict=True)):
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        judged = Fp8Dequantize(None)._dequantize_one(*tensors.values(), torch.float32)
        assert judged.numpy().tobytes() == wanted.tobytes()


def test_scales_of_caches_and_activations_belong_to_no_weight(tmp_path):
    """A checkpoint whose cache alone is quantised has them beside plain weights, and a model its own parameters."""
    heads = torch.ones(4, 1, 1)
    cache = {
        "a.self_attn.k_scale": torch.ones(1),
        "a.self_attn.v_proj.v_scale": torch.ones(()),
        "a.self_attn.q_scale": heads,
    }
    plain = {"a.self_attn.k_proj.weight": drawn(4, 4), "b.k_scale": torch.ones(4)}
    tensors, _ = fp8(W, drawn(8, 16), (4, 8))
    said = {"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8}}
    for stated, more, kept in (
        (BLOCK, tensors, {W, *plain, "a.self_attn.q_scale"}),  # no word of a cache, and no single numbers
        (said, {}, {"a.self_attn.k_proj.weight"}),
        (None, {}, {*plain, *cache}),
    ):
        model = opened(tmp_path, plain | cache | more, stated)
        assert set(model.tensors) == kept
        dropped = () if model.quantised is None else model.quantised.dropped
        assert set(dropped) == {*plain, *cache} - kept


@pytest.mark.parametrize("codes", [E4, E5])
def test_every_code(codes, every_level, tmp_path):
    stored = torch.arange(256, dtype=torch.uint8).view(codes).reshape(16, 16)
    model = opened(tmp_path, {W: stored, W + "_scale_inv": torch.tensor(0.37)}, None)
    expected = stored.float() * torch.tensor(0.37)
    assert np.array_equal(read(model.tensors[W]), expected.numpy().reshape(-1), equal_nan=True)


SCHEMES: dict[str, tuple[dict[str, Any], tuple[int, int], str]] = {
    "int8 by row": ({"num_bits": 8, "strategy": "channel"}, (1, 64), "int-quantized"),
    "int8 by tensor": ({"num_bits": 8, "strategy": "tensor"}, (16, 64), "naive-quantized"),
    "int8 by group": ({"num_bits": 8, "strategy": "group", "group_size": 16}, (1, 16), "naive-quantized"),
    "int8 by block": ({"num_bits": 8, "strategy": "block", "block_structure": [4, 32]}, (4, 32), "naive-quantized"),
    "int8 by row, asymmetric": ({"num_bits": 8, "strategy": "channel", "symmetric": False}, (1, 64), "int-quantized"),
    "fp8 by block": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 32]}, (4, 32), "float-quantized",
    ),
    "fp8 by exponents": (
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}, (1, 32),
        "mxfp8-quantized",
    ),
    "fp8 by row": ({"num_bits": 8, "type": "float", "strategy": "channel"}, (1, 64), "float-quantized"),
    **{
        f"{bits} bits by group": (
            {"num_bits": bits, "strategy": "group", "group_size": 16}, (1, 16), "pack-quantized",
        ) for bits in range(2, 9)
    },
    **{
        f"{bits} bits by group, asymmetric": (
            {"num_bits": bits, "strategy": "group", "group_size": 16, "symmetric": False}, (1, 16), "pack-quantized",
        ) for bits in (3, 4, 8)
    },
    "4 bits by row": ({"num_bits": 4, "strategy": "channel"}, (1, 64), "pack-quantized"),
    "4 bits by row, asymmetric": (
        {"num_bits": 4, "strategy": "channel", "symmetric": False}, (1, 64), "pack-quantized",
    ),
}  # fmt: skip


def compressed(case: str, weight: torch.Tensor, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], Any, Any, str]:
    """A weight as the library compresses it, its settings and its own values."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    said, block, form = SCHEMES[case]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**said))
    from quantised_models import blocks_of

    bits = said["num_bits"]
    largest = blocks_of(weight, block if said["strategy"] != "tensor" else tuple(weight.shape))
    half = 448.0 if said.get("type") == "float" else 2.0 ** (bits - 1) - (bits > 1) * 0.5
    scale = (largest / half).clamp_min(1e-6).to(dtype)
    if form == "mxfp8-quantized":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    if said["strategy"] == "tensor":
        scale = scale.reshape(1)
    state = {"weight": weight.to(dtype), "weight_scale": scale}
    if said.get("symmetric") is False:
        generator = torch.Generator().manual_seed(1)
        least = -(2 ** (bits - 1))
        state["weight_zero_point"] = torch.randint(least, -least, scale.shape, dtype=torch.int8, generator=generator)
    library = BaseCompressor.get_value_from_registry(form)
    stored = library.compress(state, scheme)
    values = library.decompress({name: tensor.clone() for name, tensor in stored.items()}, scheme)["weight"]
    return stored, scheme, values, form


def named(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {W.removesuffix("weight") + name: tensor for name, tensor in stored.items()}


def settings_of(form: str, *weights: Mapping[str, Any]) -> dict[str, Any]:
    said = [{key: value for key, value in one.items() if key != "scale_dtype"} for one in weights]
    groups = {f"group_{i}": {"targets": ["Linear"], "weights": one} for i, one in enumerate(said)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


@pytest.mark.parametrize("case", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_bit_for_bit(case, dtype, level, tmp_path):
    stored, _, values, form = compressed(case, drawn(16, 64, seed=2), dtype)
    model = opened(tmp_path, named(stored), settings_of(form, SCHEMES[case][0]))
    assert list(model.tensors) == [W]
    found = read(model.tensors[W])
    if values.dtype is torch.float32:
        assert found.tobytes() == values.numpy().tobytes()
        assert read(model.tensors[W], 3, 700).tobytes() == found[3:700].tobytes()
    else:  # the library rounds each step to its scales' dtype, we once
        exact = torch.from_numpy(found).reshape(values.shape)
        assert torch.equal(exact.bfloat16(), values)


def test_blocks_of_compressed_tensors_that_do_not_divide(level, tmp_path):
    stored, _, values, form = compressed("fp8 by block", drawn(10, 70, seed=8), torch.float32)
    model = opened(tmp_path, named(stored), settings_of(form, SCHEMES["fp8 by block"][0]))
    assert read(model.tensors[W]).tobytes() == values.numpy().tobytes()


def test_of_the_hub_the_words_tell_the_shape(tmp_path):
    """Where headers alone are there: what `weight_shape` says is not, and rows that fill their words need it not."""
    parts, _, _, form = compressed("4 bits by row", drawn(16, 64, seed=9), torch.float32)
    opened(tmp_path, named(parts), None)
    seen = open_checkpoint(tmp_path)
    away = {
        name: replace(info, tensor=leaf(tmp_path / "away", info.begin, info.shape, info.dtype, name))
        for name, info in seen.tensors.items()
    }
    for config, fits in ({"quantization_config": settings_of(form, SCHEMES["4 bits by row"][0])}, True), ({}, False):
        if fits:
            assert decoded(replace(seen, tensors=away, config=config)).tensors[W].shape == (16, 64)
        else:
            with pytest.raises(InputError, match="bits are stated neither"):
                decoded(replace(seen, tensors=away, config=config))


def test_packed_rows_that_end_within_a_word(every_level, tmp_path):
    for columns in (61, 62, 63):
        weight = drawn(5, columns, seed=columns)
        pytest.importorskip("compressed_tensors")
        stored, _, values, form = compressed("4 bits by row", weight, torch.float32)
        model = opened(tmp_path, named(stored), settings_of(form, SCHEMES["4 bits by row"][0]))
        assert model.tensors[W].shape == (5, columns)
        assert read(model.tensors[W]).tobytes() == values.numpy().tobytes()


def test_columns_out_of_order(level, tmp_path):
    """`actorder: group`, which the library wrote until it removed it: column j has the scale of group g_idx[j]."""
    stored, _, values, form = compressed("4 bits by group", drawn(16, 64, seed=3), torch.float32)
    codes = values / stored["weight_scale"].repeat_interleave(16, 1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4)).to(torch.int32) // 16
    expected = codes.double().round() * stored["weight_scale"].double()[:, order.long()]
    for said, wanted in ((order, expected), (torch.full((64,), -1, dtype=torch.int32), values)):
        model = opened(
            tmp_path, named(stored | {"weight_g_idx": said}), settings_of(form, SCHEMES["4 bits by group"][0])
        )
        assert np.array_equal(read(model.tensors[W]), wanted.numpy().astype(np.float32).reshape(-1))


def test_words_of_whole_integers(level, tmp_path):
    """3 bits as older versions of the library packed them: ten integers a word."""
    codes = np.random.default_rng(5).integers(-4, 4, (6, 50))
    words = np.zeros((6, 5), np.uint32)
    for j in range(50):
        words[:, j // 10] |= (codes[:, j] + 4).astype(np.uint32) << np.uint32(3 * (j % 10))
    # 50 integers of 3 bits take 5 words either way: a longer row tells
    codes = np.concatenate([codes] * 8, axis=1)
    words = np.concatenate([words] * 8, axis=1)
    scale = torch.rand(6, 1) + 0.5
    stored = {
        "weight_packed": torch.from_numpy(words.view(np.int32)), "weight_scale": scale,
        "weight_shape": torch.tensor([6, 400]),
    }  # fmt: skip
    model = opened(tmp_path, named(stored), settings_of("pack-quantized", {"num_bits": 3, "strategy": "channel"}))
    assert np.array_equal(read(model.tensors[W]), (codes * scale.double().numpy()).astype(np.float32).reshape(-1))


def test_groups_are_told_apart_by_their_targets_or_by_shapes(tmp_path):
    four, eight = SCHEMES["4 bits by row"][0], SCHEMES["8 bits by group"][0]
    for case in ("4 bits by row", "8 bits by group"):
        stored, _, values, _ = compressed(case, drawn(16, 64, seed=6), torch.float32)
        both = settings_of("mixed-precision", four, eight)
        assert read(opened(tmp_path, named(stored), both).tensors[W]).tobytes() == values.numpy().tobytes()
        both["config_groups"]["group_0"]["targets"] = [r"re:.*\.up_proj$"]
        if case == "4 bits by row":
            assert read(opened(tmp_path, named(stored), both).tensors[W]).tobytes() == values.numpy().tobytes()
        else:
            with pytest.raises(InputError, match="rows have 16 words, which 64 integers of 4 bits do not take"):
                opened(tmp_path, named(stored), both)


def _blocks(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors, _ = fp8(W, drawn(8, 16), (4, 8))
    tensors |= {W + name: value for name, value in changed.items() if value is not None}
    return {name: value for name, value in tensors.items() if changed.get(name.removeprefix(W), 0) is not None}


def _packed(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    codes = torch.zeros(4, 8, dtype=torch.int32)
    held = {"weight_packed": codes, "weight_scale": torch.ones(4, 4), "weight_shape": torch.tensor([4, 64])}
    return named(held | changed)


INT4 = settings_of("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 16})
FAULTS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "scales of the wrong shape": (
        _blocks(_scale_inv=torch.ones(3, 2)), BLOCK,
        "scales have the shape [3, 2], which does not fit a weight of [8, 16]: in blocks of 4×8 it has [2, 2]",
    ),
    "a scale for a row of blocks": (
        _blocks(_scale_inv=torch.ones(2, 1)), BLOCK,
        "scales have the shape [2, 1], which does not fit a weight of [8, 16]: in blocks of 4×8 it has [2, 2]",
    ),
    "a scale for a column of blocks": (_blocks(_scale_inv=torch.ones(1, 2)), BLOCK, "shape [1, 2], which does not fit"),
    "no scales": ({W: _blocks()[W]}, BLOCK, f"the scales of {W} are missing"),
    "scales of integers": (_blocks(_scale_inv=torch.ones(2, 2, dtype=torch.int32)), BLOCK, "I32 is no dtype of scales"),
    "blocks of no size": (_blocks(), BLOCK | {"weight_block_size": [0, 8]}, "two positive integers, is [0, 8]"),
    "blocks of three sides": (_blocks(), BLOCK | {"weight_block_size": [4, 8, 2]}, "two positive integers"),
    "blocks of words": (_blocks(), BLOCK | {"weight_block_size": "4"}, "two positive integers, is 4"),
    "floats beside scales": (
        _blocks() | {W: torch.ones(8, 16).bfloat16()}, BLOCK, "is BF16 beside scales, must be F8_E4M3 or F8_E5M2",
    ),
    "scales without a weight": (
        {W + "_scale_inv": torch.ones(2, 2), **fp8("b.weight", drawn(8, 16), (4, 8))[0]}, BLOCK,
        f"{W}_scale_inv belongs to no weight",
    ),
    "scales without blocks": (
        {"m.experts.gate_up_proj_scales": torch.ones(2, 8, 1, dtype=torch.uint8)}, {"quant_method": "mxfp4"},
        "m.experts.gate_up_proj_scales belongs to no weight",
    ),
    "a weight without words": (
        {**_packed(), "b.weight_scale": torch.ones(4, 4), "b.weight_shape": torch.tensor([4, 64])}, INT4,
        "b.weight_shape belongs to no weight",
    ),
    "words too few": (_packed(weight_packed=torch.zeros(4, 7, dtype=torch.int32)), INT4, "rows have 7 words"),
    "words of bytes": (_packed(weight_packed=torch.zeros(4, 32, dtype=torch.int8)), INT4, "must be 32-bit words"),
    "a shape of another weight": (_packed(weight_shape=torch.tensor([5, 64])), INT4, "weight_shape says [5, 64]"),
    "a shape of nonsense": (_packed(weight_shape=torch.tensor([-1, 64])), INT4, "weight_shape says [-1, 64]"),
    "a shape of floats": (_packed(weight_shape=torch.ones(2)), INT4, "must be I64 [2]"),
    "groups that do not divide": (
        _packed(weight_scale=torch.ones(4, 3)),
        settings_of("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 24}), "does not fit",
    ),
    "zeros of the wrong shape": (
        _packed(weight_zero_point=torch.zeros(3, 4, dtype=torch.int32)), INT4, "weight_zero_point is I32 [3, 4]",
    ),
    "zeros that config.json promises": (
        _packed(), settings_of("pack-quantized", {"num_bits": 4, "group_size": 16, "symmetric": False}),
        "its weight_zero_point is missing",
    ),
    "bytes without zeros": (
        named({"weight": torch.ones(4, 64, dtype=torch.int8), "weight_scale": torch.ones(4, 1)}),
        settings_of("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        "its weight_zero_point is missing",
    ),
    "an order of the wrong length": (
        _packed(weight_g_idx=torch.zeros(63, dtype=torch.int32)), INT4, "weight_g_idx is I32 [63]",
    ),
    "nine bits": (_packed(), settings_of("pack-quantized", {"num_bits": 9}), "num_bits must be from 1 to 8, is 9"),
    "groups of nothing": (_packed(), settings_of("pack-quantized", {"num_bits": 4, "group_size": 0}), "group_size"),
    "an unknown strategy": (
        _packed(), settings_of("pack-quantized", {"num_bits": 4, "strategy": "spiral"}), "'spiral' of weights",
    ),
    "a target that is no pattern": (
        _packed(), {**INT4, "config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 4}}}},
        "no regular expression",
    ),
    "an unknown format": (_packed(), INT4 | {"format": "marlin-24"}, "its format 'marlin-24' is not known"),
    "int32 as codes": (
        named({"weight": torch.zeros(4, 4, dtype=torch.int32), "weight_scale": torch.ones(4, 1)}), INT4,
        "is stored as I32 beside scales",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_files_at_fault_are_refused_in_a_line(case, tmp_path):
    tensors, settings, said = FAULTS[case]
    with pytest.raises(InputError) as found:
        opened(tmp_path, tensors, settings)
    assert said in str(found.value)
    assert "\n" not in str(found.value)
    assert ("up_proj" in str(found.value)) or case in ("a weight without words",)


@pytest.mark.parametrize("wrong", ["nan", "inf", "0"])
def test_scales_that_are_none_are_found_when_they_are_read(wrong, level, tmp_path):
    tensors = _blocks()
    tensors[W + "_scale_inv"][1, 1] = float(wrong)
    info = opened(tmp_path, tensors, BLOCK).tensors[W]
    assert np.isfinite(read(info, 0, 64)).all()
    with pytest.raises(InputError) as found:
        read(info, 60, 70)
    shown = "0.0" if wrong == "0" else wrong
    assert f"{W}_scale_inv: the scale at row 1, column 1 is {shown}" in str(found.value)


def test_a_scale_of_zero_over_zeros_is_no_fault(level, tmp_path):
    tensors = _blocks()
    tensors[W].view(torch.uint8)[4:, 8:] = 0
    tensors[W + "_scale_inv"][1, 1] = 0
    assert not read(opened(tmp_path, tensors, BLOCK).tensors[W]).reshape(8, 16)[4:, 8:].any()


def test_a_group_that_the_grid_lacks(level, tmp_path):
    info = opened(tmp_path, _packed(weight_g_idx=torch.full((64,), 4, dtype=torch.int32)), INT4).tensors[W]
    with pytest.raises(InputError, match="has group 4, of 4"):
        read(info)


NASTY = st.sampled_from([None, True, 0, -1, 3, 4, 8, 2**70, 0.5, "", "x", "4x8", [], [4], [4, 8], [0, 8], {}, {"a": 1}])
GROUPS = st.fixed_dictionaries(
    {},
    optional={
        "targets": st.one_of(NASTY, st.lists(st.sampled_from(["Linear", "re:.*up", "re:(", W, 3]))),
        "weights": st.one_of(
            NASTY,
            st.fixed_dictionaries(
                {}, optional=dict.fromkeys(["num_bits", "group_size", "block_structure", "strategy"], NASTY)
            ),
        ),
    },
)
SETTINGS = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["fp8", "compressed-tensors", "modelopt", "x\n", 3, None])},
    optional={
        "weight_block_size": NASTY,
        "config_groups": st.one_of(NASTY, st.dictionaries(st.text(max_size=3), GROUPS)),
    },
)
PART = st.tuples(
    st.sampled_from(["F8_E4M3", "F8_E5M2", "F8_E8M0", "F32", "BF16", "I8", "U8", "I32", "I64", "F4", "BOOL"]),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16]), max_size=3).map(tuple),
)
PARTS = st.dictionaries(
    st.sampled_from(["", "_scale_inv", "_scale", "_packed", "_shape", "_zero_point", "_g_idx", "_global_scale"]),
    PART,
    min_size=1,
)
SOUND = [
    ({"quant_method": "fp8", "weight_block_size": [2, 2]}, {"": ("F8_E4M3", (4, 4)), "_scale_inv": ("F32", (2, 2))}),
    (INT4, {"_packed": ("I32", (4, 2)), "_scale": ("BF16", (4, 1))}),
    ({"quant_method": "modelopt"}, {"": ("U8", (4, 8)), "_scale": ("F8_E4M3", (4, 1)), "_scale_2": ("F32", ())}),
]


@st.composite
def nearly_sound(draw):
    """Settings and parts that are read, of which one part may be another."""
    said, parts = draw(st.sampled_from(SOUND))
    return said, parts | draw(st.dictionaries(st.sampled_from([*parts]), PART, max_size=1))


def headers_of(parts):
    where = Path("nowhere")
    return {W + n: TensorInfo(W + n, leaf(where, 0, shape, code, W + n)) for n, (code, shape) in parts.items()}


@pytest.mark.parametrize(("said", "parts"), SOUND)
def test_sound_headers_are_read(said, parts):
    """Else the next test would see refusals alone."""
    (info,) = decoded(Checkpoint("x", Path("x"), headers_of(parts), (), {"quantization_config": said})).tensors.values()
    assert info.kind == "view"


@settings(max_examples=60)
@given(st.one_of(st.tuples(SETTINGS, PARTS), nearly_sound()))
def test_any_header_and_config_is_read_or_refused(case):
    """What is read fits in its codes: its shape is at most as many integers as its words have bits."""
    said, parts = case
    try:
        found = decoded(Checkpoint("x", Path("x"), headers_of(parts), (), {"quantization_config": said}))
    except DeltamergeError:
        return
    words = sum(DTYPES[dtype].bits * math.prod(shape) for dtype, shape in parts.values())
    for info in found.tensors.values():
        if info.kind == "view":
            assert info.dtype == "F32"
            assert info.nbytes == 4 * np.prod(info.shape, dtype=np.int64)
            assert np.prod(info.shape, dtype=np.int64) <= words
