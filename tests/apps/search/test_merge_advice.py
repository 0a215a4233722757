"""`recommend` of several models: evidence against float64, answers against transformers, a recipe that runs."""

from __future__ import annotations

import csv
import html
import io
import json
import shutil
from collections import Counter
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from adapters import write_adapter
from calibration_rows import rows
from calls import call
from conftest import load_tensors, tiny_bert_pair, tiny_llama
from running import run
from safetensors.torch import load_file, save_file

import deltamerge
from deltamerge.apps.recommend import advised
from deltamerge.apps.recommend import merge as merge_advice
from deltamerge.apps.recommend.advised import AdvisedMerge, in_five_lines, rows_in
from deltamerge.apps.recommend.forecast import SkillForecast, of_answers, of_weights
from deltamerge.apps.recommend.meeting import DIRECTIONS, Conflict
from deltamerge.apps.recommend.merge import (
    ARITHMETIC,
    ISO_C,
    SCOPES,
    STUDY,
    SVC,
    TSV_M,
    WAYS,
    WUDI,
    MergeCandidate,
    Way,
    best_first,
    names_of,
    recommend_merge,
    rescue,
    standing,
    unchanged,
    with_rows,
    without_rows,
)
from deltamerge.apps.recommend.prune import seen_from, with_comment
from deltamerge.apps.search.judge import StudyJudge, Walk
from deltamerge.calibrate.merge import coefficients
from deltamerge.cli.output import say_table
from deltamerge.errors import InputError, OutputError, RecipeError, UsageError
from deltamerge.methods.low_rank import leading
from deltamerge.run.lock import Lock
from deltamerge.run.options import Options

OPTIONS = Options(device="cpu", workers=1)
NAMES = ("tuned", "other", "third")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes with heads of their own; of the third a layer is the base's."""
    folder = tmp_path_factory.mktemp("advice")
    tiny_bert_pair(folder, dtype=torch.float32, sigma=0.05, tokenizer=True)
    tensors, base = load_file(folder / "tuned" / "model.safetensors"), load_file(folder / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name in NAMES[1:]:
        shutil.copytree(folder / "tuned", folder / name)
        made = {}
        for key, tensor in tensors.items():
            start = base.get(key.removeprefix("bert."), torch.zeros_like(tensor))
            still = name == "third" and "layer.1.output.dense" in key
            made[key] = start + (0.0 if still else 0.05) * torch.randn(tensor.shape, generator=generator)
        save_file(made, folder / name / "model.safetensors", metadata={"format": "pt"})
    rows(folder / "calib.jsonl", 24)
    rows(folder / "more.jsonl", 30)
    return folder


def deltas(folder: Path) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The base, and each fine-tune's deltas by the base's names, in float64."""
    base = {name: t.double().numpy() for name, t in load_tensors(folder / "base").items()}
    found = []
    for name in NAMES:
        tuned = load_tensors(folder / name)
        found.append({key: tuned[f"bert.{key}"].double().numpy() - w for key, w in base.items()})
    return base, found


def test_evidence_is_that_of_float64(folder: Path) -> None:
    models = [str(folder / name) for name in NAMES]
    found = recommend_merge(models, str(folder / "base"), options=OPTIONS).evidence
    again = recommend_merge(models, str(folder / "base"), options=Options(device="cpu", workers=2)).evidence
    assert found == again
    base, ds = deltas(folder)
    flat = [np.concatenate([d.ravel() for d in one.values()]) for one in ds]
    whole = np.concatenate([w.ravel() for w in base.values()])
    np.testing.assert_allclose(found.relative_norm, [np.linalg.norm(d) / np.linalg.norm(whole) for d in flat], 1e-5)
    matrices = [key for key, w in base.items() if w.ndim == 2 and "embeddings" not in key]
    for i, j in combinations(range(3), 2):
        both = (flat[i] != 0) & (flat[j] != 0)
        opposed = np.mean(np.sign(flat[i][both]) != np.sign(flat[j][both]))
        assert found.opposed[i][j] == found.opposed[j][i] == pytest.approx(opposed, abs=1e-4)
        cosine = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
        assert found.cosine[i][j] == pytest.approx(cosine, abs=1e-6)
        shared = []
        for key in matrices:
            k = max(1, min(DIRECTIONS, min(base[key].shape) // 4))
            (u, _, v), (x, _, y) = (np.linalg.svd(one[key], full_matrices=False) for one in (ds[i], ds[j]))
            if ds[i][key].any() and ds[j][key].any():
                shared += [np.sum((a.T @ b) ** 2) / k for a, b in ((u[:, :k], x[:, :k]), (v[:k].T, y[:k].T))]
        assert found.overlap[i][j] == pytest.approx(np.mean(shared), abs=1e-4)
    for i, own in enumerate(ds):
        moved = np.zeros(3)
        for key in matrices:
            k = max(1, min(DIRECTIONS, min(base[key].shape) // 4))
            v = np.linalg.svd(own[key])[2][:k].T if own[key].any() else np.zeros((base[key].shape[1], 1))
            moved += [np.sum((one[key] @ v) ** 2) for one in ds]
        np.testing.assert_allclose(found.disturbance[i], moved / moved[i], rtol=1e-3)
    cosines = {pair: found.cosine[pair[0]][pair[1]] for pair in combinations(range(3), 2)}
    assert tuple(found.most_alike) == max(cosines, key=cosines.__getitem__)
    assert tuple(found.most_opposed) == min(cosines, key=cosines.__getitem__)
    assert found.overlap_mean == pytest.approx(found.chance, abs=0.1)  # the deltas are random
    assert found.opposed_mean == pytest.approx(0.5, abs=0.02)


def answers(head: Path, body: Path, texts: list[str]) -> np.ndarray:
    """Classes by transformers alone: a model's body under another's head."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(head, dtype=torch.float32).eval()
    state = {f"bert.{n.removeprefix('bert.')}": t for n, t in load_tensors(body).items() if "classifier" not in n}
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    tokenizer = transformers.AutoTokenizer.from_pretrained(head)
    with torch.no_grad():
        logits = [model(**tokenizer(x, truncation=True, max_length=12, return_tensors="pt")).logits for x in texts]
    return torch.cat(logits).argmax(1).numpy()


@pytest.mark.slow
def test_same_answers_are_those_of_transformers(folder: Path, tmp_path: Path, capsys) -> None:
    for name in ("base", *NAMES, "calib.jsonl", "more.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    recipe: dict[str, Any] = {
        "base_model": "./base",
        "merge_method": "task_arithmetic",
        "models": [{"model": f"./{name}", "name": name, "parameters": {"weight": 1.0}} for name in NAMES[:2]],
        "parameters": {"lambda": {"sweep": [0.3]}},
        "calibration": {"data": "calib.jsonl", "sequences": 8, "length": 12},
        "study": {"objective": "same_answers", "test": "more.jsonl"},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    code, out, _ = call(capsys, "sweep", tmp_path / "sweep.yaml", "--json", "--workers", "1")
    assert code == 0
    texts = [json.loads(line)["text"] for line in (folder / "more.jsonl").read_text().splitlines()]
    for row, factor in zip(json.loads(out)["rows"], (0.3,), strict=True):
        recipe["parameters"] = {"lambda": factor}
        (tmp_path / "one.yaml").write_text(yaml.safe_dump({k: v for k, v in recipe.items() if k != "study"}))
        merged = run(tmp_path / "one.yaml", tmp_path / f"merged-{factor}").folder
        for name in NAMES[:2]:
            same = answers(folder / name, merged, texts) == answers(folder / name, folder / name, texts)
            assert row["scores"][name]["same_answers"] == pytest.approx(same.mean())


FEW: tuple[tuple[Way, ...], tuple[str, ...]] = ((ARITHMETIC, ISO_C), ())


def test_a_merge_that_rows_make_is_judged_on_others(folder: Path, monkeypatch) -> None:
    """Its loss is that of the held-out rows alone, on which its λ are tried too."""
    regmean = next(way for way in WAYS if way.method == "regmean")
    monkeypatch.setattr(merge_advice, "WAYS", (regmean,))
    models, data = [str(folder / name) for name in NAMES], {"data": str(folder / "calib.jsonl"), "length": 12}
    found = [
        recommend_merge(
            models, str(folder / "base"), calibration=[{**data, "sequences": count}], options=OPTIONS, fit=False
        )
        for count in (8, 16)
    ]
    for advice, held in zip(found, (16, 8), strict=True):
        (one,) = advice.candidates
        assert advice.held_out == dict.fromkeys(NAMES, held)
        assert all((held * share) % 1 == pytest.approx(0.0, abs=1e-6) for share in one.agreement.values())
        assert one.lost_mean == pytest.approx({point.factor: point.lost for point in one.tried}[one.factor])


@pytest.mark.parametrize("ways", [FEW, pytest.param((WAYS, SCOPES), marks=pytest.mark.slow)])
def test_a_merge_is_recommended_and_runs(
    folder: Path, tmp_path: Path, capsys, monkeypatch, ways: tuple[tuple[Way, ...], tuple[str, ...]]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(merge_advice, "WAYS", ways[0])
    monkeypatch.setattr(merge_advice, "SCOPES", ways[1])
    asked = [
        "recommend",
        *NAMES,
        "--base",
        "base",
        "--calibration",
        "calib.jsonl",
        "--sequences",
        "8",
        "--length",
        "12",
    ]
    out = tmp_path / "merge.yaml"
    code, said, err = call(capsys, *asked, "--json", "--out", out, "--workers", "1")
    assert code == 0, err
    found = json.loads(said)
    by_name = {one["name"]: one for one in found["candidates"]}
    assert all(one["error"] is None for one in by_name.values())
    best = by_name[found["method"]]
    plain = [one for one in by_name.values() if one["coefficients"] is None]
    fits = [one for one in by_name.values() if one["coefficients"]]
    assert [one["name"] for one in plain] == [way.name for way in ways[0]]
    assert [one["coefficients"] for one in fits] == list(ways[1])
    searched = {way.name for way in ways[0] if way.is_searched}
    assert searched >= {one["name"] for one in plain if len(one["tried"]) > 1}
    worth = {one["name"]: (sum(x["share"] for x in one["forecast"]), -one["lost_mean"]) for one in plain}
    leaders = sorted(worth, key=worth.__getitem__)[-merge_advice.FINALISTS :]
    assert best["coefficients"] or best["name"] in leaders
    for one in by_name.values():
        assert set(one["lost"]) == set(one["agreement"]) == set(NAMES)
        assert one["lost_worst"] == max(one["lost"].values())
        tried = {point["factor"]: point["lost"] for point in one["tried"]}
        assert tried[one["factor"]] <= min(tried.values()) / 0.8
    assert found["search"] == dict.fromkeys(NAMES, 8)
    recipe = yaml.safe_load(out.read_text())
    assert out.read_text() == found["recipe"]
    assert recipe["merge_method"] == best["method"]
    assert recipe["parameters"]["lambda"] == best["factor"]
    assert run(out, tmp_path / "merged").folder.is_dir()
    monkeypatch.setattr(merge_advice, "WAYS", (ISO_C,))
    code, text, _ = call(capsys, *asked, "--no-fit", "--workers", "1")
    assert code == 0
    assert "→ " in text
    assert "coefficients" not in text


def test_the_recipe_without_rows_runs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "merge.yaml"
    found = recommend_merge([str(folder / n) for n in NAMES], str(folder / "base"), out=out, options=OPTIONS)
    assert (found.method, found.factor) == ("svc, balanced", 0.693)
    assert yaml.safe_load(found.recipe)["balance"] == "norm"
    assert not found.candidates
    assert [one.by for one in found.forecast] == ["weights"] * 3
    assert repr(found) == f"<MergeAdvice {len(NAMES)} models on {folder / 'base'}: svc, balanced>"
    assert html.escape(found.why[0][:20]) in found._repr_html_()
    assert "without rows svc" in " ".join(found.recipe.replace("\n# ", " ").split())
    assert "--calibration" not in found.recipe
    assert run(out, tmp_path / "merged").folder.is_dir()


def candidate(name: str, lost: dict[str, float]) -> MergeCandidate:
    return MergeCandidate(
        name=name, method=name, parameters={}, factor=0.5, coefficients=None, lost=lost, agreement={}, forecast=[],
        lost_mean=float(np.mean(list(lost.values()))), lost_worst=max(lost.values()), error=None,
        tried=[],
    )  # fmt: skip


def meeting(disturbance: float = 0.2) -> Conflict:
    return Conflict(
        relative_norm=[0.1, 0.1], cosine=[[1, 0], [0, 1]], opposed=[[0, 0.5], [0.5, 0]], overlap=[[1, None], [None, 1]],
        chance=None, cosine_mean=0.0, opposed_mean=0.5, overlap_mean=None, most_alike=[0, 1], most_opposed=[0, 1],
        disturbance=[[1.0, disturbance], [0.3, 1.0]],
    )  # fmt: skip


def test_the_decision() -> None:
    met = meeting()
    assert without_rows(met, 2, talks=False)[:2] == (TSV_M, 1.0)
    assert without_rows(met, 4, talks=False)[:2] == (SVC, 0.6)
    assert without_rows(met, 4, talks=True)[:2] == (WUDI, 1.0)
    assert without_rows(met, 16, talks=True)[:2] == (WUDI, 0.5)  # the λ of its rule
    way, factor, _ = without_rows(met.model_copy(update={"cosine_mean": 0.6}), 4, talks=True)
    assert (way, factor) == (ARITHMETIC, 0.25)
    judged = {
        ARITHMETIC: candidate("task_arithmetic", {"a": 0.2, "b": 0.7}),
        ISO_C: candidate("iso_c", {"a": 0.3, "b": 0.4}),
    }
    way, factor, why = with_rows(judged, list(judged))
    assert (way, factor) == (ISO_C, 0.5)
    assert "task_arithmetic 45.0%" in why[0]


def test_parts_of_the_rows_share_a_walk(folder: Path, monkeypatch) -> None:
    """A merge is made once for the rows that are searched on and those that are held out."""
    monkeypatch.chdir(folder)
    rows_of_each = ({"data": "calib.jsonl", "sequences": 8, "length": 12},) * len(NAMES)
    adviser = merge_advice._Adviser(merge_advice._Setting(NAMES, "base", rows_of_each, False), OPTIONS)
    start = adviser.recipe(ARITHMETIC, 0.5)
    made: Counter[str] = Counter()
    make = Walk._make
    monkeypatch.setattr(Walk, "_make", lambda walk, k, names: made.update(names) or make(walk, k, names))
    with closing(StudyJudge(adviser.candidates, start, STUDY, adviser._goals(start))) as judge:
        assert judge.rows("search") == dict.fromkeys(NAMES, 8)
        candidate = judge.start
        apart = {part: judge.scores([candidate], part)[0] for part in ("search", "held")}
        twice, _ = made.copy(), made.clear()
        (found,) = judge.scores_by_part([candidate], ["search", "held"])
    assert found == apart
    assert {name: 2 * count for name, count in made.items()} == twice


def test_rows_that_are_too_few_are_refused_before_anything_is_measured(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(merge_advice, "measure", lambda *_, **__: pytest.fail("measured"))
    few = {"data": "calib.jsonl", "sequences": 50, "length": 12}
    with pytest.raises(InputError, match="24 rows, but 50 needed"):
        merge_advice.merge_advice(NAMES, "base", calibration=[few], options=OPTIONS)


def test_rows_decide_by_answers_and_then_by_distance() -> None:
    def told(lost: float, share: float) -> MergeCandidate:
        skill = SkillForecast(
            model="a", share=share, low=0, high=1, by="answers", loss="none", rival=None, disturbance=None
        )
        return candidate("x", {"a": lost}).model_copy(update={"forecast": [skill], "agreement": {"a": share}})

    numbers = told(0.2, 0.8).forecast[0].model_copy(update={"model": "b", "share": 0.4, "by": "numbers"})
    mixed = told(0.2, 0.8)
    assert standing(mixed) == pytest.approx(0.7 + 0.3 * 0.8)
    assert standing(mixed.model_copy(update={"forecast": [*mixed.forecast, numbers]})) == pytest.approx(
        (0.94 + 0.4) / 2
    )
    assert standing(mixed.model_copy(update={"agreement": {}})) is None
    assert best_first({ARITHMETIC: told(0.2, 0.8), ISO_C: told(0.4, 0.9)}) == [ISO_C, ARITHMETIC]
    assert best_first({ARITHMETIC: told(0.4, 0.9), ISO_C: told(0.2, 0.9)}) == [ISO_C, ARITHMETIC]
    assert with_rows({ARITHMETIC: told(0.2, 0.9), ISO_C: told(0.4, 0.8)}, [ISO_C])[0] == ISO_C
    judged = {ARITHMETIC: told(0.5, 0.6), ISO_C: told(0.1, 0.8), SVC: told(0.3, 0.85)}
    fit = SVC.by("row")
    *_, why = with_rows(judged | {fit: told(0.2, 0.9)}, [fit])
    assert why[0] == "it should keep 90.0% of the fine-tunes' scores, x 85.0%, x 60.0%"
    assert why[1] == "it loses 20.0% of the fine-tunes' effect on outputs, x 30.0%, x 50.0%"


def test_lambda_stays_usual_unless_another_loses_much_less() -> None:
    assert ARITHMETIC.better({0.5: 0.3, 1.0: 0.35, 1.5: 0.5}, 1.01) == 1.0
    assert ARITHMETIC.better({0.5: 0.25, 1.0: 0.35, 1.5: 0.5}, 1.01) == 0.5
    assert [way.name for way in WAYS if way.is_searched] == ["task_arithmetic", "ties"]  # no rule, no rows
    assert (ISO_C.usual(3), SVC.usual(4), ARITHMETIC.usual(9)) == (2.25, 0.6, 0.25)


def test_shares_that_answers_tell() -> None:
    names, kept = ["a", "b"], {"a": 0.8, "b": 0.3}
    rows = {"a": 100, "b": 100}
    a, b = of_answers(names, meeting(), kept, {"a": 4, "b": 1}, rows)
    assert (a.share, a.by) == (0.8, "answers")
    assert (b.share, b.by, b.loss) == (0.3, "numbers", "probable")
    assert (a.rival, a.disturbance) == ("b", 0.2)
    assert a.high - a.share == pytest.approx(a.share - a.low) == pytest.approx(1.96 * 0.04 + 0.05, abs=0.002)
    few = of_answers(names, meeting(), kept, {"a": 4, "b": 1}, {"a": 10, "b": 10})[0]
    assert few.low < a.low
    for classes, kept_all in (({"a": 4, "b": 4}, 0.5), ({"a": 1, "b": 1}, 0.4)):  # two rows kept may be luck
        two = of_answers(names, meeting(), {"a": 1.0, "b": 1.0}, classes, {"a": 2, "b": 2})[0]
        assert (two.high, two.loss) == (1.0, "possible")
        assert two.low < kept_all
    a, b = of_answers(names, meeting(), {"a": 0.9}, {"a": None, "b": None}, rows)
    assert (a.share, a.by, a.loss) == (0.9, "texts", "none")
    assert (b.share, b.loss) == (None, "unknown")


def test_a_drowned_skill_and_what_would_save_it() -> None:
    names = ["a", "b"]
    quiet, uneasy, drowned = (of_weights(names, meeting(by), "tsv_m") for by in (0.2, 0.7, 1.4))
    assert [[one.loss for one in some] for some in (quiet, uneasy, drowned)] == [
        ["none", "none"], ["possible", "none"], ["probable", "none"]
    ]  # fmt: skip
    assert not rescue(names, meeting(), quiet, rows=False)
    longer = meeting(1.4).model_copy(update={"relative_norm": [0.1, 0.2]})  # which a balanced merge makes as long
    assert of_weights(names, longer, "tsv_m")[0].loss == "none"
    assert of_weights(names, longer, "tsv_m")[0].disturbance == pytest.approx(0.35)
    first, *more = rescue(names, meeting(1.4), drowned, rows=False)
    assert first == ("a will probably be lost: b, as long, does 1.4 times as much to its inputs; leave it out")
    assert "emr" in more[0]
    assert "--calibration" in more[1]
    decoder = of_weights(names, meeting(), "wudi")
    assert [one.loss for one in decoder] == ["unknown", "unknown"]
    assert rescue(names, meeting(), decoder, rows=False)[0].startswith("any of these skills may be lost")
    assert [one.loss for one in of_weights(names, meeting(), "task_arithmetic")] == ["unknown", "unknown"]
    alike = meeting().model_copy(update={"cosine": [[1, 0.75], [0.75, 1]]})
    assert rescue(names, alike, quiet, rows=False)[0].startswith("a and b are alike (cosine 0.75), the others not")
    alone = meeting().model_copy(update={"cosine": [[1, 0.75], [0.75, 1]], "cosine_mean": 0.75})
    assert not rescue(names, alone, quiet, rows=False)
    twins = meeting(1.0).model_copy(update={"cosine": [[1, 0.9], [0.9, 1]], "cosine_mean": 0.9})
    assert [(one.loss, one.rival) for one in of_weights(names, twins, "task_arithmetic")] == [("unknown", None)] * 2


def test_a_delta_of_nothing_is_named() -> None:
    still = meeting().model_copy(update={"relative_norm": [0.1, 0.0]})
    assert unchanged(["a", "b"], still) == ["b has the weights of the base: it adds nothing to the merge"]
    assert not unchanged(["a", "b"], meeting())


REFUSED = {
    "a base among the models": (["tuned", "base"], [], InputError, "is the base itself"),
    "one twice": (["other", "tuned", "tuned"], [], InputError, "tuned: a model is named twice"),
    "one twice, by another path": (["other", "tuned", "./tuned"], [], InputError, "./tuned: a model is named twice"),
    "a base by another path": (["tuned", "./base"], [], InputError, "is the base itself"),
    "one": (["tuned"], [], UsageError, "two models"),
    "rows of some": (["tuned", "other", "third"], ["calib.jsonl", "calib.jsonl"], UsageError, "2 files for 3 models"),
    "too few rows": (["tuned", "other"], ["few.jsonl"], InputError, "2 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(folder: Path, monkeypatch, case: str) -> None:
    models, data, error, said = REFUSED[case]
    monkeypatch.chdir(folder)
    rows(folder / "few.jsonl", 2)
    calibration = [{"data": one, "sequences": 2, "length": 12} for one in data]
    with pytest.raises(error, match=said):
        recommend_merge(models, "base", calibration=calibration, options=OPTIONS)


COMMANDS = {
    "a density": (["tuned", "other", "--density", "0.1"], "are for one MODEL"),
    "no density": (["tuned"], "--density"),
    "a table of nothing": (["tuned", "other", "--csv"], "give --calibration"),
    "no fit": (["tuned", "--density", "0.1", "--no-fit"], "for several MODELS"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_options_of_the_other_kind(folder: Path, monkeypatch, capsys, case: str) -> None:
    arguments, said = COMMANDS[case]
    monkeypatch.chdir(folder)
    code, _, err = call(capsys, "recommend", *arguments, "--base", "base")
    assert code == 2
    assert said in err


def test_a_table_has_a_column_for_each_figure_of_a_forecast(capsys) -> None:
    one = SkillForecast(
        model="a", share=0.5, low=0, high=1, by="answers", loss="none", rival=None, disturbance=None
    )  # fmt: skip
    say_table([candidate("ties", {"a": 0.5}).model_copy(update={"forecast": [one]})])
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["forecast.0.model"], row["forecast.0.share"]) == ("a", "0.5")


def test_a_file_that_is_there_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        recommend_merge(["a", "b"], "base", out=tmp_path / "there.yaml", options=OPTIONS)


def test_merge_writes_its_recipe_says_five_lines_and_runs(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    out = tmp_path / "new" / "two words"
    asked = ["merge", *NAMES, "--base", "base", "--out", out, "--workers", "1", "--device", "cpu"]
    code, said, err = call(capsys, *asked, "--dry-run")
    assert code == 0, err
    keeps = "keeps: tuned 86% (73% to 97%), "
    heads = ("chosen: svc, balanced, λ = 0.693, in ", "why: ", keeps, "in danger: ", "what helps: ")
    assert len(said.splitlines()) == 5
    assert all(line.startswith(head) for line, head in zip(said.splitlines(), heads, strict=True))
    assert said.splitlines()[2].endswith(", with each model's own head; the merge has that of tuned")
    recipe = out.with_name("two words.yaml")
    assert f"deltamerge run '{recipe}' --out '{out}' makes the merge" in err
    assert yaml.safe_load(recipe.read_text())["merge_method"] == "svc"
    assert not out.exists()
    code, _, err = call(capsys, *asked)
    assert (code, out.exists()) == (1, False)
    assert f"{recipe}: a recipe is there\nhint: deltamerge run '{recipe}' --out '{out}' makes it" in err
    code, said, err = call(capsys, *asked, "--force", "--json")
    assert code == 0, err
    assert json.loads(said)["run"]["out"] == str(out)
    assert json.loads(said)["advice"]["method"] == "svc, balanced"
    again = run(recipe, tmp_path / "again").folder
    made, same = (load_file(one / "model.safetensors") for one in (out, again))
    assert all(torch.equal(made[name], same[name]) for name in same)
    code, _, err = call(capsys, "run", recipe, "--out", out)
    assert (code, "up to date" in err) == (0, True)


def test_a_merge_fits_coefficients_once(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Its bytes, inputs and coefficients are those of its recipe alone, and of its recipe with the lock beside it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(merge_advice, "WAYS", (TSV_M,))
    monkeypatch.setattr(merge_advice, "SCOPES", SCOPES[1:])
    fits, fit = [], coefficients._fit
    monkeypatch.setattr(coefficients, "_fit", lambda *given: (fits.append(given), fit(*given))[1])
    few = ["--workers", "1", "--device", "cpu"]
    asked = ["merge", *NAMES[:2], "--base", "base", "--rows", "calib.jsonl", "--sequences", "8", "--length", "6", *few]
    made, locked, alone = (tmp_path / name for name in ("made", "locked", "alone"))
    code, said, err = call(capsys, *asked, "--out", made, "--dry-run")
    assert code == 0, err
    without = recommend_merge(NAMES[:2], "base", options=OPTIONS)
    assert f"chosen: {without.method} + coefficients by row, fitted from λ = " in said
    assert "why: it should keep " in said
    assert f"run {made}.yaml --out {made} --locked" in err
    code, _, err = call(capsys, "run", f"{made}.yaml", "--out", locked, "--locked", *few)
    assert (code, len(fits)) == (0, 1), err
    (tmp_path / "made.lock").unlink()
    with monkeypatch.context() as full:
        full.setattr(advised, "run_recipe", lambda *given: (_ for _ in ()).throw(OutputError("no space")))
        code, _, err = call(capsys, *asked, "--out", made, "--force")
        assert (code, len(fits), "no space" in err) == (1, 2, True)
    assert (tmp_path / "made.lock").exists()
    code, _, err = call(capsys, *asked, "--out", made)
    assert f"{made} --locked makes it" in err
    fits.pop()
    code, said, err = call(capsys, *asked, "--out", made, "--force", "--json")
    assert (code, len(fits)) == (0, 2), err
    plain, best = json.loads(said)["advice"]["candidates"]
    assert [best[key] for key in ("method", "balance", "factor")] == ["tsv_m", "norm", plain["factor"]]
    (of_all_rows,) = (one["lost"] for one in plain["tried"] if one["factor"] == plain["factor"])
    assert plain["lost_mean"] != of_all_rows  # of the rows on which the fit was better
    code, _, err = call(capsys, "run", f"{made}.yaml", "--out", alone, *few)
    assert (code, len(fits)) == (0, 3), err
    first, *others = (Lock.read(one / "recipe.lock") for one in (made, locked, alone))
    assert first.calibration["merge"]["coefficients"] == "row"
    for one in others:
        assert not one.differences(first.content["outputs"])
        assert (one.calibration, one.content["inputs"]) == (first.calibration, first.content["inputs"])
    code, _, err = call(capsys, "run", f"{made}.yaml", "--out", made, *few)
    assert (code, len(fits), "up to date" in err) == (0, 3, True)


def test_a_merge_with_further_keys_fits_coefficients_once(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Candidates have the keys, too; the form of the output is the merge's alone."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(merge_advice, "WAYS", (TSV_M,))
    monkeypatch.setattr(merge_advice, "SCOPES", SCOPES[1:])
    fits, fit = [], coefficients._fit
    monkeypatch.setattr(coefficients, "_fit", lambda *given: (fits.append(given), fit(*given))[1])
    rows = {"data": "calib.jsonl", "sequences": 8, "length": 6}
    few = {"rows": rows, "device": "cpu", "workers": 1, "dtype": "float32", "output": {"shard_size": "1MB"}}
    made = deltamerge.merge(NAMES[:2], tmp_path / "made", base="base", **few)
    assert made.lock["calibration"]["merge"]["coefficients"] == "row"
    assert len(fits) == 1
    prune = {"method": "dare", "density": 0.5}
    pruned = deltamerge.merge(NAMES[:2], tmp_path / "pruned", base="base", prune=prune, **few)
    assert len(fits) == 2
    assert pruned.lock["calibration"] != made.lock["calibration"]


def test_a_recipe_elsewhere_names_both_parts_of_an_adapter(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "lo+ra", "sub"):
        (tmp_path / name).mkdir()
    place = tmp_path / "sub"
    assert seen_from(place, "base+a") == "../base+../a"
    assert seen_from(place, f"{tmp_path}/base+./a") == f"{tmp_path}/base+../a"
    assert seen_from(place, "org/name@main+lo+ra") == "org/name@main+../lo+ra"
    assert seen_from(place, "lo+ra") == "../lo+ra"
    assert seen_from(place, "org/name+org/adapter") == "org/name+org/adapter"


def test_a_model_in_the_current_folder_has_the_folder_s_name(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder / "tuned")
    assert names_of([".", "../other", "./"]) == ["tuned-1", "other", "tuned-3"]
    assert names_of(["org/name@main", "base+../other"]) == ["name@main", "other"]


def test_a_recipe_has_letters_of_any_alphabet() -> None:
    for name, shown in (("modèle", "model: modèle"), ("a\u202eb", 'model: "a\\u202Eb"')):
        text = with_comment(["why"], {"model": name})
        assert text == f"# why\n{shown}\n"
        assert yaml.safe_load(text) == {"model": name}


def test_a_fit_that_found_nothing_is_not_recommended(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(merge_advice, "WAYS", (ISO_C, TSV_M))
    monkeypatch.setattr(merge_advice, "SCOPES", SCOPES[1:])
    monkeypatch.setattr(coefficients, "VARIED_RATE", 0.0)
    monkeypatch.setattr(coefficients, "VARIED_PASSES", 20)
    monkeypatch.setattr(merge_advice, "best_first", lambda judged: sorted(judged, key=lambda way: way.name))
    asked = [{"data": "calib.jsonl", "sequences": 8, "length": 6}]
    found = recommend_merge(NAMES[:2], "base", calibration=asked, options=OPTIONS)
    lost = {one.name: one.lost_mean for one in found.candidates}
    assert lost["tsv_m, balanced + coefficients by row"] == lost["tsv_m, balanced"] < lost["iso_c, balanced"]
    assert found.method == "tsv_m, balanced"


def test_merge_names_its_own_option_for_rows() -> None:
    way, factor, why = without_rows(meeting(), 2, talks=True)
    forecast = of_weights(["a", "b"], meeting(), way.method)
    advice = merge_advice.MergeAdvice.model_construct(
        method=way.name, factor=factor, why=why, forecast=forecast, candidates=[],
        rescue=rescue(["a", "b"], meeting(), forecast, rows=False),
    )  # fmt: skip
    said = in_five_lines(AdvisedMerge(advice, Path("out.yaml"), Path("out"), OPTIONS))
    assert said[1].endswith("(docs/measurements/merging.md)")
    assert "rows of every task (--rows)" in said[4]
    assert not any("--calibration" in line for line in said)


def test_merge_from_python_without_a_method(folder: Path, tmp_path: Path) -> None:
    models, base = [folder / name for name in NAMES], folder / "base"
    made = deltamerge.merge(models, tmp_path / "out", base=base, device="cpu", workers=1, dtype="float16")
    assert yaml.safe_load((tmp_path / "out.yaml").read_text())["dtype"] == "float16"
    assert made.lock["outputs"]
    with pytest.raises(UsageError, match="a base"):
        deltamerge.merge(models, tmp_path / "other")
    with pytest.raises(UsageError, match=r"x\.jsonl: is a path"):
        deltamerge.merge(models, tmp_path / "other", base=base, rows="x.jsonl")
    with pytest.raises(RecipeError, match="nosuch: unknown key"):
        deltamerge.merge(models, tmp_path / "other", base=base, nosuch=1)
    with pytest.raises(UsageError, match="balance, calibration: chosen with the method"):
        deltamerge.merge(models, tmp_path / "other", base=base, calibration={"length": 8}, balance="norm")
    assert not (tmp_path / "other.yaml").exists()
    with pytest.raises(UsageError, match="rows choose a method"):
        deltamerge.merge(models, tmp_path / "other", method="ties", base=base, rows={"data": "x.jsonl"})


def test_rows_of_each_model_lie_in_a_folder_by_name(folder: Path, tmp_path: Path) -> None:
    for name in NAMES[:2]:
        rows(tmp_path / f"{name}.jsonl", 3)
    models = ["./tuned", str(folder / "other")]
    found = rows_in(tmp_path, models, sequences=2)
    assert found == [{"data": str(tmp_path / f"{name}.jsonl"), "sequences": 2} for name in NAMES[:2]]
    assert [one["sequences"] for one in rows_in(tmp_path, models, sequences=8)] == [3, 3]  # all there are
    assert rows_in(tmp_path / "tuned.jsonl", models) == [{"data": str(tmp_path / "tuned.jsonl")}]
    long = tmp_path / "long.jsonl"
    long.write_text((tmp_path / "tuned.jsonl").read_text() + "a row that is not reached\n")
    assert rows_in(long, models, sequences=3)[0]["sequences"] == 3
    with pytest.raises(InputError, match=r"has no third\.jsonl"):
        rows_in(tmp_path, [*models, "third"])
    (tmp_path / "other.csv").write_text("text\nx\n")
    with pytest.raises(InputError, match=r"has other\.csv and other\.jsonl"):
        rows_in(tmp_path, models)
    with pytest.raises(InputError, match="no such folder"):
        rows_in(tmp_path / "gone", models)


MERGES = {
    "a recipe": (["r.yaml"], "deltamerge run r.yaml"),
    "no base": (["tuned", "other", "--out", "x"], "Missing option '--base BASE'"),
    "no output": (["tuned", "other", "--base", "base"], "Missing option '--out OUT'"),
    "one model": (["tuned", "--base", "base", "--out", "x"], "two models"),
    "rows that are not there": (
        ["tuned", "other", "--base", "base", "--out", "x", "--rows", "gone"],
        "gone: no such folder",
    ),
    "the current folder as output": (
        ["tuned", "other", "--base", "base", "--out", ".", "--force"],
        ".: is the current folder",
    ),
    "an output that is a model": (
        ["tuned", "other", "--base", "base", "--out", "other", "--force"],
        "other: holds the input other",
    ),
    "an output that no run made": (
        ["tuned", "other", "--base", "base", "--out", "mine", "--force"],
        "mine: --force replaces only files of runs",
    ),
    "a model that is not there": (["tuned", "gone", "--base", "base", "--out", "x"], "gone"),
}


@pytest.mark.parametrize("case", MERGES)
def test_a_merge_that_is_refused_says_one_line_and_writes_nothing(folder: Path, monkeypatch, capsys, case: str) -> None:
    arguments, said = MERGES[case]
    monkeypatch.chdir(folder)
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "diary.txt").touch()
    before = sorted(folder.iterdir())
    code, out, err = call(capsys, "merge", *arguments)
    assert (code in (1, 2), out) == (True, "")
    assert said in err
    assert "Traceback" not in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("side", [40, 160], ids=["exact", "iterated"])
def test_leading_directions_are_those_of_lapack(side: int) -> None:
    draw = np.random.default_rng(side)
    left, right = (np.linalg.qr(draw.standard_normal((n, side)))[0] for n in (side + 30, side))
    delta = (left * 0.8 ** np.arange(side) @ right.T).astype(np.float32)
    found = leading(delta, 6, (1, 2))
    for made, wanted in zip(found, (left[:, :6], right[:, :6]), strict=True):
        np.testing.assert_allclose(made.T @ made, np.eye(6), atol=1e-6)
        assert np.sum((made.T @ wanted) ** 2) == pytest.approx(6, abs=1e-4)
    assert leading(np.zeros_like(delta), 6, (1, 2))[1].shape == (side, 0)
    delta[0, 0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        leading(delta, 6, (1, 2))


def test_adapters_are_merged_over_the_base_that_is_given(tmp_path: Path, capsys, monkeypatch) -> None:
    """`merge one two --base base` is `merge base+one base+two --base base`, with shorter names."""
    tiny_llama(tmp_path / "base", seed=0, tokenizer=True)
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    for out, models in (("made", ("one", "two")), ("same", ("base+./one", "base+./two"))):
        code, _, err = call(capsys, "merge", *models, "--base", "base", "--out", out)
        assert code == 0, err
    recipe = yaml.safe_load((tmp_path / "made.yaml").read_text())
    assert [(one["model"], one["name"]) for one in recipe["models"]] == [
        ("./base+./one", "one"),
        ("./base+./two", "two"),
    ]
    made, same = (load_tensors(tmp_path / out) for out in ("made", "same"))
    assert all(torch.equal(tensor, same[name]) for name, tensor in made.items())


def test_rows_that_hold_no_completion_are_refused_at_once(tmp_path: Path, monkeypatch) -> None:
    base = tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate("ab", 1):
        tiny_llama(tmp_path / name, seed=seed, base=base, sigma=0.05, dtype=torch.float32, tokenizer=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(merge_advice, "measure", lambda *args, **options: pytest.fail("deltas are compared"))
    row = json.dumps({"prompt": "w5 w6 w7 w8 w9 w10 w11", "completion": " w8"})
    (tmp_path / "rows.jsonl").write_text((row + "\n") * 12)
    asked = [{"data": str(tmp_path / "rows.jsonl"), "sequences": 8, "length": 6}]
    with pytest.raises(InputError, match=r"a: row \d+: its 6 tokens hold nothing of its completion") as caught:
        recommend_merge(["a", "b"], "base", calibration=asked, options=OPTIONS)
    assert caught.value.hint == "raise calibration.length, or take the row out"
