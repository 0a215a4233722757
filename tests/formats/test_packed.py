"""Packed schemes: every decoder against its formula in float64, and bit for bit against the library that defines it;
what is corrupt is refused in one line.

GPTQ and AWQ have no library here: their reference is written from the packing that gptqmodel and AutoAWQ publish. MLX's
values come from mlx itself (tests/formats/mlx.safetensors).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import packed_files as made
import pytest
import torch
from conftest import LEVELS, make_checkpoint, needs_kernels
from packed_files import CASES, Packed, check_the_loop
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from deltamerge.engine import kernels
from deltamerge.engine.fused.operations import StoredSource
from deltamerge.errors import InputError
from deltamerge.formats.quantised import detect, scheme
from deltamerge.formats.quantised.detect import FORMATS, reader_of
from deltamerge.models.checkpoint import decoded, open_checkpoint
from deltamerge.models.hub import open_model
from deltamerge.run.hashes import hashed_as_read
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo, viewed
from deltamerge.tensors.views import cast


def read(packed: Packed, folder: Path, *, pieces: bool = True) -> dict[str, np.ndarray]:
    """The plain weights, read whole; pieces of any length are the same bytes."""
    key = "quantization" if "quant_method" not in packed.config else "quantization_config"
    make_checkpoint(folder, packed.tensors, config={key: packed.config})
    rng, found = np.random.default_rng(0), {}
    with Reader() as reader:
        for name, info in decoded(open_checkpoint(folder)).tensors.items():
            assert info.dtype == "F32"
            found[name] = np.empty(info.shape, np.float32)
            reader.read_into(info, 0, found[name])
            check_the_loop(info, reader, found[name])
            flat = found[name].reshape(-1)
            cuts = sorted({0, flat.size, *rng.integers(0, flat.size, 5).tolist()}) if pieces else []
            for low, high in pairwise(cuts):
                piece = np.empty(high - low, np.float32)
                reader.read_into(info, low, piece)
                assert piece.tobytes() == flat[low:high].tobytes()
    return found


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_formula(case, tmp_path, monkeypatch):
    packed = CASES[case]()
    found = read(packed, tmp_path / "kept")
    assert set(found) == set(packed.values)
    for name, values in packed.values.items():
        np.testing.assert_allclose(found[name], values, rtol=3e-7, atol=1e-7 * np.abs(values).max(), err_msg=name)
    monkeypatch.setattr(scheme, "SLAB", 700)  # a few columns
    straight = read(packed, tmp_path / "straight", pieces=False)
    assert all(straight[name].tobytes() == values.tobytes() for name, values in found.items())


@pytest.mark.parametrize("case", CASES)
def test_every_level_of_kernels_has_the_bits_of_numpy(case, tmp_path, monkeypatch):
    packed, found = CASES[case](), {}
    for level in (kernels.OFF, *LEVELS):
        monkeypatch.setenv(kernels.SWITCH, level)
        kernels.native.cache_clear()
        values = read(packed, tmp_path / level)
        found[level] = {name: one.tobytes() for name, one in values.items()}
    monkeypatch.undo()
    kernels.native.cache_clear()
    kernels.native()
    assert all(one == found[kernels.OFF] for one in found.values())


@needs_kernels
@pytest.mark.parametrize("case", ["nvfp4 of modelopt", "nvfp4 of compressed-tensors", "mxfp4 of compressed-tensors",
                                  "nf4", "nf4 nested", "nf4 stored as bfloat16", "fp4",
                                  "mlx of small floats"])  # fmt: skip
def test_codes_of_tables_are_read_inside_the_loop(case, tmp_path):
    packed = CASES[case]()
    make_checkpoint(tmp_path, packed.tensors, config={"quantization_config": packed.config})
    with Reader() as reader:
        for name, info in decoded(open_checkpoint(tmp_path)).tensors.items():
            source = StoredSource.of(info.tensor, reader)
            assert source.coded is not None
            assert source.bits == (8 if "mxfp8" in name else 4)
            assert hashed_as_read(info.tensor, "fused") is info.tensor.inputs[0]


UNREAD = ("weight_format", "nf4", "fp4", "input_scale", "input_global_scale")  # looked at once, or not at all
TURNED = ("gptq", "awq", "mxfp4 of 37")


@pytest.mark.parametrize("case", CASES)
def test_the_graph_sees_every_stored_part(case, tmp_path):
    packed = CASES[case]()
    key = "quantization" if "quant_method" not in packed.config else "quantization_config"
    make_checkpoint(tmp_path, packed.tensors, config={key: packed.config})
    seen = open_checkpoint(tmp_path)
    told = decoded(seen)
    for name, parts in told.quantised.weights.items():
        info = told.tensors[name]
        unread = {part for part in parts if part.endswith(UNREAD)}
        assert {leaf.name for leaf in info.tensor.leaves()} == set(parts) - unread
        assert info.tensor.read_nbytes == seen.tensors[parts[0]].nbytes
        above = TensorInfo("above", viewed(cast, [info], info.shape, "BF16"))
        for one in (above, info):
            keeps = any(tensor.keeps for tensor in one.tensor.graph())
            assert keeps == (case == "mxfp4" or case.startswith(TURNED))


def test_every_form_has_a_file_that_reads_it():
    for kind, form in FORMATS.items():
        for named in (kind, *form.schemes):
            assert callable(reader_of(kind, named)), kind
        assert reader_of(kind, "another") is None
    assert reader_of("hqq", "hqq") is None
    files = {path.stem for path in Path(detect.__file__).parent.glob("*.py") if "\ndef read(" in path.read_text()}
    assert files == {form.module for form in FORMATS.values()}


class CountingReader(Reader):
    runs = 0

    def read_runs(self, *arguments: Any) -> None:
        self.runs += 1
        super().read_runs(*arguments)


@pytest.mark.parametrize("case", ["mxfp4 of 37 rows", "gptq of 160 outputs"])
def test_a_large_matrix_is_read_once_panel_by_panel(case, tmp_path, monkeypatch):
    packed = CASES[case]()
    make_checkpoint(tmp_path, packed.tensors, config={"quantization_config": packed.config})
    (info,) = decoded(open_checkpoint(tmp_path)).tensors.values()
    whole, pieces = (np.empty(info.shape, np.float32) for _ in range(2))
    with Reader() as reader:
        reader.read_into(info, 0, whole)
    monkeypatch.setattr(scheme, "SLAB", 1 << 10)
    monkeypatch.setattr(scheme, "BAND", 1)
    monkeypatch.setattr(scheme, "CHUNK", 1)
    with CountingReader() as reader:
        for at in range(0, whole.size, info.shape[-1]):
            reader.read_into(info, at, pieces.reshape(-1)[at : at + info.shape[-1]])
        assert 0 < reader.runs <= 10
    assert pieces.tobytes() == whole.tobytes()


def from_transformers(packed: Packed) -> np.ndarray:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(*packed.tensors.values(), dtype=torch.float32).numpy()


def from_compressed_tensors(packed: Packed) -> np.ndarray:
    """By the library's steps in float32; `decompress` itself rounds to bfloat16."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    codes, scales = packed.tensors["a.weight_packed"], packed.tensors["a.weight_scale"]
    nv = scales.dtype == torch.float8_e4m3fn
    weights = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group" if nv else "group",
                               group_size=16 if nv else 32, symmetric=True)  # fmt: skip
    values = unpack_fp4_from_uint8(codes, len(codes), codes.shape[1] * 2, torch.float32)
    scales = (scales if nv else decompress_mx_scale(scales)).float()
    factor = packed.tensors.get("a.weight_global_scale")
    return dequantize(values, scales, args=weights, dtype=torch.float32, global_scale=factor).numpy()


def from_bitsandbytes(packed: Packed) -> np.ndarray:
    from bitsandbytes import functional

    state = {name.removeprefix("a.weight."): t for name, t in packed.tensors.items() if name.count(".") > 1}
    if not state:
        return functional.int8_vectorwise_dequant(packed.tensors["a.weight"], packed.tensors["a.SCB"]).numpy()
    held = functional.QuantState.from_dict(state, torch.device("cpu"))
    # its CPU kernel has -0 where fp4's table has 0; the table is what the file holds
    return functional.dequantize_4bit(packed.tensors["a.weight"], held).numpy() + np.float32(0)


ORACLES: dict[str, Callable[[Packed], np.ndarray]] = {
    "mxfp4": from_transformers,
    "nvfp4 of compressed-tensors": from_compressed_tensors,
    "mxfp4 of compressed-tensors": from_compressed_tensors,
    # rows of at least one block: the library's CPU kernel misreads shorter ones (0.50.2)
    **dict.fromkeys(("nf4", "nf4 nested", "nf4 stored as bfloat16", "fp4", "int8"), from_bitsandbytes),
}


@pytest.mark.parametrize("case", ORACLES)
def test_bits_are_those_of_the_library(case, tmp_path):
    packed = CASES[case]()
    (found,) = read(packed, tmp_path).values()
    assert found.tobytes() == ORACLES[case](packed).tobytes()


@pytest.mark.parametrize("case", ["mlx", "metal"])
def test_bits_are_those_of_mlx(case, tmp_path):
    packed = CASES[case]()
    found = read(packed, tmp_path)
    assert all(found[name].tobytes() == values.astype(np.float32).tobytes() for name, values in packed.values.items())


def test_a_zero_point_of_nothing_is_undone_as_gptqmodel_stored_it(tmp_path):
    """Version 1 subtracts one from whole words, so a zero of 0 borrows from the next code."""
    packed = made.gptq(4)
    zeros = np.zeros((3, 64), int)
    words = made.bitstream(zeros, 4).numpy().view(np.uint32) - np.uint32(0x11111111)
    packed.tensors["a.qzeros"] = torch.from_numpy(words.view(np.int32))
    found = read(packed, tmp_path)["a.weight"]
    order = packed.tensors["a.g_idx"].numpy()
    scales = packed.tensors["a.scales"].float().numpy()[order].T
    ratio = found / scales
    assert ratio.min() == 0
    assert ratio.max() == 15


def change(name: str, value: Any) -> Callable[[Packed], None]:
    def apply(packed: Packed) -> None:
        if value is None:
            del packed.tensors[name]
        else:
            packed.tensors[name] = value(packed.tensors[name])

    return apply


def say(**settings: Any) -> Callable[[Packed], None]:
    return lambda packed: packed.config.update(settings)


def holed(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor with `value` in its last place."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return apply


def stated(**settings: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A quant_state with other settings."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        import json

        said = json.loads(bytes(tensor.tolist())) | settings
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return apply


STATE = "a.weight.quant_state.bitsandbytes__nf4"
CORRUPT: dict[str, tuple[str, Callable[[Packed], None], str]] = {
    "mxfp4: scales of another shape": (
        "mxfp4", change("e.gate_up_proj_scales", lambda t: t[:, :9]), "has the shape [3, 9, 5], must be [3, 10, 5]"
    ),
    "mxfp4: blocks of another size": (
        "mxfp4", change("e.gate_up_proj_blocks", lambda t: t[..., :8]), "its blocks are U8 [3, 10, 5, 8], must be"
    ),
    "mxfp4: scales that are no exponents": (
        "mxfp4", change("e.gate_up_proj_scales", lambda t: t.float()), "_scales is F32, must be F8_E8M0 or U8"
    ),
    "mxfp4: a NaN scale": ("mxfp4", change("e.gate_up_proj_scales", holed(255)), "_scales: holds NaN or infinity"),
    "nvfp4: scales for groups of 24": (
        "nvfp4 of modelopt", change("a.weight_scale", lambda t: t[:, :2]), "has the shape [7, 2], must be [7, 3]"
    ),
    "nvfp4: a NaN scale": ("nvfp4 of modelopt", change("a.weight_scale", holed(float("nan"))), "holds NaN"),
    "nvfp4: two global scales": (
        "nvfp4 of modelopt", change("a.weight_scale_2", lambda t: t.repeat(2)), "F32 [2], must be one F32"
    ),
    "nvfp4: columns that groups do not divide": (
        "nvfp4 of modelopt", change("a.weight", lambda t: t[:, :20].contiguous()), "groups: 16 does not divide 40"
    ),
    "nvfp4: a global scale of 0": (
        "nvfp4 of compressed-tensors", change("a.weight_global_scale", lambda t: t * 0), "weight_global_scale: is 0"
    ),
    "nvfp4: no global scale": (
        "nvfp4 of compressed-tensors", change("a.weight_global_scale", None), "its weight_global_scale is missing"
    ),
    "gptq: another format": ("gptq of 4 bits", say(checkpoint_format="marlin"), "format is 'marlin', must be gptq or"),
    "gptq: other bits": ("gptq of 4 bits", say(bits=8), "its zeros are of 4 bits, config.json says 8"),
    "gptq: no zeros": ("gptq of 4 bits", change("a.qzeros", None), "its qzeros is missing"),
    "gptq: zeros of no width": (
        "gptq of 4 bits", change("a.qzeros", lambda t: t[:, :7].contiguous()), "give no width of 2, 3, 4, 8 bits"
    ),
    "gptq: a group that is not there": ("gptq of 4 bits", change("a.g_idx", holed(3)), "names group 3 of 3"),
    "gptq: an order of another length": (
        "gptq of 4 bits", change("a.g_idx", lambda t: t[:95]), "g_idx has the shape [95], must be [96]"
    ),
    "gptq: groups of another size": (
        "gptq of 4 bits, version 2, no order", say(group_size=64), "has 3 groups, config.json says one for 64 of 96"
    ),
    "gptq: an infinite scale": ("gptq of 4 bits", change("a.scales", holed(float("inf"))), "a.scales: holds NaN or"),
    "awq: another version": ("awq", say(version="GEMV"), "its version is 'gemv', must be gemm"),
    "awq: other bits": ("awq", say(bits=3), "its codes are of 3 bits, must be 4"),
    "awq: no zeros": ("awq", change("a.qzeros", None), "its qzeros is missing"),
    "awq: zeros of another shape": (
        "awq", change("a.qzeros", lambda t: t[:2]), "its qzeros has the shape [2, 5], must be [3, 5]"
    ),
    "nf4: no state": ("nf4", change(STATE, None), "its quant_state.bitsandbytes__… is missing"),
    "nf4: a state of another shape": (
        "nf4", change(STATE, stated(shape=[48, 64])), "its codes take 3,072 bytes, must be 1,536 for [48, 64]"
    ),
    "nf4: a state without a shape": ("nf4", change(STATE, stated(shape=None)), "its shape is None"),
    "nf4: a state of no blocks": ("nf4", change(STATE, stated(blocksize=0)), "its blocksize is 0"),
    "nf4: a state that is no JSON": ("nf4", change(STATE, lambda t: t[:9]), "bitsandbytes__nf4: is not valid JSON"),
    "nf4: absmax of another shape": (
        "nf4", change("a.weight.absmax", lambda t: t[:95]), "absmax has the shape [95], must be [96]"
    ),
    "nf4: an infinite absmax": ("nf4", change("a.weight.absmax", holed(float("inf"))), "a.weight.absmax: holds NaN or"),
    "nf4: no absmax": (
        "nf4", change("a.weight.absmax", lambda t: t * 0), "a.weight.absmax: the scale at row 0, column 0 is 0.0",
    ),
    "int8: a scale of 0": ("int8", change("a.SCB", holed(0)), "a.SCB: the scale at row 19, column 0 is 0.0"),
    "nf4: no nested table": (
        "nf4 nested", change("a.weight.nested_quant_map", None), "its nested_quant_map is missing"
    ),
    "int8: columns first": ("int8", change("a.weight_format", holed(2)), "its weight_format is 2, must be 0 (rows)"),
    "int8: scales of another shape": ("int8", change("a.SCB", lambda t: t[:19]), "its SCB has the shape [19], must be"),
    "mlx: unknown mode": ("metal", say(mode="log"), "its mode is 'log', must be affine, mxfp4, mxfp8, nvfp4"),
    "mlx: unknown bits": ("metal", say(bits=7), "config.json says 7 bits and groups of 64 for mode affine"),
    "mlx: groups of another size": (
        "metal", say(group_size=32), "its scales has the shape [3, 1], must be [3, 2]"
    ),
    "mlx: no biases": ("mlx", change("affine-4-64.biases", None), "affine-4-64.weight: mlx, 4 bits: its biases is"),
}  # fmt: skip


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_files_are_refused(case, tmp_path):
    scheme, spoil, message = CORRUPT[case]
    packed = CASES[scheme]()
    spoil(packed)
    packed = packed._replace(tensors={name: t.contiguous() for name, t in packed.tensors.items()})
    with pytest.raises(InputError) as raised:
        read(packed, tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


MOVED: dict[str, tuple[str, Callable[[Packed], None], str]] = {
    "inputs scaled by modelopt": (
        "nvfp4 of modelopt", lambda p: p.tensors.update({"a.pre_quant_scale": torch.ones(48)}), "_quant_scale scales",
    ),
    "activations scaled by AWQ": (
        "awq", lambda p: p.tensors.update({"mlp.act.scales": torch.ones(48)}), "mlp.act.scales scales the inputs",
    ),
    "rotated": (
        "nvfp4 of compressed-tensors", say(transform_config={"config_groups": {"R1": {}}}), "transform_config rotates",
    ),
    "rotated by gptqmodel": ("gptq of 4 bits", say(rotation="hadamard"), "rotation rotates its weights"),
    "scales of nothing": ("awq", lambda p: p.tensors.update({"b.scales": torch.ones(1)}), "b.scales belongs to no"),
    "int8 scales of nothing": ("int8", lambda p: p.tensors.update({"b.SCB": torch.ones(1)}), "b.SCB belongs to no"),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVED)
def test_weights_that_are_not_the_models_own_are_refused(case, tmp_path):
    scheme, spoil, message = MOVED[case]
    packed = CASES[scheme]()
    spoil(packed)
    with pytest.raises(InputError, match=message):
        read(packed, tmp_path)


def test_the_shape_of_four_bits_is_fetched_from_the_hub(server, tmp_path):
    packed = CASES["nf4 nested"]()
    make_checkpoint(tmp_path / "m", packed.tensors, config={"quantization_config": packed.config})
    server.repositories["org/nf4"] = tmp_path / "m"
    described = decoded(open_model("org/nf4", tmp_path, weights=False))
    assert {n: i.shape for n, i in described.tensors.items()} == {"a.weight": (48, 128)}
    assert all(span for _, span in server.fetched(".safetensors"))
    found = decoded(open_model("org/nf4", tmp_path, weights=True)).tensors["a.weight"]
    with Reader() as reader:
        values = np.empty(found.shape, np.float32)
        reader.read_into(found, 0, values)
    assert values.tobytes() == read(packed, tmp_path / "local")["a.weight"].tobytes()


@pytest.mark.parametrize("method", sorted({*AUTO_QUANTIZATION_CONFIG_MAPPING, "quip", "exl2", "marlin", "brand-new"}))
def test_every_scheme_of_transformers_is_read_or_refused_by_name(method, tmp_path):
    tensors = {"a.weight": torch.ones(8, 8, dtype=torch.int8), "a.weight_scales": torch.ones(8), "b": torch.ones(2)}
    method = method.removesuffix("_4bit").removesuffix("_8bit")
    make_checkpoint(tmp_path, tensors, config={"quantization_config": {"quant_method": method}})
    with pytest.raises(InputError, match=rf"is quantised \({method}\): .*a\.weight"):
        decoded(open_checkpoint(tmp_path))
