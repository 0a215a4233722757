"""What `plan` prints: the answer in ten lines, tensors by kind, no line wider than the terminal."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from calls import call
from conftest import tiny_llama

RECIPE = """\
base_model: ./base
merge_method: ties
models:
  - {model: ./math, parameters: {weight: 1.0, density: 0.25}}
  - {model: ./code, parameters: {weight: [0.25, 0.75], density: 0.25}}
output: {shard_size: 20kB}
"""
ANSWER = {
    80: """\
merge      ties of ./math, ./code on ./base
           ./math: weight=1 density=0.25
           ./code: weight=0.25 density=0.25 … weight=0.75 density=0.25 (2 kinds:
           --tensors)
output     21 tensors, 43.3 kB in 3 files; files of ./base
disk       43.3 kB needed, 5.0 GB free
memory     108.9 MB at the peak; --memory SIZE is a cap
work       read → select → merge → write; reads 260.0 kB; cpu, 2 workers, fused
time       about 1 s with the inputs in memory
""",
    120: """\
merge      ties of ./math, ./code on ./base
           ./math: weight=1 density=0.25
           ./code: weight=0.25 density=0.25 … weight=0.75 density=0.25 (2 kinds: --tensors)
output     21 tensors, 43.3 kB in 3 files; files of ./base
disk       43.3 kB needed, 5.0 GB free
memory     108.9 MB at the peak; --memory SIZE is a cap
work       read → select → merge → write; reads 260.0 kB; cpu, 2 workers, fused
time       about 1 s with the inputs in memory
""",
}
KINDS = """\
tensors                                 n  dtype  shape  bytes   method
lm_head.weight                          1  BF16   96×32  6.1 kB  ties
model.embed_tokens.weight               1  BF16   96×32  6.1 kB  ties
model.layers.*.input_layernorm.weight   2  BF16   32     128 B   ties
model.layers.*.mlp.down_proj.weight     2  BF16   32×48  6.1 kB  ties
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tiny_llama(tmp_path / "base", seed=0)
    for seed, name in enumerate(("math", "code"), 1):
        tiny_llama(tmp_path / name, seed=seed, base=base)
    (tmp_path / "r.yaml").write_text(RECIPE)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 5 * 10**9, 5 * 10**9))
    monkeypatch.setenv("DELTAMERGE_KERNELS", "")
    return tmp_path / "r.yaml"


@pytest.mark.parametrize("width", ANSWER)
def test_the_answer_comes_first_and_fits(recipe, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = call(capsys, "plan", recipe, "--workers", "2")
    answer, _, kinds = out.partition("\n\n")
    assert (code, err) == (0, "")
    assert f"{answer}\n" == ANSWER[width]
    assert [line.split() for line in kinds.splitlines()][:5] == [line.split() for line in KINDS.splitlines()]
    assert max(map(len, out.splitlines())) <= width
    assert len(kinds.splitlines()) == 13


def test_a_disk_that_is_too_small_is_a_warning(recipe, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    for free, warned in ((43_300, False), (40_000, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(10**10, 10**10 - free, free))
        _, out, _ = call(capsys, "plan", recipe)
        assert ("warning    the disk is too small for the output by 3." in out) is warned


def test_long_names_are_cut_and_listed_whole_on_demand(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = call(capsys, "plan", recipe)
    assert max(map(len, out.splitlines())) <= 60
    assert "model.layers.*.post_attention_layernorm.weight" not in out
    _, out, _ = call(capsys, "plan", recipe, "--tensors")
    rows = [line for line in out.splitlines() if line.startswith("model.layers.1.")]
    assert len(rows) == 9
    assert all("./math weight=1 density=0.25; ./code weight=0.75 density=0.25" in row for row in rows)
    assert all("model-00" in row for row in rows)


def test_reads_are_those_of_a_run(recipe, capsys):
    """Selecting takes one pass before the last: the rest are for tensors on which the sample misleads."""
    import json

    sizes = [sum(f.stat().st_size for f in (recipe.parent / n).glob("*.safetensors")) for n in ("base", "math", "code")]
    _, out, _ = call(capsys, "plan", recipe, "--json")
    assert 1.9 * sum(sizes) < json.loads(out)["read_bytes"] < 2.1 * sum(sizes)
