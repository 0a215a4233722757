"""Models of different dtypes: arithmetic is float32, the output has the dtype asked for, or the base's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_tensors, make_checkpoint
from running import run

from deltamerge.tensors.dtypes import torch_dtype

PAIRS = [("BF16", "F8_E4M3"), ("BF16", "F8_E5M2"), ("F16", "F32"), ("F32", "F16"), ("F16", "BF16"), ("F32", "F8_E4M3")]
METHODS = {
    "task_arithmetic": lambda b, a, c: b + 0.5 * (a - b) + 0.25 * (c - b),
    "linear": lambda b, a, c: (0.5 * a + 0.25 * c) / 0.75,
}


def checkpoint(folder: Path, dtype: str, seed: int) -> np.ndarray:
    """A model of plain casts, without scales; its values in float64."""
    value = torch.randn(7, 16, generator=torch.Generator().manual_seed(seed)).to(torch_dtype(dtype))
    make_checkpoint(folder, {"w": value, "layers.0.b": value[0].clone()}, config={"model_type": "test"})
    return np.asarray(value.double().numpy())


@pytest.mark.parametrize(("pair", "asked"), [*((pair, "") for pair in PAIRS), (PAIRS[0], "F32"), (PAIRS[2], "F16")])
def test_arithmetic_is_float32_and_the_dtype_is_the_bases_or_the_one_asked_for(
    tmp_path: Path, pair: tuple[str, str], asked: str
) -> None:
    base, a, b = (
        checkpoint(tmp_path / name, dtype, seed)
        for seed, (name, dtype) in enumerate((("base", pair[0]), ("a", pair[1]), ("b", pair[0])))
    )
    names = {"F16": "float16", "F32": "float32"}
    wanted = torch_dtype(asked or pair[0])
    for method, formula in METHODS.items():
        models = "models: [{model: ./b, parameters: {weight: 0.25}}, {model: ./a, parameters: {weight: 0.5}}]\n"
        based = "" if method == "linear" else "base_model: ./base\n"
        more = f"dtype: {names[asked]}\n" if asked else ""
        (tmp_path / "r.yaml").write_text(f"merge_method: {method}\n{based}{models}{more}")
        out = run(tmp_path / "r.yaml", tmp_path / "out", force=True).folder
        found = load_tensors(out)
        exact = formula(base, a, b)
        for tensor, value in ((found["w"], exact), (found["layers.0.b"], exact[0])):
            assert tensor.dtype == wanted
            error = np.abs(tensor.double().numpy() - value)
            assert (error <= np.abs(value) * torch.finfo(wanted).eps / 2 * 1.001 + 1e-6).all()
        assert json.loads((out / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_one_fine_tune_in_float8_does_not_make_its_base_float8(tmp_path: Path, dtype: str) -> None:
    base, a = checkpoint(tmp_path / "base", "BF16", 0), checkpoint(tmp_path / "a", dtype, 1)
    (tmp_path / "r.yaml").write_text("base_model: ./base\nmodels: [{model: ./a, parameters: {weight: 0.5}}]\n")
    found = load_tensors(run(tmp_path / "r.yaml", tmp_path / "out").folder)["w"]
    assert found.dtype == torch.bfloat16
    exact = base + 0.5 * (a - base)
    assert (np.abs(found.double().numpy() - exact) <= np.abs(exact) * 2**-8 + 1e-6).all()
