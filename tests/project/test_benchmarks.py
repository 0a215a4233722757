"""The benchmark's checkpoints, its measuring and its comparison; a smoke test of the whole script is slow."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from calibration_rows import rows
from conftest import load_tensors, tiny_llama
from safetensors.torch import save_file

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))
synthetic = importlib.import_module("benchmarks.synthetic")
process = importlib.import_module("benchmarks.process")
merge_speed = importlib.import_module("benchmarks.speed.merge_speed")
quality = importlib.import_module("benchmarks.pruning.quality")
budgets = importlib.import_module("benchmarks.pruning.bytes")
field = importlib.import_module("benchmarks.pruning.field")
pages = importlib.import_module("benchmarks.pages")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made: list[Path] = synthetic.make_checkpoints(tmp_path_factory.mktemp("bench") / "tiny", synthetic.SIZES["tiny"])
    return made


@pytest.mark.parametrize(("name", "low", "high"), [("tiny", 1e5, 2e5), ("M", 4.8e8, 5.2e8), ("L", 1.05e9, 1.15e9)])
def test_sizes(name: str, low: float, high: float) -> None:
    assert low < synthetic.SIZES[name].parameters < high


@pytest.mark.parametrize("count", [12, 2_000, 20_000])
def test_number_of_tensors(count: int) -> None:
    assert abs(len(synthetic.many_tensors(count).shapes()) - count) <= 5


def test_bf16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:3] = [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)]  # halfway: to even
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(synthetic.bf16(values), expected)


def test_checkpoints_are_what_the_headers_say(models: list[Path]) -> None:
    size = synthetic.SIZES["tiny"]
    base, tune_a, tune_b = (load_tensors(model) for model in models)
    for tensors in (base, tune_a, tune_b):
        assert {name: tuple(t.shape) for name, t in tensors.items()} == size.shapes()
        assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    name = "model.embed_tokens.weight"
    assert base[name].float().std().item() == pytest.approx(0.02, rel=0.05)
    for tune in (tune_a, tune_b):
        assert (tune[name].float() - base[name].float()).std().item() == pytest.approx(7e-4, rel=0.05)
    assert not torch.equal(tune_a[name], tune_b[name])
    assert base["model.norm.weight"].float().mean().item() == pytest.approx(1, abs=0.02)


def test_index_names_every_tensor_in_its_shard(models: list[Path]) -> None:
    index = json.loads((models[0] / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    assert index["metadata"]["total_size"] == 2 * synthetic.SIZES["tiny"].parameters
    for name, file in index["weight_map"].items():
        length = int.from_bytes((models[0] / file).read_bytes()[:8], "little")
        assert name in json.loads((models[0] / file).read_bytes()[8 : 8 + length])


def test_values_do_not_depend_on_the_shards(models: list[Path], tmp_path: Path) -> None:
    whole = synthetic.make_checkpoints(tmp_path / "whole", replace(synthetic.SIZES["tiny"], shard=10**9))
    for cut, one in zip(models, whole, strict=True):
        assert len(list(one.glob("*.safetensors"))) == 1
        assert synthetic.agreement(cut, one)["differ"] == 0


@pytest.mark.parametrize("bits", [[0x0000, 0x8000], [0x3F80, 0x3F80], [0x3F80, 0x3F81], [0x8001, 0x0001]])
def test_ordered_counts_roundings(bits: list[int]) -> None:
    a, b = synthetic.ordered(np.array(bits, np.uint16))
    expected = {(0x8000): 0, (0x3F80): 0, (0x3F81): 1, (0x0001): 2}[bits[1]]
    assert abs(a - b) == expected


def test_agreement_counts_elements(models: list[Path], tmp_path: Path) -> None:
    size = synthetic.SIZES["tiny"]
    other = tmp_path / "other"
    other.mkdir()
    for file in models[0].glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        if b'"lm_head.weight"' in data:
            header = 8 + int.from_bytes(data[:8], "little")
            values = np.frombuffer(data, np.uint16, offset=header)
            values[0] += 1
            values[1] ^= 4  # its third lowest bit: 4 ulp
        (other / file.name).write_bytes(data)
    found = synthetic.agreement(models[0], other)
    assert found["elements"] == size.parameters
    assert found["differ"] == 2 / size.parameters
    assert found["differ_more_than_1_ulp"] == 1 / size.parameters
    assert found["tensors_in_one_only"] == []
    assert 0 < found["greatest_difference"] < 0.01


@pytest.mark.parametrize("method", merge_speed.METHODS)
def test_recipes(models: list[Path], method: str) -> None:
    found: dict[str, Any] = yaml.safe_load(merge_speed.recipe(method, models))
    named = [found["base_model"]] if "base_model" in found else []
    named += [model["model"] for model in found["models"]]
    assert [Path(name) for name in named] == merge_speed.inputs(method, models)
    densities = {model.get("parameters", {}).get("density") for model in found["models"]}
    assert densities == {merge_speed.METHODS[method]}


def test_memory_of_the_process_and_its_children_is_seen(tmp_path: Path) -> None:
    hold = "import time; held = b'x' * 50_000_000; time.sleep(0.3)"
    child = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hold!r}])"
    both = f"{child}; {hold}; child.wait()"
    run = process.measure([sys.executable, "-c", both], {}, tmp_path / "log")
    assert 100 < run.anonymous < 160
    assert run.resident > run.anonymous
    assert run.cpu > 0


def test_memory_of_the_caller_is_not_seen(tmp_path: Path) -> None:
    held = np.ones(20_000_000)
    run = process.measure([sys.executable, "-c", "import time; time.sleep(0.1)"], {}, tmp_path / "log")
    assert run.resident < 60 < held.nbytes / 1e6


def test_a_failed_process_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"exit status 3\nwhy\n"):
        process.measure([sys.executable, "-c", "print('why', flush=True); raise SystemExit(3)"], {}, tmp_path / "log")


def test_settings_of_the_shell_are_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    log = tmp_path / "log"
    show = [sys.executable, "-c", "import os; print(os.environ.get('OMP_NUM_THREADS'))"]
    process.measure(show, {}, log)
    assert log.read_text() == "None\n"
    process.measure(show, {"OMP_NUM_THREADS": "1"}, log)
    assert log.read_text() == "1\n"


def test_roofline_copies_the_first_and_reads_the_rest(models: list[Path], tmp_path: Path) -> None:
    assert process.roofline(models, tmp_path / "out") > 0
    assert synthetic.agreement(models[0], tmp_path / "out")["differ"] == 0


@pytest.mark.parametrize("page", quality.PAGES, ids=lambda page: page.name)
def test_quality_tables_of_the_docs_are_those_of_the_results(page: Path) -> None:
    found = json.loads((REPOSITORY / "benchmarks" / "results" / "quality.json").read_text())
    text = page.read_text()
    assert "<!-- quality: " in text
    assert quality.documented(found, text) == text, "run python -m benchmarks.pruning.quality --docs"


def test_tables_of_bytes_are_those_of_the_results() -> None:
    text = budgets.PAGE.read_text()
    assert "| ours | " in text
    assert budgets.documented(text) == text, "run python -m benchmarks.pruning.bytes --page"


def test_what_recommend_says_of_a_budget_was_measured() -> None:
    """The sentence is of `recommend.prune.advise`, of the budget and of a density in the same bytes."""
    cells = {(cell.model, cell.ratio, cell.method): cell.kl for cell in budgets.known(budgets.FILE)}
    pairs = [
        (kl, cells[model, ratio, "ours"])
        for (model, ratio, method), kl in cells.items()
        if method in ("DARE", "DAREx-q", "magnitude q_e") and (model, ratio, "ours") in cells
    ]
    assert pairs
    assert all(ours < other for other, ours in pairs)


@pytest.mark.parametrize(("ratio", "lost"), [(8, 0.1), (32, 0.8)])
def test_the_field_s_deltas_fit_and_come_nearer(ratio: int, lost: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (96, 80), "b.weight": (64, 128), "embed.weight": (60, 32)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = {"score.weight": torch.ones(2, 32)}
    for name, (m, n) in shapes.items():
        few = torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator)
        tuned[name] = base[name] + 1e-2 * few + 1e-3 * torch.randn(m, n, generator=generator)
    for name, weights in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")

    def distance(state: dict[str, torch.Tensor]) -> float:
        return float(sum((state[name] - tuned[name]).square().sum() for name in ("a.weight", "b.weight")))

    of = field.Deltas(
        tmp_path / "base", tmp_path / "tuned", lambda: {name: torch.eye(n) for name, (_, n) in shapes.items()}, distance
    )
    budget, whole = 2 * sum(one.numel() for one in tuned.values()) // ratio, distance(of.origin)
    for method, make in field.METHODS.items():
        nbytes, state = make(of, budget, tmp_path)
        assert nbytes <= (1.05 if method == "UltraDelta" else 1) * budget or method == "BitDelta"
        assert torch.equal(state["score.weight"], tuned["score.weight"])
        assert distance(state) <= whole or (method, ratio) == ("DARE", 32)
        if method in ("Delta-CoMe", "ImPart-Qt"):
            assert distance(state) < lost * whole


def test_results_of_several_runs_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def result(name: str, task: str, score: float, densities: list[float]) -> Path:
        made = {"score": score, "seconds": 1.0, "forward_passes": 3}
        keys = [
            f"{task} | {m} | {d} | {s}"
            for d in densities
            for m, seeds in (("DARE", 2), ("WANDA", 1))
            for s in range(seeds)
        ]
        both = {"q": 0.02, "of_search": 3, "anonymous_mb": 4, "cpu_s": 5.0}
        found = {"cells": dict.fromkeys(keys, made), "fine-tune": {task: 80.0}, "authors": {task: {"ours": both}}}
        (tmp_path / name).write_text(json.dumps(found))
        return tmp_path / name

    page = tmp_path / "page.md"
    page.write_text("a\n<!-- quality: shares -->\nold\n<!-- end -->\nb\n<!-- quality: authors -->\n<!-- end -->\n")
    monkeypatch.setattr(quality, "PAGES", (page,))
    quality.join(result("all.json", "x", 40.0, [0.1, 0.01]), [result("more.json", "y", 60.0, [0.01])])
    text = page.read_text()
    assert "\nold\n" not in text
    assert "| DARE | **50** / – | **50** / **75** | 3 |" in text
    assert "mean of 2 seeds" in text
    assert "| y, ours | 0.02 | 3 | 4 | 5.0 |" in text
    assert text == quality.documented(json.loads((tmp_path / "all.json").read_text()), text)


def script(folder: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    result = folder / "result.json"
    line = [
        sys.executable,
        "-m",
        "benchmarks.speed.merge_speed",
        "--dir",
        str(folder),
        "--json",
        str(result),
        *arguments,
    ]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(result.read_text())


@pytest.mark.slow
def test_every_method_runs(tmp_path: Path) -> None:
    table, result = script(
        tmp_path, "--size", "tiny", "--rounds", "1", "--tools", "deltamerge", "--methods", *merge_speed.GROUPS
    )
    assert table.count("\n| ") == len(merge_speed.METHODS)
    for runs in result["methods"].values():
        assert runs["deltamerge"][0]["anonymous"] > 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_number_of_tensors_runs(tmp_path: Path) -> None:
    table, result = script(tmp_path, "--tensors", "30", "60", "--rounds", "1")
    assert list(result["tensors"]) == ["12", "30", "57"]
    assert "past start-up" in table


@pytest.mark.slow
def test_results_agree_with_mergekit(tmp_path: Path) -> None:
    venv = Path(os.environ.get("DELTAMERGE_MERGEKIT", REPOSITORY / ".bench" / "venv"))
    if not (venv / "bin" / "mergekit-yaml").exists():
        pytest.skip(f"no mergekit in {venv} (set DELTAMERGE_MERGEKIT)")
    methods = ["passthrough", "linear", "task_arithmetic", "ties"]
    _, result = script(
        tmp_path, "--size", "tiny", "--rounds", "1", "--mergekit", str(venv),
        "--tools", "deltamerge", "mergekit", "--methods", *methods,
    )  # fmt: skip
    found = {method: result["methods"][method]["agreement"] for method in methods}
    assert found["passthrough"]["differ"] == 0
    for match in found.values():
        assert match["tensors_in_one_only"] == []
        assert match["differ_more_than_1_ulp"] < 0.01


def test_the_gpu_benchmark_runs_dry_without_packages_of_the_tests(tmp_path: Path) -> None:
    """On a machine of somebody else there is torch, and what deltamerge needs."""
    out = tmp_path / "out.json"
    lines = [
        "import sys",
        "sys.modules |= dict.fromkeys(['pytest', 'hypothesis'])",
        f"sys.path[:0] = [{str(REPOSITORY)!r}]",
        "from benchmarks.speed import gpu",
        "gpu.RECIPES = {'ties': gpu.RECIPES['ties']}",
        "gpu.CALIBRATIONS = {'layer_mse': gpu.CALIBRATIONS['layer_mse']}",
        f"gpu.main(['--device', 'cpu', '--tiny', '--out', {str(out)!r}, '--folder', {str(tmp_path)!r}])",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found) == {"versions", "ceilings", "merges", "profile", "calibration", "tests", "seconds"}
    assert not {name: value for name, value in found.items() if "error" in value}
    assert found["merges"]["ties"]["same bytes"]
    assert found["calibration"]["layer_mse"]["cpu"]["forward_passes"]


@pytest.mark.slow
def test_passes_are_measured_beside_the_plan(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32)
    tiny_llama(tmp_path / "tuned", seed=1, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    rows(tmp_path / "calib.jsonl")
    (tmp_path / "r.yaml").write_text(
        "base_model: ./base\nmodels: [{model: ./tuned, prune: {method: dare, density: 0.05, q: output_change}}]\n"
        "calibration: {data: calib.jsonl, sequences: 8, length: 12, seeds: 1}\n"
    )
    found = importlib.import_module("benchmarks.speed.passes").measured(tmp_path / "r.yaml", "bfloat16")
    assert (found["precision"], found["sequences"]) == ("bfloat16", 8)
    assert 0.05 <= found["q"] <= 1
    for name in ("search", "comparison"):
        assert min(found[name]["cpu"], found[name]["planned"]) > 0
    assert found["comparison"]["planned"] > found["search"]["planned"]
    assert found["peak_mb"] > 100


RUNNABLE = sorted(
    str(path.relative_to(REPOSITORY).with_suffix("")).replace("/", ".").removesuffix(".__main__")
    for path in (REPOSITORY / "benchmarks").rglob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
TEXTS = sorted(
    path
    for where in ("*.md", "Makefile", "docs/**/*.md", "benchmarks/**/*.md", "**/*.py", "scripts/*", "recipes/*")
    for path in REPOSITORY.glob(where)
    if path.is_file() and not path.relative_to(REPOSITORY).parts[0].startswith(".")
)
PARTS = ("benchmarks.pruning.authors", "benchmarks.smollm2_rows")  # processes of quality and of smollm2


def test_what_the_pages_name_of_the_benchmarks_is_there() -> None:
    count = 0
    for page in TEXTS:
        text = page.read_text()
        for name in re.findall(r"-m (benchmarks(?:\.\w+)*)", text):
            assert name in RUNNABLE, f"{page}: {name}"
            count += 1
        for path in re.findall(r"(?<![\w./])benchmarks/[\w/]+(?:\.(?:py|json|md|png))?", text):
            assert (REPOSITORY / path).exists() or path.rstrip("/") == "benchmarks/results/gpu", f"{page}: {path}"
            count += 1
    assert count > 100


def test_every_benchmark_answers_a_question_and_is_cited() -> None:
    """By a page of docs/, or a target of make."""
    table = (REPOSITORY / "benchmarks" / "README.md").read_text().split("\n## ")[0]
    cited = "".join(page.read_text() for page in [*REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "Makefile"])
    for name in RUNNABLE:
        short = name.removeprefix("benchmarks.")
        if short != "demo":
            assert re.search(rf"\b{short.rpartition('.')[2] if name in PARTS else re.escape(short)}\b", table), name
        if name not in PARTS:
            assert name in cited or f"{name.replace('.', '/')}.py" in cited, f"{name}: no page cites it"


def test_every_benchmark_starts(tmp_path: Path) -> None:
    """Imported at least: some need servers, data or hours."""
    names = [name for name in RUNNABLE if name != "benchmarks.smollm2_rows"]  # in reasoning-gym's environment
    lines = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    names = [f"{name}.__main__" if name == "benchmarks.paper" else name for name in names]
    done = subprocess.run(
        [sys.executable, "-c", lines, *names], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_tables_of_measurements_are_those_of_the_results() -> None:
    texts = pages.marked()
    assert len(texts) >= 3
    for page, text in texts.items():
        assert pages.documented(text) == text, f"{page.name}: run python -m benchmarks.pages"


def test_words_have_equal_classes_and_no_part_shares_a_word() -> None:
    from benchmarks.merging import word_tasks

    words = {f"w{i}": float(i % 3 if i < 900 else 0) for i in range(1500)}
    parts = word_tasks.split({"name": words})["name"]
    texts = {part: {row.text for row in rows} for part, rows in parts.items()}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 900
    labels = [row.label for rows in parts.values() for row in rows]
    assert [labels.count(k) for k in (0, 1, 2)] == [300, 300, 300]


def test_merges_that_were_tried_give_back_what_their_papers_say() -> None:
    from benchmarks.merging import tried

    delta = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(tried.svc(3 * delta, [delta] * 3), delta)
    loud = torch.tensor([1.0, 2.0, 4.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(tried.aim(delta, loud, kept=0.2), delta * torch.tensor([0.8, 0.6, 0.2, 1.0]))
    base = torch.eye(6, 4, dtype=torch.float64)
    torch.testing.assert_close(tried.ortho([delta], base, rest=1.0), delta)  # no row conflicts: the rest is all of it
    one = delta - delta.mean(0)
    gram = one.T @ one + 0.01 * torch.eye(4, dtype=torch.float64)
    whole = gram + (one.T @ one).mean(0)
    torch.testing.assert_close(tried.ace([delta], base), one @ gram @ torch.linalg.inv(whole))
