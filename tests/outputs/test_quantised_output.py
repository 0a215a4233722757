"""Merges written in quantised form: every form against a float64 quantiser, unchanged weights byte for byte, the same
bytes however it is run, and loaded by the libraries that defined the forms."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backend_choice import TORCH, computed_by
from calls import call
from conftest import LEVELS, load_tensors, make_checkpoint, needs_kernels, tiny_llama
from interrupted import Stop, files
from packed_files import CASES
from quantised_models import fp8, fp8_checkpoint
from running import finish, make_plan, run

from deltamerge.engine import kernels
from deltamerge.errors import InputError, OutputError
from deltamerge.formats import safetensors as writer
from deltamerge.formats.quantised import scheme as codings
from deltamerge.formats.quantised import writer as coded_writer
from deltamerge.formats.quantised.coder import Adjustable, ScaleChoice, _coded, coded
from deltamerge.formats.quantised.codes import E2M1, E4M3, E5M2, Integers
from deltamerge.models.checkpoint import decoded, open_checkpoint
from deltamerge.plan.quantise import _renumbered
from deltamerge.run.partition import Part
from deltamerge.tensors.reader import Reader

W = "model.layers.0.mlp.up_proj.weight"
Made = tuple[dict[str, torch.Tensor], dict[str, Any]]


def values_of(folder: Path) -> dict[str, np.ndarray]:
    """The float32 values of a checkpoint's tensors, by our readers, which have tests of their own."""
    found = {}
    with Reader() as reader:
        for name, info in decoded(open_checkpoint(folder)).tensors.items():
            raw = np.empty(info.nbytes, np.uint8)
            reader.read_into(info, 0, raw)
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[info.dtype]
            found[name] = torch.frombuffer(raw, dtype=dtype).reshape(info.shape).float().numpy()
    return found


def same_bytes(a: Path, b: Path) -> bool:
    first, second = load_tensors(a), load_tensors(b)
    raw = [{n: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in tensors.items()}
           for tensors in (first, second)]  # fmt: skip
    return raw[0] == raw[1]


def merge(folder: Path, tune: str, quantization: str, *, base: str = "base", out: str = "", **options: Any) -> Any:
    recipe = folder / f"{tune}-{quantization[:4].strip('{')}.yaml"
    recipe.write_text(
        f"base_model: ./{base}\nmodels: [{{model: ./{tune}}}]\noutput: {{quantization: {quantization}}}\n"
    )
    return run(recipe, folder / (out or f"{tune}-out"), **options)


# Independent quantisers, in float64: the numbers, and the greatest of each block as the largest of them.


def levels(exponent: int, mantissa: int, bias: int, largest: float) -> np.ndarray:
    found = [0.0]
    for power in range(1 << exponent):
        for fraction in range(1 << mantissa):
            whole = fraction / (1 << mantissa) + (power > 0)
            found.append(whole * 2.0 ** (max(power, 1) - bias))
    kept = sorted({x for x in found if x <= largest})
    return np.array(sorted({-x for x in kept} | set(kept)))


NUMBERS = {
    "e4m3": levels(4, 3, 7, 448), "e5m2": levels(5, 2, 15, 57344), "e2m1": levels(2, 1, 1, 6),
    **{f"int{bits}": np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * 1.0 for bits in range(2, 9)},
}  # fmt: skip


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    between = (table[1:] + table[:-1]) / 2
    return table[np.searchsorted(between, values)]


def floor(values: np.ndarray, block: tuple[int, int], how: str) -> float:
    """‖x − q(x)‖ / ‖x‖ of quantising matrices once, each block with the scale of its greatest magnitude.

    how   a table of `NUMBERS`, with " e8m0" for scales that are powers of two; or as many steps as bits have numbers,
          from the least to the greatest ("steps4"), with 0 among them ("zeros4")
    """
    name, _, scale = how.partition(" ")
    lost = 0.0
    matrices = values.astype(np.float64).reshape(-1, *values.shape[-2:])
    m, n = min(block[0], matrices.shape[1]), min(block[1], matrices.shape[2])
    for matrix in matrices:
        for top in range(0, matrix.shape[0], m):
            for left in range(0, matrix.shape[1], n):
                x = matrix[top : top + m, left : left + n]
                if name[:5] in ("steps", "zeros"):
                    low, high = x.min(), x.max()
                    if name[:5] == "zeros":
                        low, high = min(low, 0), max(high, 0)
                    step = (high - low) / (2 ** int(name[5:]) - 1) or 1.0
                    start = low if name[:5] == "steps" else np.rint(low / step) * step
                    back = start + np.clip(np.rint((x - start) / step), 0, 2 ** int(name[5:]) - 1) * step
                else:
                    s = np.abs(x).max() / NUMBERS[name].max() or 1.0
                    s = 2 ** np.ceil(np.log2(s)) if scale == "e8m0" else s
                    back = nearest(x / s, NUMBERS[name]) * s
                lost += float(np.square(x - back).sum())
    return float(np.sqrt(lost / np.square(matrices).sum()))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_case(name: str) -> Made:
    made = CASES[name]()
    return made.tensors, made.config


def blocks(block: tuple[int, int], shape: tuple[int, ...] = (20, 48), **how: Any) -> Made:
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    return fp8(W, drawn(*shape), block, **how)[0], settings


def library(form: str, **weights: Any) -> Made:
    """A weight as compressed-tensors itself compresses it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = drawn(64, 96).bfloat16()
    size = {"group": weights.get("group_size"), "channel": 96}[weights["strategy"]]
    scale = (weight.float().abs().reshape(64, -1, size).amax(-1) / (2.0 ** (weights["num_bits"] - 1))).bfloat16()
    state = {"weight": weight, "weight_scale": scale}
    if weights.get("symmetric") is False:
        state["weight_zero_point"] = torch.ones(scale.shape, dtype=torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    stored = BaseCompressor.get_value_from_registry(form).compress(state, scheme)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    return {W.removesuffix("weight") + name: tensor for name, tensor in stored.items()}, settings


FORMS: dict[str, tuple[Callable[[], Made], tuple[int, int], str]] = {
    "fp8 by block": (lambda: blocks((8, 16)), (8, 16), "e4m3"),
    "fp8 by block that does not divide": (lambda: blocks((7, 9)), (7, 9), "e4m3"),
    "fp8 of experts": (lambda: blocks((8, 16), (3, 20, 48)), (8, 16), "e4m3"),
    "fp8 by tensor": (lambda: blocks((20, 48)), (20, 48), "e4m3"),
    "fp8 by row": (lambda: blocks((1, 48), scales=torch.bfloat16), (1, 48), "e4m3"),
    "fp8, scales of E8M0": (lambda: blocks((8, 16), scales=torch.float8_e8m0fnu), (8, 16), "e4m3 e8m0"),
    "fp8, e5m2": (lambda: blocks((8, 16), codes=torch.float8_e5m2), (8, 16), "e5m2"),
    "int8": (lambda: library("int-quantized", num_bits=8, strategy="channel"), (1, 96), "int8"),
    "int8, asymmetric": (
        lambda: library("int-quantized", num_bits=8, strategy="channel", symmetric=False), (1, 96), "zeros8"),
    "packed int4": (lambda: library("pack-quantized", num_bits=4, strategy="group", group_size=32), (1, 32), "int4"),
    "packed int3": (lambda: library("pack-quantized", num_bits=3, strategy="group", group_size=32), (1, 32), "int3"),
    "packed int4, asymmetric": (
        lambda: library("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
        (1, 32), "zeros4"),
    "packed int3, asymmetric": (
        lambda: library("pack-quantized", num_bits=3, strategy="channel", symmetric=False), (1, 96), "zeros3"),
    "mxfp4": (lambda: packed_case("mxfp4"), (32, 1), "e2m1 e8m0"),
    "mxfp4 of compressed-tensors": (lambda: packed_case("mxfp4 of compressed-tensors"), (1, 32), "e2m1 e8m0"),
    "nvfp4 of modelopt": (lambda: packed_case("nvfp4 of modelopt"), (1, 16), "e2m1"),
    "nvfp4 of compressed-tensors": (lambda: packed_case("nvfp4 of compressed-tensors"), (1, 16), "e2m1"),
    "gptq": (lambda: packed_case("gptq of 4 bits, version 2, no order"), (1, 32), "zeros4"),
    "gptq of 3 bits, version 2": (lambda: packed_case("gptq of 3 bits, version 2"), (0, 0), ""),
    "gptq of 2 bits in order of activations": (lambda: packed_case("gptq of 2 bits"), (0, 0), ""),
    "gptq, symmetric": (
        lambda: ((made := packed_case("gptq of 8 bits"))[0], {**made[1], "sym": True}), (0, 0), ""),
    "awq": (lambda: packed_case("awq"), (1, 32), "zeros4"),
    "nf4": (lambda: packed_case("nf4"), (0, 0), ""),
    "nf4, nested": (lambda: packed_case("nf4 nested"), (0, 0), ""),
    "fp4, nested, odd": (lambda: packed_case("fp4 nested, odd"), (0, 0), ""),
    "bitsandbytes int8": (lambda: packed_case("int8"), (1, 33), "int8"),
    "mlx": (lambda: packed_case("metal"), (1, 64), "steps4"),
    "every mode of mlx": (lambda: packed_case("mlx"), (0, 0), ""),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_kept(form, tmp_path):
    make, block, how = FORMS[form]
    tensors, settings = make()
    key = "quantization_config" if "quant_method" in settings else "quantization"
    make_checkpoint(tmp_path / "base", tensors, config={"model_type": "test", key: settings})
    plain = values_of(tmp_path / "base")
    tune = {n: torch.from_numpy(x) + 0.05 * float(x.std()) * drawn(*x.shape, seed=7) for n, x in plain.items()}
    make_checkpoint(tmp_path / "tune", tune, config={"model_type": "test"})
    made = merge(tmp_path, "tune", "keep")
    stored = load_tensors(made.folder)
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    assert json.loads((made.folder / "config.json").read_text())[key] == settings
    said, back = made.lock["quantization"]["tensors"], values_of(made.folder)
    for name, wanted in tune.items():
        exact = wanted.double().numpy()
        error = float(np.linalg.norm(back[name] - exact) / np.linalg.norm(exact))
        assert said[name] == pytest.approx(error, rel=2e-3)
        if how:
            assert error <= 1.02 * floor(exact, block, how)
    # what equals the base, though it is another's and plain, gets the base's bytes
    make_checkpoint(
        tmp_path / "twin", {n: torch.from_numpy(x) for n, x in plain.items()}, config={"model_type": "test"}
    )
    made = merge(tmp_path, "twin", "keep")
    assert same_bytes(made.folder, tmp_path / "base")
    assert made.lock["quantization"]["relative_error"] == 0


@pytest.mark.parametrize(("numbers", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2), (E2M1, None)])
def test_small_floats_are_the_nearest_ties_to_even(numbers, dtype):
    exponent, mantissa, _, last, _, _ = numbers.form
    table = numbers.values(np.arange(last + 1, dtype=np.uint8)).astype(np.float64)
    ties = (table[1:] + table[:-1]) / 2
    near = [np.nextafter(ties.astype(np.float32), np.float32(way)) for way in (-1e9, 1e9)]
    some = np.random.default_rng(0).standard_normal(3000) * numbers.largest / 3
    values = np.concatenate([table, ties, *near, some, [1e-30, numbers.largest * 3, 0.0]]).astype(np.float32)
    values = np.concatenate([values, -values])
    distance = np.abs(np.abs(values.astype(np.float64))[:, None] - table)
    found = numbers.codes(values.copy())
    at = found & np.uint8(last | (1 << (exponent + mantissa)) - 1)
    assert np.array_equal(distance[np.arange(len(at)), at], distance.min(1))
    tied = (distance == distance.min(1)[:, None]).sum(1) > 1
    assert not (at[tied] & 1).any()
    assert np.array_equal(np.signbit(numbers.values(found)), np.signbit(values))
    if dtype is not None:
        clipped = torch.from_numpy(np.clip(values, -numbers.largest, numbers.largest))
        assert np.array_equal(found, clipped.to(dtype).view(torch.uint8).numpy())


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
def test_kernels_make_the_codes_that_numpy_makes(level):
    native, rng = kernels.native(), np.random.default_rng(0)
    try:
        assert native.choose(level)
        for numbers in (E4M3, E5M2, E2M1, Integers(8), Integers(4), Integers(3), Integers(4, signed=False)):
            for shape in ((2, 3, 5, 7), (1, 40, 3, 128), (16, 1, 9, 32), (1, 1, 3, 1000)):
                blocks = (rng.standard_normal(shape) * np.exp(rng.uniform(-8, 2, shape))).astype(np.float32)
                blocks.reshape(-1)[::5] = 0.0
                blocks.reshape(-1)[1::7] *= -0.0
                scales = np.abs(blocks).max(axis=(1, 3)) / numbers.largest * rng.uniform(0.4, 1.1, shape[::2]) + 1e-30
                whole = isinstance(numbers, Integers)
                for zeros in (None, rng.integers(0, 8, shape[::2]).astype(numbers.dtype) if whole else None):
                    choice = ScaleChoice(scales.astype(np.float32), scales, zeros)
                    found, expected = coded(blocks, numbers, choice), _coded(blocks, numbers, choice)
                    assert np.array_equal(found.codes, expected.codes), (numbers, shape)
                    np.testing.assert_allclose(found.lost, expected.lost, rtol=1e-12)
        few, many = np.zeros(4, np.float32), np.zeros(8, np.float32)
        for sizes in ((2, 1, 1, 4), (1, 1, 1, 5), (0, 1, 1, 4), (1, -1, -1, 4), (1, 1 << 40, 1 << 40, 1)):
            with pytest.raises(ValueError, match="shorter"):
                native.coded(few, many, many[:0], few.view(np.uint8), many.view(np.float64), *sizes, *E4M3.form)
    finally:
        native.choose(LEVELS[0])


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 base and two plain fine-tunes, of weights that take several units, tiles and shards."""
    folder = tmp_path_factory.mktemp("big")
    names = {f"layers.{i}.up.weight": (520, 1100) for i in range(2)} | {"layers.0.fused": (3, 130, 300)}
    weights = {name: 0.02 * drawn(*shape, seed=i) for i, (name, shape) in enumerate(names.items())}
    stored: dict[str, torch.Tensor] = {"norm.weight": drawn(300).bfloat16()}
    for name, weight in weights.items():
        stored |= fp8(name, weight, (128, 128))[0]
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    make_checkpoint(folder / "base", stored, config={"model_type": "test", "quantization_config": settings})
    for seed, tune in enumerate(("a", "b")):
        tensors = {name: (w + 0.002 * drawn(*w.shape, seed=9 + seed)).bfloat16() for name, w in weights.items()}
        make_checkpoint(folder / tune, tensors | {"norm.weight": stored["norm.weight"]})
    (folder / "r.yaml").write_text(
        "base_model: ./base\nmerge_method: dare_ties\nmodels:\n"
        "- {model: ./a, parameters: {weight: 0.6, density: 0.5}}\n- {model: ./b, parameters: {weight: 0.5}}\n"
        "output: {quantization: keep, shard_size: 600KB}\n"
    )
    return folder


def test_bytes_do_not_depend_on_how_it_is_run(big, tmp_path, monkeypatch):
    truth = files(run(big / "r.yaml", tmp_path / "a" / "out", workers=1).folder)
    lock = truth["recipe.lock"]
    assert b"relative_error" in lock
    assert files(run(big / "r.yaml", tmp_path / "b" / "out", workers=3, memory=400_000_000).folder) == truth
    for part in (1, 2, 3):
        run(big / "r.yaml", tmp_path / "c" / "out", part=Part(part, 3))
    assert files(finish(big / "r.yaml", tmp_path / "c" / "out").folder) == truth
    monkeypatch.setattr(coded_writer, "LARGE", 0)  # units are collected in a file
    monkeypatch.setattr(kernels, "native", lambda: None)
    with computed_by(TORCH):
        assert files(run(big / "r.yaml", tmp_path / "d" / "out").folder) == truth


@pytest.mark.parametrize("after", [1, 2_000_000, 4_500_000])
def test_an_interrupted_run_goes_on_to_the_same_bytes(big, tmp_path, monkeypatch, after):
    truth = files(run(big / "r.yaml", tmp_path / "truth" / "out").folder)
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(big / "r.yaml", out, watch=Stop(out, after, KeyboardInterrupt()))
    assert files(run(big / "r.yaml", out, resume=True, workers=2).folder) == truth


def test_units_tile_a_weight_and_its_parts(big):
    for output in make_plan(big / "r.yaml").outputs:
        coding = output.coding
        if coding is None:
            continue
        units = list(coding.units(0, output.elements))
        assert [u.stop for u in units] == [*(u.start for u in units[1:]), output.elements]
        assert list(coding.units(units[-1].start + 1, units[-1].stop)) == [units[-1]]
        for i, part in enumerate(coding.parts):
            spans = [list(coding.places(unit))[i][1:] for unit in units]
            assert [end for _, end in spans] == [*(begin for begin, _ in spans[1:]), part.nbytes]
    assert codings.by_rows((4096, 4096), Adjustable(), multiple=128).unit == 128


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llamas")
    tiny_llama(folder / "base", seed=1, tokenizer=True)
    tiny_llama(folder / "tune", seed=2, base=folder / "base", tokenizer=True)
    config = json.loads((folder / "base" / "config.json").read_text())
    fp8_checkpoint(folder / "fp8", folder / "base", (16, 16), config)
    return folder


WRITTEN = {
    "{scheme: fp8, block: [16, 16]}": ("weight_scale_inv", 0.027),
    "{scheme: fp8, strategy: channel}": ("weight_scale", 0.027),
    "int8": ("weight_scale", 0.008),
    "{scheme: int4, group: 16}": ("weight_packed", 0.09),
    "int4": ("weight_packed", 0.11),
    "nvfp4": ("weight_packed", 0.11),
    "mxfp4": ("weight_packed", 0.14),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_transformers_loads_what_a_scheme_writes(llamas, tmp_path, how):
    import transformers

    pytest.importorskip("compressed_tensors")
    pytest.importorskip("accelerate")
    part, most = WRITTEN[how]
    made = merge(llamas, "tune", how, out=str(tmp_path / "out"))
    assert f"model.layers.1.mlp.up_proj.{part}" in load_tensors(made.folder)
    assert 0 < made.lock["quantization"]["relative_error"] < most
    settings = (
        transformers.FineGrainedFP8Config(dequantize=True)
        if "block" in how else transformers.CompressedTensorsConfig(dequantize=True)
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the key of the config is there as well
        model = transformers.AutoModelForCausalLM.from_pretrained(
            made.folder, dtype=torch.float32, quantization_config=settings
        )
    expected, loaded = values_of(made.folder), model.state_dict()
    assert expected.keys() <= loaded.keys()
    for name, values in expected.items():
        found = loaded[name].float().numpy()
        assert np.abs(found - values).max() <= (0 if "block" in how else 2**-7 * np.abs(values).max()), name
    ids = torch.arange(4, 20)[None]
    plain = transformers.AutoModelForCausalLM.from_pretrained(llamas / "tune", dtype=torch.float32)
    plain.load_state_dict({n: torch.from_numpy(v) for n, v in expected.items()}, strict=False)
    with torch.no_grad():
        wide, narrow_ = plain(ids).logits, model(ids).logits
    assert (wide - narrow_).abs().max() < 0.05 * wide.abs().max()


def wide(folder: Path, columns: dict[str, int]) -> Path:
    """Make a base and a fine-tune of one matrix for each count of columns, 16 rows high."""
    for seed, name in enumerate(("base", "tune")):
        draw = np.random.default_rng(seed)
        make_checkpoint(
            folder / name,
            {
                f"model.layers.0.mlp.{part}.weight": torch.from_numpy(draw.standard_normal((16, n)).astype(np.float32))
                for part, n in columns.items()
            },
            config={"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        )
    return folder


@pytest.mark.parametrize(
    ("columns", "group"),
    [
        ({"up_proj": 256, "down_proj": 512}, 128),
        ({"up_proj": 576, "down_proj": 1536}, 64),  # SmolLM2's
        ({"up_proj": 96, "down_proj": 512}, 32),
    ],
)
def test_the_group_of_int4_fits_all_rows(tmp_path: Path, columns: dict[str, int], group: int) -> None:
    made = merge(wide(tmp_path, columns), "tune", "int4", out=str(tmp_path / "out"))
    weights = made.plan.config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert weights["group_size"] == group
    stored = load_tensors(made.folder)
    for part, count in columns.items():
        assert stored[f"model.layers.0.mlp.{part}.weight_scale"].shape == (16, count // group)
    assert made.remarks == ()


def test_a_run_says_which_weights_are_left_plain(tmp_path: Path) -> None:
    made = merge(wide(tmp_path, {"up_proj": 72, "down_proj": 64}), "tune", "int4", out=str(tmp_path / "out"))
    assert "model.layers.0.mlp.up_proj.weight" in load_tensors(made.folder)
    (said,) = made.remarks
    assert said.startswith("left plain, groups of 64 do not fit: model.layers.0.mlp.up_proj.weight; ")
    assert said in made.plan.notes


@pytest.mark.parametrize(("how", "hint"), [("fp8", "strategy: channel"), ("int4", "quantization: int8")])
def test_a_scheme_that_fits_no_weight_names_one_that_does(tmp_path: Path, how: str, hint: str) -> None:
    folder = wide(tmp_path, {"up_proj": 72})
    with pytest.raises(InputError, match="no weight can be quantised: left plain") as caught:
        merge(folder, "tune", how, out=str(tmp_path / "out"))
    assert hint in (caught.value.hint or "")


def test_transformers_loads_experts(tmp_path):
    """Experts one by one in FP8, and gpt-oss's in MXFP4."""
    import transformers

    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "head_dim": 16, "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 96,
             "pad_token_id": 0}  # fmt: skip
    moe = transformers.Qwen3MoeConfig(**shape, moe_intermediate_size=32, num_experts=4)
    oss = transformers.GptOssConfig(**shape, num_local_experts=2, layer_types=["full_attention"])
    for seed, name in enumerate(("base", "tune")):
        for kind, config in (("moe", moe), ("oss", oss)):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config)
            model.bfloat16().save_pretrained(tmp_path / kind / name)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(tmp_path / "oss" / "base").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, rows, columns = tensor.shape
            stored[f"{name}_blocks"] = torch.randint(0, 256, (count, columns, rows // 32, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.full((count, columns, rows // 32), 118, dtype=torch.uint8)
        else:
            stored[name] = tensor
    said = json.loads((tmp_path / "oss" / "base" / "config.json").read_text())
    make_checkpoint(tmp_path / "oss" / "mx", stored, config=said | {"quantization_config": {"quant_method": "mxfp4"}})
    for kind, base, how, settings in (
        ("moe", "base", "{scheme: fp8, block: [16, 16]}", transformers.FineGrainedFP8Config(dequantize=True)),
        ("oss", "mx", "keep", transformers.Mxfp4Config(dequantize=True)),
    ):
        made = merge(tmp_path / kind, "tune", how, base=base)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            made.folder, dtype=torch.float32, quantization_config=settings, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind / "tune", dtype=torch.float32)
        found = model.state_dict()
        lost = {n: float((found[n] - p).norm() / p.norm()) for n, p in exact.state_dict().items() if "proj" in n}
        assert 0.01 < max(lost.values()) < (0.03 if kind == "moe" else 0.13), lost


def test_lists_of_layers_follow_a_stack():
    listed = ["lm_head", "model.layers.3.mlp.gate", "re:.*norm"]
    assert _renumbered(listed, ["model.layers.0.mlp.gate"]) == ["lm_head", "re:.*norm", "model.layers.0.mlp.gate"]
    assert _renumbered(["lm_head"], ["model.layers.0.mlp.gate"]) == ["lm_head"]


def test_the_recipe_runs_as_written(llamas, tmp_path):
    for name, source in (("base-fp8", "fp8"), ("math", "tune"), ("code", "base")):
        shutil.copytree(llamas / source, tmp_path / "models" / name)
    shutil.copy(Path(__file__).parents[2] / "recipes" / "fp8-keep.yaml", tmp_path)
    made = run(tmp_path / "fp8-keep.yaml")
    assert load_tensors(made.folder).keys() == load_tensors(llamas / "fp8").keys()
    assert 0 < made.lock["quantization"]["relative_error"] < 0.03


def test_the_config_names_what_stays_plain(llamas, tmp_path):
    made = merge(llamas, "tune", "{scheme: fp8, block: [16, 16]}", out=str(tmp_path / "out"))
    said = json.loads((made.folder / "config.json").read_text())
    assert said["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head", "model.embed_tokens"],
        "quant_method": "fp8", "weight_block_size": [16, 16],
    }  # fmt: skip
    assert said["dtype"] == "bfloat16" or said["torch_dtype"] == "bfloat16"
    dtypes = {name: tensor.dtype for name, tensor in load_tensors(made.folder).items()}
    assert dtypes["lm_head.weight"] == dtypes["model.embed_tokens.weight"] == torch.bfloat16
    assert "weights are quantised: relative error" in (made.folder / "README.md").read_text()


def test_gates_and_weights_that_do_not_fit_stay_plain(tmp_path):
    shapes = {"model.layers.0.mlp.gate.weight": (8, 16), "model.layers.0.mlp.experts.1.up_proj.weight": (16, 32),
              "model.layers.0.mlp.experts.1.down_proj.weight": (32, 24), "model.layers.0.q_norm.weight": (16,),
              "vision_tower.layers.0.fc1.weight": (16, 16),
              "model.layers.0.mlp.experts.up_proj": (2, 16, 16)}  # fmt: skip
    make_checkpoint(tmp_path / "base", {name: drawn(*shape) for name, shape in shapes.items()})
    make_checkpoint(tmp_path / "tune", {name: drawn(*shape, seed=1) for name, shape in shapes.items()})
    made = merge(tmp_path, "tune", "{scheme: fp8, block: [16, 16]}")
    dtypes = {name: tensor.dtype for name, tensor in load_tensors(made.folder).items()}
    assert [name for name, dtype in dtypes.items() if dtype == torch.float8_e4m3fn] == [
        "model.layers.0.mlp.experts.1.up_proj.weight"
    ]
    listed = json.loads((made.folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert set(listed) == {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.experts.1.down_proj",
                           "vision_tower.layers.0.fc1", "model.layers.0.mlp.experts"}  # fmt: skip
    said = "\n".join(made.plan.notes)
    assert "do not fit: model.layers.0.mlp.experts.1.down_proj.weight" in said
    assert "experts fused in one tensor: model.layers.0.mlp.experts.up_proj" in said


def test_a_weight_that_is_only_copied_is_copied_as_it_is_stored(llamas, tmp_path):
    """Also from a model that is not the base: its codes, not its values."""
    (tmp_path / "r.yaml").write_text(
        f"merge_method: passthrough\nslices:\n- sources: [{{model: {llamas}/fp8, layer_range: [0, 1]}}]\n"
        f"- sources: [{{model: {llamas}/fp8, layer_range: [0, 2]}}]\noutput: {{quantization: keep}}\n"
    )
    made = run(tmp_path / "r.yaml", tmp_path / "out")
    old, new = load_tensors(llamas / "fp8"), load_tensors(made.folder)
    assert all(output.coding is None for output in made.plan.outputs)
    for name in ("mlp.up_proj.weight", "mlp.up_proj.weight_scale_inv", "self_attn.q_proj.weight"):
        for number, source in enumerate((0, 0, 1)):
            a, b = old[f"model.layers.{source}.{name}"], new[f"model.layers.{number}.{name}"]
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert "quantization" not in made.lock


def test_layers_of_a_plain_model_are_coded_as_the_others(llamas, tmp_path):
    (tmp_path / "r.yaml").write_text(
        f"merge_method: passthrough\nslices:\n- sources: [{{model: {llamas}/fp8, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {llamas}/tune, layer_range: [0, 2]}}]\noutput: {{quantization: keep}}\n"
    )
    made = run(tmp_path / "r.yaml", tmp_path / "out")
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(4)]
    stored, plain = load_tensors(made.folder), load_tensors(llamas / "tune")
    assert [stored[name].dtype for name in names] == [torch.float8_e4m3fn] * 4
    assert next(iter(made.lock["quantization"]["tensors"])).startswith("model.layers.2.")
    found = values_of(made.folder)[names[3]]
    assert np.abs(found - plain[names[1]].float().numpy()).max() < 0.05 * np.abs(found).max()


def test_scales_of_caches_and_companions_stay(llamas, tmp_path):
    tensors = load_tensors(llamas / "fp8")
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor(0.5)
    tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.tensor(0.25)
    config = json.loads((llamas / "fp8" / "config.json").read_text())
    make_checkpoint(tmp_path / "base", tensors, config=config)
    make_checkpoint(tmp_path / "tune", load_tensors(llamas / "tune"), config=config | {"quantization_config": None})
    made = merge(tmp_path, "tune", "keep")
    found = load_tensors(made.folder)
    assert found.keys() == tensors.keys()
    assert (found["model.layers.0.self_attn.k_scale"], found["model.layers.0.mlp.up_proj.input_scale"]) == (0.5, 0.25)


def test_what_cannot_be_written_is_refused_in_a_line(llamas, tmp_path, capsys):
    def recipe(output: str, base: str = "base", models: str = "tune", more: str = "") -> str:
        path = tmp_path / "r.yaml"
        path.write_text(
            f"base_model: {llamas}/{base}\nmodels: [{{model: {llamas}/{models}}}]\noutput: {output}\n{more}"
        )
        return str(path)

    def check(path: str) -> str:
        code, _, err = call(capsys, "check", path)
        assert code == 1
        return err

    assert "r.yaml:3:24: output.quantization: nothing to keep: no weight of" in check(recipe("{quantization: keep}"))
    assert "blocks of 128×128 do not fit" in check(recipe("{quantization: fp8}"))
    assert "did you mean 'fp8'?" in check(recipe("{quantization: fb8}"))
    assert "r.yaml:3:39: output.quantization.block: is not for int8" in check(
        recipe("{quantization: {scheme: int8, block: [1, 2]}}")
    )
    assert "a delta is not quantised" in check(recipe("{kind: delta, quantization: fp8}"))
    tensors = load_tensors(llamas / "tune")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    make_checkpoint(llamas / "nan", tensors, config=json.loads((llamas / "base" / "config.json").read_text()))
    with pytest.raises(OutputError, match=r"up_proj.weight: .*1 values are not finite, and cannot be quantised"):
        run(Path(recipe("{quantization: {scheme: fp8, block: [16, 16]}}", models="nan")), tmp_path / "out")


def test_a_form_that_cannot_be_written_is_named(llamas, tmp_path):
    order = torch.tensor([1, 0] * 48, dtype=torch.int32)
    tensors, settings = library("pack-quantized", num_bits=4, strategy="group", group_size=48)
    tensors[W.removesuffix("weight") + "weight_g_idx"] = order
    make_checkpoint(tmp_path / "base", tensors, config={"model_type": "test", "quantization_config": settings})
    make_checkpoint(tmp_path / "tune", {W: drawn(64, 96)}, config={"model_type": "test"})
    with pytest.raises(InputError, match=r"has columns in the order of .*weight_g_idx, which cannot be w") as found:
        merge(tmp_path, "tune", "keep")
    assert "quantization: none" in str(found.value.hint)
