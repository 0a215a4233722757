"""Bytes that are shared out: the artifact fits, is as good as its parts can be, applies by hash, and comes again."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama
from running import make_plan, run
from safetensors.torch import save_file

from deltamerge.errors import InputError, VerifyError
from deltamerge.formats.delta.entry import Decoder
from deltamerge.formats.delta.parts import LEVELS, Factored, coded_scales, levels_of, matrix_shape, sum_of
from deltamerge.methods.low_rank import Wanted, factor
from deltamerge.methods.rate import (
    FACTOR_LEVELS,
    TORCH,
    Choice,
    Curve,
    affordable,
    curve_of,
    distortion,
    histogram,
    parts_of,
    quantise,
    scratch,
    share,
    table,
    unit,
)
from deltamerge.models.delta_file import DeltaFile
from deltamerge.outputs.shares import ByteShares
from deltamerge.run.apply import apply
from deltamerge.run.lock import Lock

Array = np.ndarray[Any, Any]
RECIPE = """
base_model: base
models: [tuned]
merge_method: task_arithmetic
prune: {{method: budget, {size}}}
output: {{kind: delta, semantics: add}}
"""
SHAPES = {"a.weight": (96, 160), "b.weight": (160, 64), "c.weight": (3, 40, 24), "d.bias": (160,), "head": (24, 30)}


def spectrum(m: int, n: int, seed: int, power: float = 1.0) -> Array:
    """A delta whose singular values fall as 1/k to a power."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((side, min(m, n))))[0] for side in (m, n))
    found: Array = ((u / (1.0 + np.arange(min(m, n))) ** power) @ v.T).astype(np.float32)
    return found


def pair(folder: Path, scale: float = 3.0) -> None:
    rng = np.random.default_rng(3)
    base = {name: torch.tensor(rng.standard_normal(shape), dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    tuned = {}
    for seed, (name, tensor) in enumerate(base.items()):
        m, n = matrix_shape(tuple(tensor.shape))
        delta = scale * spectrum(m, n, seed) if min(m, n) > 1 else 0.02 * scale * rng.standard_normal((m, n))
        tuned[name] = (tensor.float() + torch.tensor(delta).reshape(tensor.shape).float()).bfloat16()
    make_checkpoint(folder / "base", base)
    make_checkpoint(folder / "tuned", tuned)


def recipe(folder: Path, size: str, more: str = "") -> Path:
    path = folder / f"{size.replace(': ', '-').replace(', ', '-')}.yaml"
    path.write_text(RECIPE.format(size=size) + more)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("delta*")}


# ---- quantisers and curves


@pytest.mark.parametrize("levels", [2, 3, 4, 8, 16])
def test_the_distortion_of_a_table_is_that_of_a_gaussian(levels: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, 400_000))
    codes, scale = quantise(x, levels)
    lost = float(((x - scale[:, None] * LEVELS[levels][codes]) ** 2).mean())
    assert lost == pytest.approx(table(levels).distortion, rel=0.02)
    best = {2: 0.3634, 3: 0.1902, 4: 0.1175, 8: 0.03454, 16: 0.009497}[levels]  # Max 1960
    assert table(levels).distortion == pytest.approx(best, rel=0.003)


def test_a_scale_is_the_best_for_its_codes() -> None:
    x = np.random.default_rng(1).standard_normal((5, 300)) * np.arange(1, 6)[:, None]
    codes, scale = quantise(x, 4)
    values = LEVELS[4][codes]
    np.testing.assert_allclose(scale, (values * x).sum(1) / (values**2).sum(1), rtol=1e-12)


def reference_factors(delta: Array, vectors: Array, levels: list[int]) -> Array:
    """Right vectors quantised, the best left ones for them, these quantised, scales solved for: float64 numpy."""
    d = delta.astype(np.float64)

    def rounded(x: Array, count: int) -> Array:
        found = LEVELS[count].astype(np.float64)
        scale = np.sqrt((x**2).mean()) * table(count).levels[-1] / found[-1]
        for _ in range(3):
            nearest = found[np.abs(x[:, None] / scale - found).argmin(1)]
            scale = (nearest * x).sum() / (nearest**2).sum()
        return nearest

    v = np.stack([rounded(x.astype(np.float64), count) for x, count in zip(vectors, levels, strict=True)])
    u = d @ v.T @ np.linalg.inv(v @ v.T)
    u = np.stack([rounded(x, count) for x, count in zip(u.T, levels, strict=True)])
    flat = np.stack([np.outer(x, y) for x, y in zip(u, v, strict=True)]).reshape(len(u), -1)
    scales = np.linalg.lstsq(flat.T, d.reshape(-1), rcond=None)[0]
    return np.einsum("k,ki,kj->ij", scales, u, v)


@pytest.mark.parametrize(("m", "n"), [(40, 60), (70, 30)])
def test_factors_are_those_of_float64(m: int, n: int) -> None:
    delta = spectrum(m, n, 5)
    vectors = factor(delta, Wanted(12), (1, 2)).a
    levels = [16, 8, 8, 4, 4, 4, 3, 2]
    parts, stored = parts_of(delta, Choice(0, 0, (*levels, 0, 0)), vectors)
    found = sum_of(parts, stored, m, n).values(0, m * n).reshape(m, n)
    order = sorted(range(8), key=lambda i: levels[i])
    expected = reference_factors(delta, vectors[order], [levels[i] for i in order])
    assert np.abs(found - expected).max() <= 0.04 * np.abs(expected).max()  # scales have 5 bits

    def lost(product: Array) -> float:
        return float(np.square(delta - product).sum())

    assert lost(found) <= lost(expected) * 1.01
    assert lost(found) < 0.5 * lost(np.zeros_like(found))


def curve(delta: Array) -> Curve:
    m, n = delta.shape
    gains = factor(delta, Wanted(), (1, 2)).gains if min(m, n) > 1 else np.zeros(0)
    return curve_of(m, n, gains, float((delta.astype(np.float64) ** 2).sum()), *histogram(delta, 1.0))


def test_what_is_predicted_is_about_what_is_lost() -> None:
    for delta in (spectrum(96, 160, 1), spectrum(64, 64, 2, 0.5), np.random.default_rng(3).standard_cauchy((60, 80))):
        delta = delta.astype(np.float32)
        made = curve(delta)
        vectors = factor(delta, Wanted(), (1, 2)).a
        forms = set()
        for price in made.energy * 2.0 ** -np.arange(4, 22):
            choice = made.choice(price)
            parts, stored = parts_of(delta, choice, vectors)
            m, n = delta.shape
            lost = ((delta - sum_of(parts, stored, m, n).values(0, m * n).reshape(m, n)) ** 2).sum() if parts else None
            assert (lost is None) == (choice.nbytes == 0)
            if lost is not None:
                forms.add("factors" if choice.components else "entries")
                assert lost <= 1.15 * choice.lost + 0.01 * made.energy
                assert stored.size <= choice.nbytes * 1.03
        assert forms


def test_codes_that_will_be_learned_are_more_and_shorter() -> None:
    """Of as many bytes: more components, more of them in one bit. The loss is told as it is before learning."""
    plain = curve(spectrum(96, 160, 1, 0.5))
    learned = replace(plain, learned=True)
    (before,), (after,) = (share([one], 1200)[1] for one in (plain, learned))
    (ranks, more), (ones, others) = (
        [f(np.array(one.components)) for one in (before, after)] for f in (np.count_nonzero, lambda c: (c == 257).sum())
    )
    assert more > ranks
    assert others > ones
    kept = [gain * (1 - distortion(c)) ** 2 for gain, c in zip(plain.gains, after.components, strict=True) if c]
    assert after.lost == pytest.approx(plain.energy - sum(kept), rel=1e-6)
    assert after.lost > before.lost
    assert learned.choice(1e-12).components == plain.choice(1e-12).components  # where bytes cost nothing


def test_no_other_choices_of_the_same_bytes_lose_less() -> None:
    deltas = [scale * spectrum(48, 80, seed) for seed, scale in enumerate((1.0, 0.3, 2.0))]
    curves = [curve(delta) for delta in deltas]
    _, chosen = share(curves, 4000)
    taken, lost = sum(one.nbytes for one in chosen), sum(one.lost for one in chosen)
    assert 3600 <= taken <= 4000
    rng = np.random.default_rng(0)
    for _ in range(100):
        prices = 2.0 ** rng.uniform(-24, 0, 3)
        other = [one.choice(price) for one, price in zip(curves, prices, strict=True)]
        if sum(one.nbytes for one in other) <= taken:
            assert sum(one.lost for one in other) >= lost * (1 - 1e-9)


def test_a_flat_spectrum_is_stored_as_entries_and_a_steep_one_as_factors() -> None:
    rng = np.random.default_rng(0)
    flat = curve(rng.standard_normal((64, 64)).astype(np.float32)).choice(1e-3)
    assert flat.entries is not None
    few = np.zeros((64, 64), np.float32)
    few[rng.integers(0, 64, 20), rng.integers(0, 64, 20)] = rng.standard_normal(20)
    listed = curve(few).choice(1e-3)
    assert listed.entries is not None
    assert listed.entries[1] is not None
    steep = curve(spectrum(64, 64, 1, 2.0)).choice(1e-4)
    assert set(steep.components) <= {0, *FACTOR_LEVELS}
    assert any(steep.components)


# ---- artifacts


@pytest.mark.parametrize("size", ["bytes: 6kB", "ratio: 12"])
def test_the_artifact_fits_and_applies_by_hash(tmp_path: Path, size: str) -> None:
    pair(tmp_path)
    size += ", length: 1"
    planned = make_plan(recipe(tmp_path, size), tmp_path / "out").describe()["delta"]
    made = run(recipe(tmp_path, size), tmp_path / "out", workers=1)
    written = sum(len(data) for data in files_of(tmp_path / "out").values())
    whole = sum(tensor.numel() * 2 for tensor in load_tensors(tmp_path / "base").values())
    wanted = 6000 if size.startswith("bytes") else math.floor(whole / 12)
    assert 0.97 * wanted <= written <= wanted
    assert made.lock["budget"]["bytes"] == written
    assert planned["values"] == "parts"
    assert 0.95 * wanted <= planned["estimated_bytes"] <= wanted
    assert sum(made.lock["budget"]["spent"].values()) == written
    apply(str(tmp_path / "out"), str(tmp_path / "base"), tmp_path / "applied", workers=1)
    result, tuned, base = (load_tensors(tmp_path / name) for name in ("applied", "tuned", "base"))
    lost = energy = 0.0
    for name, tensor in base.items():
        whole, found = (other[name].double() - tensor.double() for other in (tuned, result))
        square = float((whole**2).sum()) * (64 if whole.ndim < 2 else 1)
        length = float((found**2).sum())
        alike = float((whole * found).sum()) ** 2 / (length * float((whole**2).sum())) if length else 0.0
        lost, energy = lost + (1 - alike) * square, energy + square
        if whole.ndim == 2:
            assert length == pytest.approx(float((whole**2).sum()), rel=0.1)  # as long as the delta
    assert lost / energy == pytest.approx(made.lock["budget"]["lost"], abs=0.05)
    assert lost < 0.6 * energy


def test_parts_are_as_long_as_is_asked(tmp_path: Path) -> None:
    """0: least squares; 1: as the delta. Without a length components have theirs, which codes make shorter."""
    pair(tmp_path)
    lengths = []
    for size in ("bytes: 1500, length: 0", "bytes: 1500, length: 0.5", "bytes: 1500, length: 1", "bytes: 1500"):
        run(recipe(tmp_path, size), tmp_path / "out", workers=1, force=True)
        entry = DeltaFile.open(tmp_path / "out").entries["a.weight"]
        lengths.append(float(np.linalg.norm(Decoder(entry).codes(0, entry.size))))
    tuned, base = (load_tensors(tmp_path / name)["a.weight"].double() for name in ("tuned", "base"))
    step = 1 / 16  # of a scale, whose mantissa has four bits
    assert lengths[2] == pytest.approx(float((tuned - base).norm()), rel=step)
    assert lengths[1] == pytest.approx(math.sqrt(lengths[0] * lengths[2]), rel=step)
    assert lengths[0] < 0.95 * lengths[2]
    assert 1.04 * lengths[0] < lengths[3] < lengths[2]


@pytest.mark.parametrize("few", [(160,), (2, 160), (160, 4), (5, 160)])
def test_tensors_that_reach_every_token_go_first(tmp_path: Path, few: tuple[int, ...]) -> None:
    """A bias, and a table of token types, keep their deltas where a matrix of as large entries keeps nothing."""
    rng = np.random.default_rng(0)
    shapes = {"few": few, "weight": (160, 160)}
    base = {name: torch.tensor(rng.standard_normal(shape), dtype=torch.float32) for name, shape in shapes.items()}
    tuned = {
        name: one + torch.tensor(0.01 * rng.standard_normal(one.shape), dtype=torch.float32)
        for name, one in base.items()
    }
    make_checkpoint(tmp_path / "base", base)
    make_checkpoint(tmp_path / "tuned", tuned)
    run(recipe(tmp_path, "bytes: 1500"), tmp_path / "out", workers=1)
    entry = DeltaFile.open(tmp_path / "out").entries["few"]
    assert bool(entry.record.parts) == (few != (5, 160))
    if entry.record.parts:
        delta = (tuned["few"] - base["few"]).numpy().reshape(-1)
        lost = np.square(Decoder(entry).codes(0, entry.size) - delta).sum() / np.square(delta).sum()
        assert lost < 0.05


def test_a_component_is_as_long_as_before_its_codes() -> None:
    found = factor(spectrum(400, 300, 3, 0.2), Wanted(4), (1, 2))
    delta, m, n = found.b @ found.a, 400, 300
    for levels in (257, 258, 4):
        components = (levels,) * 4
        parts, stored = parts_of(delta, Choice(0, 0, components), found.a, None)
        made = sum_of(parts, stored, m, n).values(0, m * n).reshape(m, n)
        assert (made**2).sum() == pytest.approx(found.gains.sum(), rel=0.08)
        parts, stored = parts_of(delta, Choice(0, 0, components), found.a)
        short = sum_of(parts, stored, m, n).values(0, m * n).reshape(m, n)
        assert (short**2).sum() == pytest.approx(found.gains.sum() * (1 - distortion(levels)) ** 2, rel=0.08)


def table_of(folder: Path) -> str:
    """The card's table of tensors."""
    return (folder / "README.md").read_text().partition("## Bytes")[2].partition("##")[0]


def test_a_card_lists_tensors_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whichever order threads finish them."""
    pair(tmp_path)
    made = ByteShares.parts

    def parts(sharing: ByteShares, name: str, delta: Array) -> Any:
        if name == "a.weight":
            time.sleep(0.5)
        return made(sharing, name, delta)

    monkeypatch.setattr(ByteShares, "parts", parts)
    run(recipe(tmp_path, "bytes: 6kB"), tmp_path / "out", workers=2, memory=700_000_000)
    rows = table_of(tmp_path / "out").strip().splitlines()[2:]
    assert [row.split(" ")[1] for row in rows] == sorted(SHAPES)


def test_the_same_bytes_from_other_threads_tiles_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path)
    path = recipe(tmp_path, "bytes: 6kB")
    for name, workers in (("one", 1), ("two", 2)):
        run(path, tmp_path / name, workers=workers, memory=None if workers == 1 else 700_000_000)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert table_of(tmp_path / "one") == table_of(tmp_path / "two")
    again = run(path, tmp_path / "one", workers=1, locked=False)
    assert not again.made


def test_every_reader_finds_the_same_weights(tmp_path: Path) -> None:
    """A recipe's model, a switched module, a server's patches, and what merges of it."""
    from deltamerge.apps.chain.switch import Switch
    from deltamerge.apps.serve.fine_tunes import ServedModel

    tiny_llama(tmp_path / "base", seed=0)
    tiny_llama(tmp_path / "tuned", seed=1, base=tmp_path / "base", sigma=3e-2)
    run(recipe(tmp_path, "bytes: 9kB"), tmp_path / "out", workers=1)
    apply(str(tmp_path / "out"), str(tmp_path / "base"), tmp_path / "applied", workers=1)
    expected, base = load_tensors(tmp_path / "applied"), load_tensors(tmp_path / "base")
    assert any(entry.record.parts for entry in DeltaFile.open(tmp_path / "out").entries.values())

    def same(found: Mapping[str, torch.Tensor]) -> bool:
        return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)

    state = {name: tensor.clone() for name, tensor in base.items()}
    switch = Switch(state)
    switch.to(tmp_path / "out")
    assert same(state)
    switch.to(None)
    assert all(torch.equal(state[name], base[name]) for name in base)
    served = ServedModel(tmp_path / "base")
    for patch in served.patches(served.changes(tmp_path / "out")):
        where = slice(None) if patch.indices is None else patch.indices.long()
        state[patch.name].view(-1)[where] = patch.values
    assert same(state)
    path = tmp_path / "model.yaml"
    path.write_text("base_model: base\nmerge_method: task_arithmetic\nmodels: [out]\ndtype: bfloat16\n")
    run(path, tmp_path / "merged", workers=2)
    assert same(load_tensors(tmp_path / "merged"))


def test_a_delta_below_half_a_step_survives(tmp_path: Path) -> None:
    """A tenth of the entries moved by a step of bfloat16, in rows and columns of a pattern that has rank one."""
    rng = np.random.default_rng(0)
    base = torch.full((256, 256), 1.0, dtype=torch.bfloat16)
    u, v = rng.random((2, 256)) ** 2
    moved = torch.tensor((rng.random((256, 256)) < np.outer(u, v)) / 128.0, dtype=torch.bfloat16)
    for name, tensor in (("base", base), ("tuned", base + moved)):
        make_checkpoint(tmp_path / name, {"weight": tensor})
    run(recipe(tmp_path, "bytes: 1100"), tmp_path / "out", workers=1)
    apply(str(tmp_path / "out"), str(tmp_path / "base"), tmp_path / "applied", workers=1)
    found = (load_tensors(tmp_path / "applied")["weight"] - base).double().numpy()
    kept = float((found * np.outer(u, v)).sum() / 128 / (np.outer(u, v) ** 2).sum() * 128**2)
    assert 0.9 < kept < 1.1


def test_excluded_tensors_are_exact_and_more_bytes_lose_less(tmp_path: Path) -> None:
    pair(tmp_path)
    text = RECIPE.replace("{size}}}", "{size}, exclude: [head]}}")
    lost = []
    for number, nbytes in enumerate((7000, 12000, 30000)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text.format(size=f"bytes: {nbytes}"))
        made = run(path, tmp_path / f"out{number}", workers=1)
        lost.append(made.lock["budget"]["lost"])
        opened = DeltaFile.open(tmp_path / f"out{number}")
        assert opened.entries["head"].record.values is None
        assert (
            "head"
            not in (tmp_path / f"out{number}" / "README.md").read_text().partition("## Bytes")[2].partition("```")[0]
        )
    assert lost == sorted(lost, reverse=True)
    apply(str(tmp_path / "out0"), str(tmp_path / "base"), tmp_path / "applied", workers=1)
    assert torch.equal(load_tensors(tmp_path / "applied")["head"], load_tensors(tmp_path / "tuned")["head"])


def test_a_head_that_is_the_bases_takes_no_bytes(tmp_path: Path) -> None:
    pair(tmp_path)
    tensors = load_tensors(tmp_path / "tuned")
    tensors["head"] = load_tensors(tmp_path / "base")["head"]
    make_checkpoint(tmp_path / "tuned", tensors)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{size}}}", "{size}, exclude: [head]}}").format(size="bytes: 1800"))
    made = run(path, tmp_path / "out", workers=1)
    assert 1700 <= made.lock["budget"]["bytes"] <= 1800


ROWS = "calibration: {data: rows.jsonl, sequences: 180, length: 12}\n"


def taught(folder: Path) -> list[str]:
    """A fine-tune of a tiny model, and rows; returns some of them."""
    tiny_llama(folder / "base", seed=0, tokenizer=True)
    shutil.copytree(folder / "base", folder / "tuned")
    tensors = load_tensors(folder / "base")
    for seed, (name, tensor) in enumerate(tensors.items()):
        if name.endswith("proj.weight"):
            tensors[name] = (tensor.float() + torch.tensor(8 * spectrum(*tensor.shape, seed))).to(tensor.dtype)
    save_file(tensors, folder / "tuned" / "model.safetensors", {"format": "pt"})
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.integers(4, 96, 10)) for _ in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:190]))
    return texts[:16]


def divergence(folder: Path, name: str, texts: list[str]) -> float:
    """KL of an artifact's outputs from the fine-tune's, by transformers."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder / "tuned")(texts, return_tensors="pt")
    apply(str(folder / name), str(folder / "base"), folder / f"{name}-applied", workers=1)
    target, found = logits(folder / "tuned", ids), logits(folder / f"{name}-applied", ids)
    return float((target.exp() * (target - found)).sum(-1).mean())


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltamerge.calibrate.q.codes.learning_steps", lambda rows: 100)


def test_rows_teach_the_codes(tmp_path: Path, few_steps: None) -> None:
    """Of as many bytes the outputs are nearer to the fine-tune's, and come again."""
    some = taught(tmp_path)
    plain = run(recipe(tmp_path, "bytes: 5500"), tmp_path / "plain", workers=1)
    path = recipe(tmp_path, "bytes: 5501", ROWS)
    made = run(path, tmp_path / "taught", workers=1)
    run(path, tmp_path / "again", workers=2)
    assert files_of(tmp_path / "taught") == files_of(tmp_path / "again")
    assert "learned" not in plain.lock["budget"]
    said = made.lock["budget"]["learned"]["divergence"]
    assert said["after"] < 0.8 * said["before"]
    assert 5200 <= made.lock["budget"]["bytes"] <= 5501
    before, after = (divergence(tmp_path, name, some) for name in ("plain", "taught"))
    assert after < before
    assert "learned codes: loss on held-out rows" in (tmp_path / "taught" / "README.md").read_text()


def test_hidden_states_teach_the_codes_too(tmp_path: Path, few_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their change counts as much as the outputs' at the start, and other codes are learned than without them."""
    taught(tmp_path)
    made = {}
    for weight in (0.0, 1.0):
        monkeypatch.setattr("deltamerge.calibrate.q.codes.STATES", weight)
        result = run(recipe(tmp_path, "bytes: 5500", ROWS), tmp_path / "made", workers=1, force=True)
        said = result.lock["budget"]["learned"]["divergence"]
        assert said["after"] < said["before"]
        made[weight] = said["before"], (tmp_path / "made" / "delta.safetensors").read_bytes()
    assert made[1.0][0] == pytest.approx(2 * made[0.0][0], rel=1e-3)
    assert made[1.0][1] != made[0.0][1]


def test_a_language_models_head_shares_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole head takes more than the budget. Its codes are not learned."""
    from deltamerge.calibrate.q.codes import Codes, LearnedCodes

    taught(tmp_path)
    tensors = load_tensors(tmp_path / "tuned")
    head = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = (head.float() + torch.tensor(8 * spectrum(*head.shape, 9))).to(head.dtype)
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    names: list[str] = []

    def learn(measured: Any, start: Codes, plain: Codes) -> LearnedCodes:
        names.extend(start.factors)
        assert start.fixed("lm_head.weight").shape == plain.fixed("lm_head.weight").shape == head.shape
        return LearnedCodes(start.factors, 1.0, 1.0)

    monkeypatch.setattr("deltamerge.calibrate.q.codes.learn_codes", learn)
    run(recipe(tmp_path, "bytes: 5kB", ROWS), tmp_path / "out", workers=1)
    record = DeltaFile.open(tmp_path / "out").entries["lm_head.weight"].record
    assert record.values == "parts"
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "lm_head.weight" not in names


def test_a_lock_keeps_learned_codes(tmp_path: Path, few_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the artifact beside it: neither rows nor gradients are needed for the same bytes."""
    taught(tmp_path)
    path = recipe(tmp_path, "bytes: 5500", ROWS.replace("}", ", precision: bfloat16}"))
    made = run(path, tmp_path / "taught", workers=1)
    said = made.lock["budget"]["learned"]["divergence"]
    assert said["after"] < 0.8 * said["before"]
    (note,) = (one for one in made.plan.notes if "are learned" in one)
    assert "1080 steps of 8 rows: about 194 forward passes over the rows in bfloat16" in note
    (tmp_path / "rows.jsonl").unlink()
    monkeypatch.setattr("deltamerge.calibrate.q.codes.learn_codes", None)
    lock = Lock.read(shutil.copytree(tmp_path / "taught", tmp_path / "kept") / "recipe.lock")
    again = run(path, tmp_path / "again", workers=2, lock=lock)
    assert files_of(tmp_path / "taught") == files_of(tmp_path / "again")
    assert again.lock["budget"] == made.lock["budget"]
    (tmp_path / "kept" / "delta.safetensors").write_bytes(b"other")
    with pytest.raises(VerifyError, match="holds other learned codes than the lock was written with"):
        run(path, tmp_path / "third", workers=1, lock=lock)
    (tmp_path / "kept" / "delta.safetensors").unlink()
    with pytest.raises(VerifyError, match="missing, it holds the learned codes"):
        run(path, tmp_path / "third", workers=1, lock=lock)
    assert not (tmp_path / "third").exists()


def test_what_learning_makes_worse_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltamerge.calibrate.q import codes

    taught(tmp_path)
    made = []
    for rate in (0.0, 30.0):
        for name in ("CODE_RATE", "SCALE_RATE"):
            monkeypatch.setattr(codes, name, rate)
        monkeypatch.setattr(codes, "learning_steps", lambda rows: 2)
        found = run(recipe(tmp_path, "bytes: 5500", ROWS), tmp_path / "out", workers=1, force=True)
        said = found.lock["budget"]["learned"]["divergence"]
        assert said["after"] == said["before"]
        made.append(files_of(tmp_path / "out"))
    assert made[0] == made[1]


def test_numbers_teach_no_codes(tmp_path: Path, few_steps: None) -> None:
    """Of a head whose outputs are numbers the squared error falls, and the score with it."""
    tiny_bert_pair(tmp_path, dtype=torch.float32, sigma=0.0, tokenizer=True)
    tensors = load_tensors(tmp_path / "tuned")
    for seed, (name, tensor) in enumerate(tensors.items()):
        if "dense.weight" in name:
            tensors[name] = tensor + torch.tensor(8 * spectrum(*tensor.shape, seed), dtype=torch.float32)
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    texts = "".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) + "\n" for i in range(5, 90))
    (tmp_path / "rows.jsonl").write_text(texts)
    found = {}
    for problem in ("regression", "single_label_classification"):
        (tmp_path / "tuned" / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
        made = run(recipe(tmp_path, "bytes: 8600", ROWS.replace("180", "40")), tmp_path / problem, workers=1)
        found[problem] = made.lock["budget"]["learned"]["divergence"]
    assert found["regression"]["after"] == found["regression"]["before"]
    assert found["single_label_classification"]["after"] < found["single_label_classification"]["before"]


def test_a_level_has_the_gradient_of_the_number_that_it_is_nearest_to() -> None:
    """The product is that of the levels, and its gradients those of a float64 product of numbers that are levels."""
    from deltamerge.calibrate.q.codes import Latent

    rng, count = np.random.default_rng(0), np.array([3, 16, 257, 258])
    most = {257: 2, 258: 4}
    left, right = (
        np.stack([levels_of(rng.integers(0, most.get(c, c), side, np.uint8), c) for c in count]) for side in (5, 7)
    )
    scales = coded_scales(rng.uniform(0.001, 0.1, 4))
    start = Factored(count, left, right, scales)
    latent = Latent(start, torch.device("cpu"))
    units = np.array([unit(c) for c in count])[:, None]
    latent.left += torch.tensor(rng.uniform(-0.04, 0.04, left.shape))  # still nearest to the same levels
    latent.place(torch.float32)
    made, x, y = latent.product(), rng.standard_normal((3, 7)), rng.standard_normal((3, 5))
    u, v = left.astype(np.float64), right.astype(np.float64)
    np.testing.assert_allclose(made.detach(), (u * scales[:, None]).T @ v, rtol=1e-5, atol=1e-6)
    given = torch.tensor(x, dtype=torch.float32)
    np.testing.assert_allclose(latent.of(given).detach(), x @ made.detach().double().numpy().T, rtol=1e-5, atol=1e-5)
    latent.of(given).backward(torch.tensor(y, dtype=torch.float32))
    latent.pull()
    assert latent.left.grad is not None
    assert latent.right.grad is not None
    assert latent.logs.grad is not None
    scaled, weights = scales[:, None], y.T @ x
    np.testing.assert_allclose(latent.left.grad, scaled / units * (v @ weights.T), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(latent.right.grad, scaled / units * (u @ weights), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(latent.logs.grad, scales * np.einsum("ki,ij,kj->k", u, weights, v), rtol=1e-4, atol=1e-5)
    found = latent.rounded()
    assert all(np.array_equal(a, b) for a, b in ((found.left, left), (found.right, right), (found.scales, scales)))
    part, stored = found.store()
    again = sum_of([part], stored, 5, 7).factors
    assert again is not None
    assert all(np.array_equal(getattr(again, name), getattr(found, name)) for name in ("levels", "left", "right"))
    np.testing.assert_allclose(again.scales, found.scales, rtol=1e-3)


def logits(folder: Path, ids: Any) -> torch.Tensor:
    """Log-probabilities of a tiny model."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(**ids).logits[0]
    return found.double().log_softmax(-1)


def test_it_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before a crash is not measured again, and the bytes are the same."""
    from deltamerge.outputs import shares

    pair(tmp_path)
    path = recipe(tmp_path, "bytes: 6kB")
    run(path, tmp_path / "whole", workers=1)
    monkeypatch.setattr("deltamerge.formats.delta.tensor_writer.SECONDS", -1.0)
    own, seen = shares.ByteShares._look, list[str]()

    def look(self: Any, name: str, delta: Array, affordable: int) -> None:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(name)
        own(self, name, delta, affordable)

    monkeypatch.setattr(shares.ByteShares, "_look", look)
    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "out", workers=1)
    first, seen[:] = [*seen], []
    monkeypatch.setattr(shares.ByteShares, "_look", lambda *a: (seen.append(a[1]), own(*a))[1])
    run(path, tmp_path / "out", workers=1, resume=True)
    assert len(first) == 3
    assert not {*first} & {*seen}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# ---- memory


def held_now() -> int:
    """The bytes of anonymous memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_many_components_take_no_more_memory_than_is_planned() -> None:
    m, n = 19000, 384
    delta = np.random.default_rng(0).standard_normal((m, n), np.float32)
    rank = min(m, n)
    nbytes = next(size for size in range(0, 10**7, 10**4) if affordable([(m, n)], size) >= rank)
    planned = scratch([(m, n)], nbytes, 1) - TORCH
    parts_of(delta[:99, :99].copy(), Choice(0, 0, (257,) * 9), factor(delta[:99, :99].copy(), Wanted(9), (1, 2)).a)
    start, peak, done = held_now(), 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, held_now() - start)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        parts_of(delta, Choice(0, 0, (257,) * rank), factor(delta, Wanted(rank), (1, 2)).a)
    finally:
        done.set()
        looking.join()
    assert peak + delta.nbytes <= planned


def test_more_bytes_may_take_more_memory(tmp_path: Path) -> None:
    pair(tmp_path)
    few, many = (make_plan(recipe(tmp_path, size), tmp_path / "out") for size in ("bytes: 2kB", "ratio: 2"))
    assert few.peak_bytes < many.peak_bytes


# ---- what is refused


def test_too_few_bytes_are_refused(tmp_path: Path) -> None:
    pair(tmp_path)
    with pytest.raises(InputError, match=r"300 bytes are too few: .* take [67]\d\d$") as caught:
        run(recipe(tmp_path, "bytes: 300"), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    nbytes = int(str(caught.value).rpartition(" ")[2])
    run(recipe(tmp_path, f"bytes: {nbytes + 100}"), tmp_path / "out", workers=1)


def test_a_delta_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    pair(tmp_path)
    tensors = load_tensors(tmp_path / "tuned")
    tensors["b.weight"][3, 4] = math.nan
    make_checkpoint(tmp_path / "tuned", tensors)
    with pytest.raises(InputError, match=r"^tensor b\.weight: its delta is not finite"):
        run(recipe(tmp_path, "bytes: 6kB"), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("output: {kind: delta, semantics: add}", "output: {kind: delta}", "makes a delta artifact of values to add"),
        ("output: {kind: delta, semantics: add}", "output: {kind: model}", "makes a delta artifact of values to add"),
        ("semantics: add", "semantics: add, values: int8", "are chosen by prune: budget"),
        ("bytes: 6kB", "bytes: 6kB, ratio: 8", "bytes and ratio both say the size"),
        ("method: budget, bytes: 6kB", "method: budget", "needs bytes or a ratio"),
        ("bytes: 6kB", "ratio: 0.5", r"^[^\n]*: prune.ratio: must be greater than 1, got 0.5$"),
        ("bytes: 6kB", "bytes: 0", r"^[^\n]*: prune.bytes: must be at least one byte, got 0$"),
        ("method: budget, bytes: 6kB", "method: dare, budget: 0", r"^[^\n]*: prune.budget: must be at least one byte"),
        ("bytes: 6kB", "bytes: 6kB, length: 2", "must be at most 1"),
        ("bytes: 6kB", "bytes: 6kB, density: 0.1", "has no effect with method budget"),
        ("models: [tuned]", "models: [tuned, other]", "needs a single fine-tune"),
        (
            "method: budget, bytes: 6kB",
            "method: dare, density: 0.1, bytes: 6kB",
            "has no effect with method dare",
        ),
    ],
)
def test_recipes_that_mean_nothing_are_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = recipe(tmp_path, "bytes: 6kB")
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Exception, match=said):
        make_plan(path, tmp_path / "out")


# ---- the command


def test_extract_takes_a_budget_or_a_ratio(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, _, err = call(
        capsys, "extract", "tuned", "--base", "base", "--budget", "6kB", "--out", "out", "--workers", "1"
    )
    assert code == 0
    assert "factors" in err
    assert "of the delta's squares are lost" in err
    assert (tmp_path / "out" / "delta.json").is_file()
    code, out, _ = call(capsys, "extract", "tuned", "--base", "base", "--ratio", "8,16", "--json", "--workers", "1")
    points = json.loads(out)["curve"]
    assert code == 0
    assert [one["bytes"] for one in points] == sorted((one["bytes"] for one in points), reverse=True)
    assert points[0]["lost"] < points[1]["lost"]
    code, _, err = call(capsys, "extract", "tuned", "--base", "base", "--budget", "6kB,1MB", "--workers", "1")
    assert code == 0
    first, second = (float(line.partition("about ")[2].partition(" ")[0]) for line in err.splitlines()[-2:])
    assert first > second > 0
    assert not (tmp_path / "tuned-delta").exists()
    for arguments, said in (
        (["--budget", "300"], "are too few"),
        (["--budget", "6kB", "--ratio", "8"], "keep one of the two"),
        (["--ratio", "x"], "no number"),
        (["--budget", "6kB", "--density", "0.1"], "takes no --density"),
        (["--lora", "--ratio", "8"], "--ratio is of a delta"),
    ):
        code, _, err = call(capsys, "extract", "tuned", "--base", "base", "--out", "no", *arguments)
        assert code != 0
        assert said in err
        assert not (tmp_path / "no").exists()
