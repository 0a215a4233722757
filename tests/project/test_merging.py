"""benchmarks/merging/experts.py at toy scale: rows apart, λ in memory as in a recipe, cells kept, tasks kept back."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import ImageDraw
from running import make_plan, run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerance import gamma, largest_log_probability, of_divergence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

from deltamerge.apps.recommend import merge as recommend
from deltamerge.calibrate.merge import coefficients
from deltamerge.files.ownership import LOCK_NAME, read_lock

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.merging import experts as merging  # noqa: E402  # the repository is on the path first
from benchmarks.merging import nine_tasks, pages, picture_tasks, pictures, word_tasks, words  # noqa: E402
from benchmarks.tasks import Row  # noqa: E402

WORDS = [f"w{i}" for i in range(40)]


def published() -> dict[str, list[tuple[str, float]]]:
    draw = np.random.default_rng(0)
    return {
        file: [(" ".join(draw.choice(WORDS, 5)), float(draw.normal())) for _ in range(80)]
        for file in nine_tasks.SOURCES.values()
    }


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> merging.Setting:
    monkeypatch.setattr(nine_tasks, "VALIDATION", 40)
    monkeypatch.setattr(nine_tasks, "TEST", 20)
    monkeypatch.setitem(merging.CALIBRATION, "sequences", 4)
    monkeypatch.setattr(nine_tasks.tasks, "rated_sentences", published)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    splitter = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="[PAD]", unk_token="[UNK]")
    sizes: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    experts = {}
    for name in ("sentiment-movies", "intensity-tweets", "intensity-products", "domain"):
        task = nine_tasks.TASKS[name]
        kind = "regression" if task.labels == 1 else "single_label_classification"
        expert = BertForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=task.labels, problem_type=kind
        )
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        experts[name] = tmp_path / name
        expert.save_pretrained(experts[name])
        tokenizer.save_pretrained(experts[name])

    base = nine_tasks.headless(tmp_path / "base", tmp_path / "home" / "base")
    return merging.Setting(base, experts, tmp_path / "home", 10, 20)


def test_a_sentence_is_in_one_part_of_all_tasks() -> None:
    by_source = {s: [(f"{s} {i}", float(i % 5 - 2)) for i in range(1200)] for s in nine_tasks.SOURCES}
    by_source["tweets"] += [(text.upper(), rating) for text, rating in by_source["movies"]]
    made = nine_tasks.split(by_source)
    parts: dict[str, set[str]] = {}
    for by_part in made.values():
        for part, rows in by_part.items():
            parts.setdefault(part, set()).update(row.text.lower() for row in rows)
    for one, other in (("train", "test"), ("train", "validation"), ("test", "validation")):
        assert not parts[one] & parts[other]
    assert len(made["domain"]["test"]) == 4 * nine_tasks.TEST
    assert {row.label for row in made["sentiment-tweets"]["train"]} == {0, 1}
    assert set(nine_tasks.KEPT_BACK) < set(made)


def test_cells_of_toy_experts(setting: merging.Setting, tmp_path: Path) -> None:
    judge = merging.Judge(setting)
    for task, folder in setting.experts.items():
        own = judge.outputs(merging.encoder_of(folder), "test", [task])
        assert judge.shares(own, "test")[task] == pytest.approx(100)
    unpruned, named = merging.DELTAS[0], {merge.name: merge for merge in merging.MERGES}
    arithmetic = named["task_arithmetic"]
    cells = [merging.measure(setting, judge, named[name], unpruned) for name in ("task_arithmetic", "emr")]
    assert not set(cells[0]["outputs"]) & set(nine_tasks.KEPT_BACK)
    assert cells[0]["tried"][cells[0]["factor"]] == max(cells[0]["tried"].values())
    assert {f"{cell['key']}.json" for cell in cells} < {path.name for path in (setting.home / "cells").iterdir()}
    again = merging.measure(setting, judge, arithmetic, unpruned)
    assert again["outputs"] == cells[0]["outputs"]

    recipe = arithmetic.recipe(setting.base, setting.experts, tmp_path)
    recipe["parameters"]["lambda"] = cells[0]["factor"]
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(recipe))
    written = merging.encoder_of(run(tmp_path / "whole.yaml", tmp_path / "whole").folder)
    kept = load_file(setting.home / "merged" / f"{cells[0]['key']}.safetensors")
    for name, tensor in written.items():
        torch.testing.assert_close(kept[name].float(), tensor, rtol=gamma(2, torch.bfloat16), atol=1e-6)

    found: dict[str, Any] = {"own": dict.fromkeys(setting.experts, 50.0), "cells": []}
    for cell in cells:
        found["cells"].append(merging.summary(judge, merging.final(setting, judge, cell)))
    for cell in found["cells"]:
        assert set(cell["shares"]) == set(setting.experts)
        assert cell["worst"] == min(cell["shares"].values())
        assert cell["mean"] == pytest.approx(np.mean(list(cell["shares"].values())), abs=0.2)
    assert merging.in_order(found["cells"][::-1], [{**found["cells"][0], "mean": 0.0}]) == found["cells"]
    page = "a\n<!-- merging: methods -->\nold\n<!-- end -->\n<!-- merging: tasks -->\n<!-- end -->\n"
    text = pages.documented(found, page)
    assert "\nold\n" not in text
    assert "| task_arithmetic |" in text
    assert text == pages.documented(found, text)


def test_coefficients_are_fitted_with_each_experts_own_pooler(
    setting: merging.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coefficients, "SMALLEST", math.inf)  # divergences as they are, not as shares of the base's
    tensors = load_file(setting.experts["domain"] / "model.safetensors")
    tensors["bert.pooler.dense.weight"] *= -3
    other = Path(shutil.copytree(setting.experts["domain"], tmp_path / "other"))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    half = merging.Merge("half of each", "task_arithmetic", {"lambda": 0.5}, weighted=True, rows="model")
    rows = shutil.copytree(setting.calibration(), tmp_path / "rows")
    shutil.copy(rows / "domain.jsonl", rows / "other.jsonl")
    recipe = half.recipe(setting.base, {"domain": setting.experts["domain"], "other": other}, rows)
    (record,) = calibrated(recipe, tmp_path).values()
    largest = largest_log_probability(tensors["classifier.weight"], tensors["classifier.bias"])
    allowed = of_divergence(len(tensors["classifier.bias"]), largest)
    assert abs(record["plain"]["value"]) <= allowed  # both have the merge's encoder


def calibrated(recipe: dict[str, Any], work: Path) -> dict[str, Any]:
    run(merging.written(recipe, work), work / "out")
    found: dict[str, Any] = read_lock(work / "out" / LOCK_NAME)["calibration"]
    return found


def test_an_expert_learns(setting: merging.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def separable(task: str, part: str, folder: Path) -> list[nine_tasks.Row]:
        return [nine_tasks.Row(f"w{i % 2} w{i % 9 + 5}", i % 2) for i in range(32)]

    monkeypatch.setattr(nine_tasks.tasks, "rows", separable)
    nine_tasks.rows("sentiment-movies", "train", setting.home)
    made = nine_tasks.expert("sentiment-movies", setting.home, base=setting.base, rate=3e-2, steps=25)
    task = nine_tasks.TASKS["sentiment-movies"]
    assert nine_tasks.encoder.score(made, task, separable("", "test", made)) == 100


def test_rows_that_calibrate_choose_nothing(setting: merging.Setting) -> None:
    folder = setting.calibration()
    for task in setting.experts:
        texts = [json.loads(line)["text"] for line in (folder / f"{task}.jsonl").read_text().splitlines()]
        chosen = [row.text for row in setting.rows(task, "validation")]
        assert texts
        assert not set(texts) & set(chosen)


def test_every_recipe_is_planned(setting: merging.Setting, tmp_path: Path) -> None:
    for merge in merging.MERGES:
        task = "domain" if merge.task else None
        recipe = merge.recipe(setting.base, setting.experts, setting.calibration(), task)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        assert make_plan(path).outputs, merge.name


def test_cells_of_the_same_experts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the tasks kept back have been looked at; not of experts that score otherwise."""
    monkeypatch.setattr(merging, "FILE", tmp_path / "results.json")
    rows, own = {"choice": 1, "test": 2}, {"intensity-movies": 70.0}
    assert merging.earlier(own, rows) == []
    merging.write(merging.FILE, {"rows of a source": rows, "own": own, "cells": [{"merge": "ties"}]})
    assert merging.earlier({**own, "domain": 90.0}, rows) == [{"merge": "ties"}]
    assert merging.earlier({"intensity-movies": 70.1}, rows) == []
    assert merging.earlier(own, {**rows, "test": 3}) == []


def test_factors_climb_to_the_best() -> None:
    for best in (0.3, 1.0, 3.0):
        factor, tried = merging.climb(lambda x, best=best: -abs(np.log(x / best)), 1.0)
        assert abs(np.log(factor / best)) <= min(abs(np.log(x / best)) for x in tried)
        assert len(tried) <= merging.TRIES


@pytest.fixture
def vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pictures.Family:
    """Two experts of a tiny ViT."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = Dinov2Config(**sizes, image_size=picture_tasks.SIDE, patch_size=picture_tasks.PATCH)
    Dinov2Model(config).save_pretrained(tmp_path / "base")
    draw, shape, some = np.random.default_rng(0), (picture_tasks.SIDE, picture_tasks.SIDE, 3), {}
    for name in pictures.FAMILIES["report"][:2]:
        labels = picture_tasks.TASKS[name].labels
        some[name] = [
            picture_tasks.Picture(draw.integers(0, 256, shape, np.uint8), float(i % labels)) for i in range(12)
        ]
    monkeypatch.setattr(picture_tasks, "rows", lambda name, part, home=None: some[name])
    monkeypatch.setattr(picture_tasks, "STEPS", 2)
    monkeypatch.setattr(picture_tasks, "BATCH", 4)
    expert = picture_tasks.expert
    monkeypatch.setattr(picture_tasks, "base", lambda: tmp_path / "base")
    monkeypatch.setattr(picture_tasks, "expert", lambda name, base, seed: expert(name, base, tmp_path, seed=seed))
    words.rows_of.cache_clear()
    return pictures.Family(tuple(some), "test", 12)


def test_an_expert_of_a_vit_is_scored_as_its_own_model(vit: pictures.Family) -> None:
    for name, folder in vit.folders.items():
        model = Dinov2ForImageClassification.from_pretrained(folder).train(False)
        with torch.inference_mode():
            expected = model(pixel_values=picture_tasks.pixels(vit.rows[name])).logits
        found = vit.outputs(vit.body(folder), name, vit.rows[name])
        assert float((found - expected).norm() / expected.norm()) < 0.02  # bfloat16
        right = [float(row.label) == float(k) for row, k in zip(vit.rows[name], found.argmax(1), strict=True)]
        assert vit.own[name] == pytest.approx(100 * np.mean(right))


def test_merges_of_a_vit(vit: pictures.Family) -> None:
    named = {merge.name: replace(merge, rows=min(merge.rows, 3)) for merge in vit.merges}
    deltas = [torch.cat([delta.flatten() for delta in vit.deltas[name].values()]) for name in vit.names]

    def flat(merge: str) -> torch.Tensor:
        added = vit.merged(named[merge], vit.names)
        return torch.cat([added[key].flatten() for key in vit.weights])

    torch.testing.assert_close(flat("task_arithmetic"), deltas[0] + deltas[1], rtol=0, atol=1e-6)
    assert float(flat("regmean").norm()) > 0
    vit.own, shares = dict.fromkeys(vit.names, 50.0), []
    for task, name in enumerate(vit.names, 1):
        added = vit.merged(named["emr"], vit.names, task)
        assert all(bool((added[key] * delta >= 0).all()) for key, delta in vit.deltas[name].items())
        shares += vit.shares({key: tensor + added[key] for key, tensor in vit.weights.items()}, [name])
    made = words.cell(vit, named["emr"], vit.names, (0.7, 1.0))
    assert list(made["shares"].values()) == [round(share, 1) for share in shares]
    assert list(made["tried"]) == ["1"]


def test_the_merge_that_recommend_chooses_is_scored(vit: pictures.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend, "WAYS", (recommend.ISO_C,))
    monkeypatch.setattr(recommend, "SCOPES", ())
    vit.own = dict.fromkeys(vit.names, 50.0)
    advised = words.Merge("recommend, 4 + 2 rows", lambda models: 1.0, rows=4, decide=2)
    made = words.cell(vit, advised, vit.names, (0.7, 1.0))
    assert (made["chosen"], list(made["tried"]), len(made["expected"])) == ("iso_c, balanced", ["1"], 2)
    recipe = {"merge_method": "iso_c", "balance": "norm", "parameters": {"lambda": made["lambda"]}}
    added = vit.merged(words.Merge("iso_c", lambda models: 1.0, recipe), vit.names)
    shares = vit.shares({key: tensor + added[key] for key, tensor in vit.weights.items()}, vit.names)
    assert list(made["shares"].values()) == [round(share, 1) for share in shares]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_lora_of_words_is_its_model(
    setting: merging.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base with the LoRA is the model that is scored, without its head."""
    pytest.importorskip("peft")
    monkeypatch.setattr(word_tasks, "STEPS", 2)
    some = [Row(f"{WORDS[i]} {WORDS[-i]}", float(i % 4)) for i in range(20)]
    monkeypatch.setattr(word_tasks, "rows", lambda task, part, home: some)
    folder = word_tasks.lora("continent", tmp_path / "base", tmp_path)
    recipe = tmp_path / "recipe.yaml"
    model = f"{setting.base}+{folder / 'lora'}"
    recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": model}], "dtype": "float32"}))
    out = run(recipe, tmp_path / "out").folder
    made, wanted, base = (merging.encoder_of(one) for one in (out, folder, setting.base))
    assert {name for name, tensor in wanted.items() if not torch.equal(tensor, base[name])} == {
        name for name in wanted if name.endswith("weight") and "encoder" in name and "LayerNorm" not in name
    }
    for name, tensor in wanted.items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6)


def test_other_lambdas_are_those_of_a_recipe(vit: pictures.Family) -> None:
    """At a λ above 1 the mean of vectors and tables is added once."""
    (merge,) = (merge for merge in vit.merges if merge.name == "iso_c")
    given = replace(merge, recipe={"merge_method": "iso_c", "parameters": {"lambda": 2.25}})
    added, direct = (vit.merged(one, vit.names) for one in (merge, given))
    assert any(float((direct[key] - 2.25 * added[key]).norm()) > 1e-4 for key in added)
    for key, tensor in vit.at(2.25, merge, added, 2).items():
        torch.testing.assert_close(tensor, vit.weights[key] + direct[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", pictures.FAMILIES["choose"])
def test_pictures_are_drawn_alike_each_time(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_tasks, "WANTED", {"train": 9, "test": 9})
    first, again = (picture_tasks._drawn(task) for _ in range(2))
    assert first == again
    assert first["train"] != first["test"]


def test_discs_of_a_picture_are_apart() -> None:
    for number in range(6):
        image = picture_tasks._discs(random.Random(number), number)
        ground, found = image.getpixel((0, 0)), 0
        for place in np.ndindex(image.size):
            if image.getpixel(place) != ground:
                ImageDraw.floodfill(image, place, ground)
                found += 1
        assert found == number + 1


def test_tensors_of_an_onnx_file_are_read() -> None:
    """Fields by hand: key number << 3 | wire type, then a varint, or a length and bytes."""

    def message(number: int, content: bytes) -> bytes:
        size = len(content)
        return bytes([number << 3 | 2, *([size] if size < 128 else [size & 127 | 128, size >> 7])]) + content

    values = np.arange(300, dtype=np.float32).reshape(150, 2)
    shape = bytes([1 << 3, 150 & 127 | 128, 1, 1 << 3, 2])
    short = bytes([1 << 3, 5, 1 << 3, 4]) + message(8, b"short") + message(9, values[:10].tobytes())
    whole = shape + message(8, b"weight") + message(9, values.tobytes())
    graph = message(1, b"node") + message(5, whole) + message(5, short)
    found = picture_tasks.initializers(bytes([1 << 3, 8]) + message(7, graph))
    assert list(found) == ["weight", "short"]
    np.testing.assert_array_equal(found["weight"].numpy(), values)
    np.testing.assert_array_equal(found["short"].numpy(), values[:10].reshape(5, 4))


def test_the_table_of_the_docs_is_that_of_the_results() -> None:
    text = pages.PAGE.read_text(encoding="utf-8")
    found = json.loads(merging.FILE.read_text(encoding="utf-8"))
    assert pages.documented(found, text) == text, "run python -m benchmarks.merging.experts --docs"


@pytest.mark.parametrize(
    ("kind", "file"),
    [("words", words.FILE), ("pictures", pictures.FILE), ("decoder", merging.FILE.with_name("merging_skills.json"))],
)
def test_tables_of_other_experts_are_those_of_the_results(
    kind: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = pages.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(pages, "PAGE", tmp_path / "merging.md")
    pages.PAGE.write_text(text, encoding="utf-8")
    getattr(pages, f"write_{kind}")(json.loads(file.read_text(encoding="utf-8")))
    assert pages.PAGE.read_text(encoding="utf-8") == text, f"run the benchmark {kind} with --docs"
