"""Dtypes that no arithmetic here knows: copied byte by byte, and refused by name where a recipe would compute."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import write_tokenizer
from running import make_plan, run

from deltamerge.apps.chain.extract import extract
from deltamerge.apps.inspect.diff import diff_checkpoints
from deltamerge.errors import DeltamergeError
from deltamerge.formats.safetensors import read_header
from deltamerge.tensors.dtypes import COPIED, nbytes_of

SHAPE = (4, 6)


def model(folder: Path, dtype: str, seed: int) -> Path:
    """A checkpoint with one tensor of `dtype`, whose bytes follow from the seed, and one of bfloat16."""
    folder.mkdir(parents=True)
    size = nbytes_of(dtype, SHAPE)
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "BF16", "shape": [4, 4], "data_offsets": [0, 32]},
        "odd": {"dtype": dtype, "shape": list(SHAPE), "data_offsets": [32, 32 + size]},
    }
    text = json.dumps(header).encode()
    data = bytes(32) + random.Random(seed).randbytes(size)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text("{}")
    return folder


def bytes_of(folder: Path) -> tuple[str, tuple[int, ...], bytes]:
    info = read_header(folder / "model.safetensors").tensors["odd"]
    raw = (folder / "model.safetensors").read_bytes()
    return info.dtype, info.shape, raw[info.begin : info.begin + info.nbytes]


@pytest.mark.parametrize("dtype", sorted(COPIED))
def test_copied_where_nothing_is_computed_and_refused_where_it_is(tmp_path: Path, dtype: str) -> None:
    base, tuned = model(tmp_path / "base", dtype, 0), model(tmp_path / "tuned", dtype, 1)
    model(tmp_path / "more", dtype, 2)
    copy = tmp_path / "copy.yaml"
    copy.write_text("merge_method: passthrough\nmodels: [{model: ./tuned}]\n")
    assert bytes_of(run(copy, tmp_path / "copied").folder) == bytes_of(tuned)
    merge, weights = tmp_path / "merge.yaml", "parameters: {weight: 0.5}"

    def recipe(first: str, second: str, more: str = "") -> None:
        models = f"models: [{{model: ./{first}, name: x, {weights}}}, {{model: ./{second}, name: y, {weights}}}]"
        merge.write_text(f"merge_method: task_arithmetic\nbase_model: ./base\n{models}\n{more}")

    for more in ("", "output: {kind: delta}\n"):
        recipe("tuned", "more", more)
        with pytest.raises(DeltamergeError, match=f"odd: {dtype} is only copied"):
            make_plan(merge)
    found = diff_checkpoints(str(base), str(tuned), 1)
    assert [change["name"] for change in found["tensors"]] == ["odd"]


def test_a_delta_of_a_packed_dtype_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "base", "F4", 0)
    model(tmp_path / "tuned", "F4", 1)
    with pytest.raises(DeltamergeError, match="odd: F4 is only copied"):
        extract(str(tmp_path / "tuned"), str(tmp_path / "base"), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize("dtype", ["C64", "F8_E8M0"])
def test_rows_of_such_a_dtype_are_not_gathered(tmp_path: Path, dtype: str) -> None:
    """A table that only the template has is copied, unless its rows move with the tokens: that would read elements."""
    for name, rows in (("base", 6), ("a", 7)):
        size = nbytes_of(dtype, (rows, 4))
        header = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [rows, 4], "data_offsets": [0, 16 * rows]}}
        if name == "base":
            places = [16 * rows, 16 * rows + size]
            header["lm_head.weight"] = {"dtype": dtype, "shape": [rows, 4], "data_offsets": places}
        text = json.dumps(header).encode()
        data = bytes(16 * rows + (size if name == "base" else 0))
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "test", "vocab_size": rows}))
        write_tokenizer(tmp_path / name, rows)
    recipe = tmp_path / "r.yaml"
    models = "models: [{model: ./base, parameters: {weight: 0.5}}, {model: ./a, parameters: {weight: 0.5}}]"
    recipe.write_text(f"merge_method: linear\nbase_model: ./base\n{models}\ntemplate: base\ntokenizer_source: union\n")
    with pytest.raises(DeltamergeError, match=rf"lm_head\.weight: rows of {dtype} cannot be moved"):
        make_plan(recipe)
