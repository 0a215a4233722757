"""eval, sweep and search on tiny real checkpoints: what is judged in memory is what a run writes; studies go on."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from calibration_rows import rows
from calls import call
from conftest import load_tensors, tiny_bert_pair, write_json
from running import run
from safetensors.torch import load_file, save_file
from word_tokenizer import write_tokenizer

from deltamerge.apps.search import evaluate
from deltamerge.apps.search.candidates import candidates_of
from deltamerge.apps.search.judge import Walk
from deltamerge.apps.search.outcome import Bench, Outcome, lm_eval_value, pareto, rank, value_of
from deltamerge.apps.search.proposals import decode, load_optuna, sampler
from deltamerge.apps.search.results import label
from deltamerge.apps.search.search import search
from deltamerge.apps.search.sweep import sweep
from deltamerge.calibrate.spec import HELD_OUT
from deltamerge.errors import InputError, RecipeError
from deltamerge.recipe.file import TemplateFile, read_either, read_recipe, read_template
from deltamerge.recipe.load import loads
from deltamerge.recipe.open_values import Range, settings_by_place, template_of
from deltamerge.recipe.schema import LmEval, Prune, Study, schema
from deltamerge.recipe.yaml_source import loads as loads_yaml
from deltamerge.run.options import Options

OPTIONS = Options(device="cpu", workers=1)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes with heads of their own, rows."""
    folder = tmp_path_factory.mktemp("search")
    tiny_bert_pair(folder, dtype=torch.float32, sigma=0.05, tokenizer=True)
    shutil.copytree(folder / "tuned", folder / "other")
    tensors = load_file(folder / "tuned" / "model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name, tensor in tensors.items():
        start = base.get(name.removeprefix("bert."), torch.zeros_like(tensor))
        tensors[name] = start + 0.05 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    rows(folder / "calib.jsonl", 24)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    here = tmp_path / "here"
    shutil.copytree(template, here)
    return here


def write(folder: Path, text: str, name: str = "recipe") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


MODELS = """\
base_model: ./base
models:
  - {model: ./tuned, name: a, parameters: {weight: %s}}
  - {model: ./other, name: b, parameters: {weight: %s}}
calibration: {data: calib.jsonl, sequences: 8, length: 12, seeds: 2}
"""
TWO = MODELS % ("{search: [0, 1]}", "{search: [0, 1]}") + "merge_method: task_arithmetic\n"
ONE = "base_model: ./base\nmodels: [{model: ./tuned, name: a%s}]\n" + MODELS.splitlines()[-1] + "\n"

CHOSEN = TWO + "prune: {method: {search: {choices: [dare, magnitude]}}, density: 0.2}\n"
# What varies, and what the recipe has beside: whole deltas, masks of each kind, methods with passes of their own.
SHARED = {
    "whole": TWO,
    "dare": TWO + "prune: {method: dare, density: 0.3}\ndtype: bfloat16\n",
    "magnitude": TWO + "prune: {method: magnitude, density: 0.2, q: 0.5}\n",
    "wanda": TWO + "prune: {method: wanda, density: {search: [0.1, 0.9]}}\n",
    "della": TWO + "prune: {method: della, density: 0.4, epsilon: 0.1}\n",
    "rescaled": TWO + "prune: {method: magnitude, density: 0.2, rescale: l1}\n",
    "ties": TWO.replace("task_arithmetic", "ties") + "parameters: {density: 0.3}\n",
    "iso_c": MODELS % (1, 1) + "merge_method: iso_c\nparameters: {lambda: {search: [0.5, 2]}}\n",
    "regmean_plus": MODELS % (1, 1) + "merge_method: regmean_plus\nparameters: {lambda: {search: [0.5, 2]}}\n",
    "calibrated": TWO + "prune: {method: dare, density: 0.2, q: output_change}\n",
    "choices": CHOSEN + "seed: {search: [0, 4], step: 1}",
    "layers": TWO.replace("[0, 1]}", "[0, 1], groups: 2}", 1),
}  # fmt: skip


FAST = ("dare", "iso_c", "regmean_plus")
slow = pytest.mark.slow


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=slow) for name in SHARED])
def test_candidates_in_memory_are_the_bytes_of_a_run(folder: Path, name: str) -> None:
    file = read_template(write(folder, SHARED[name]))
    ranges = file.template.ranges
    rng = np.random.Generator(np.random.PCG64(3))

    def drawn() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for axis in ranges:
            for key in axis.keys:
                value: Any = axis.low + float(rng.uniform()) * (axis.high - axis.low)
                found[key] = axis.choices[rng.integers(len(axis.choices))] if axis.choices else value
                found[key] = int(value) if axis.is_whole else found[key]
        return found

    values = [file.template.values(one, 2) for one in (file.template.start(), drawn(), drawn())]
    candidates = candidates_of(file, OPTIONS)
    bench = Bench(file, values[0], candidates, OPTIONS)
    made = [candidates.of(file.recipe(one)) for one in values]
    judge = bench.judge(made[0].recipe)
    assert judge is not None
    for one in made:
        judge.prepare(one)
    walk = Walk(made, judge.reader, judge.known, "cpu", budget=1)
    names = list(made[0].roots)
    for k, one in enumerate(values):
        found = {n: t for part in (names[:7], names[7:], names[:3]) for n, t in walk.tensors(k, part).items()}
        plain = file.file(one)
        path = write(folder, plain.output.text, f"plain{k}")
        written = load_tensors(run(path, workers=1).folder)
        for tensor in names:
            assert torch.equal(found[tensor].view(torch.uint8), written[tensor].view(torch.uint8)), (k, tensor)
    bench.close()


def plain_scores(model: Path, head: Path, data: Path) -> dict[str, float]:
    """Accuracy and loss by transformers alone: the model's body under another's head."""
    import transformers

    whole = transformers.AutoModelForSequenceClassification.from_pretrained(head).eval()
    state = {n: t for n, t in load_tensors(model).items() if not n.startswith("classifier")}
    state = {n if n.startswith("bert.") else f"bert.{n}": t for n, t in state.items()}
    whole.load_state_dict(state, strict=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(head)
    right, losses = [], []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        with torch.no_grad():
            logits = whole(**tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=12)).logits[0]
        right.append(int(logits.argmax()) == row["label"])
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(row["label"]))))
    return {"accuracy": float(np.mean(right)), "loss": float(np.mean(losses))}


def test_eval_is_what_transformers_computes(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = write(folder, MODELS % (0.4, 0.7) + "merge_method: task_arithmetic\n", "merge")
    run(path, folder / "merged", workers=1)
    run(write(folder, path.read_text() + "output: {kind: delta}\n", "delta"), folder / "delta", workers=1)
    rows_of = ("--calibration", "calib.jsonl", "--length", "12", "--json")
    code, out, err = call(capsys, "eval", "tuned", "merged", "base", "--head", "tuned", *rows_of)
    assert code == 0, err
    found = {one["model"]: one["scores"][""] for one in json.loads(out)["models"]}
    for model in found:
        plain = plain_scores(folder / model, folder / "tuned", folder / "calib.jsonl")
        assert found[model]["accuracy"] == pytest.approx(plain["accuracy"])
        assert found[model]["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    code, out, err = call(capsys, "eval", "delta", "merged", "--recipe", "merge.yaml", "--json")
    assert code == 0, err
    by_recipe = json.loads(out)
    delta, merged = by_recipe["models"]
    assert delta["scores"] == merged["scores"]  # a delta artifact over its base is what it was made of
    assert set(merged["scores"]) == {"a", "b"}
    assert by_recipe["rows"] == {"a": 24, "b": 24}
    chain = [Path("chain/000001"), Path("chain/000002")]
    for words in (("other", "base", "--out", chain[0]), ("merged", "other", "--out", chain[1], "--after", chain[0])):
        code, _, err = call(capsys, "extract", *words, "-q")
        assert code == 0, err
    code, out, err = call(capsys, "eval", "chain", "base+chain/000002", "--recipe", "merge.yaml", "--json")
    assert code == 0, err
    assert [one["scores"] for one in json.loads(out)["models"]] == [merged["scores"]] * 2
    opened = candidates_of(read_template(write(folder, TWO, "open")), OPTIONS).opener("base+chain/000001", folder)
    assert opened.tensors.keys() == load_tensors(folder / "other").keys()
    code, out, _ = call(capsys, "eval", "tuned", *rows_of[:-1], "--csv", "--sequences", "5", "--metric", "f1")
    assert code == 0
    assert out.splitlines()[0] == "model,f1"
    for wrong, said in (
        (("eval", "base", *rows_of), "needs a model …ForSequenceClassification"),
        (("eval", "tuned", "--calibration", "none.jsonl", "--length", "12"), "no such file"),
        (("eval", "tuned", *rows_of, "--metric", "exact_match"), "needs a model …ForCausalLM"),
        (("eval", "tuned"), "give the rows"),
        (("eval", "nowhere", *rows_of), "nowhere"),
    ):
        code, _, err = call(capsys, *wrong)
        assert code in (1, 2)
        assert said in err, err
        assert "Traceback" not in err


def test_eval_goes_on_and_checks_every_model_first(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    scored: list[int] = []
    measure = evaluate.measured

    def counted(sheets: Any, variants: Any) -> Any:
        scored.append(len(variants))
        if len(scored) == 2:
            raise InputError("the power is out")
        return measure(sheets, variants)

    monkeypatch.setattr(evaluate, "measured", counted)
    words = ("--head", "tuned", "--calibration", "calib.jsonl", "--length", "12", "--out", "scores.jsonl", "--json")
    tensors = load_file(folder / "other" / "model.safetensors")
    shutil.copytree("other", "cut")
    lost = next(name for name in tensors if not name.startswith("classifier"))
    save_file({n: t for n, t in tensors.items() if n != lost}, Path("cut/model.safetensors"), metadata={"format": "pt"})
    code, _, err = call(capsys, "eval", "tuned", "other", "cut", *words)
    assert code == 1
    assert f"cut: lacks {lost}" in err
    assert not scored  # nothing was computed before the last model was checked
    code, _, err = call(capsys, "eval", "tuned", "other", *words)
    assert (code, "the power is out" in err) == (1, True)
    assert len(Path("scores.jsonl").read_text().splitlines()) == 1
    with Path("scores.jsonl").open("a") as file:
        file.write('{"key": "cut sh')  # as a full disk leaves it
    code, out, err = call(capsys, "eval", "tuned", "other", *words)
    assert code == 0, err
    assert len(scored) == 3  # the first model's scores were there
    again = call(capsys, "eval", "tuned", "other", *words)[1]
    assert (again, len(scored)) == (out, 3)
    changed = {name: tensor + 0.5 for name, tensor in tensors.items()}
    save_file(changed, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    code, moved, _ = call(capsys, "eval", "tuned", "other", *words)
    assert (code, len(scored)) == (0, 4)
    assert json.loads(moved)["models"][0] == json.loads(out)["models"][0]
    assert json.loads(moved)["models"][1] != json.loads(out)["models"][1]
    Path("notes.txt").write_text("mine\nand mine\n")
    code, _, err = call(capsys, "eval", "tuned", *words[:-3], "--out", "notes.txt")
    assert (code, "notes.txt:1: is no line of scores" in err) == (1, True)
    code, _, err = call(capsys, "eval", "base", "tuned", *words[2:])
    assert "hint: --head tuned" in err


def test_tables_name_models_and_numbers_have_three_digits(
    folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    text = MODELS.replace(", name: a", "").replace("%s", "{search: [0, 1]}") + "merge_method: task_arithmetic\n"
    write(folder, text + "study: {objective: accuracy, trials: 3}\n", "open")
    code, out, err = call(capsys, "search", "open.yaml")
    assert code == 0, err
    assert re.search(r"tuned +b\n.*weight +weight\n", out), out
    assert "models[" not in out
    assert "/tuned" not in out
    best = yaml.safe_load((folder / "open.best.yaml").read_text())
    found = json.loads((folder / "open-search" / "study.json").read_text())
    assert all(value == float(f"{value:.3g}") for trial in found["trials"] for value in trial["values"].values())
    chosen = found["trials"][found["best"]]["values"]
    assert chosen == {f"models[{i}].parameters.weight": m["parameters"]["weight"] for i, m in enumerate(best["models"])}
    page = (folder / "open-search" / "report.html").read_text()
    assert "tuned: weight" in page
    assert "models[" not in page
    axis = Range(("a",), 0.12345, 0.12349)
    assert decode([axis], {"a": 0.123456}) == {"a": 0.123456}  # rounded it would be outside
    assert decode([Range(("a",), 0, 4, step=0.0625)], {"a": 1.0625}) == {"a": 1.0625}
    assert label("models[1].prune.density[0]", ["x", "./y"]) == "y: prune.density[0]"
    assert label("models[7].parameters.weight", ["x"]) == "models[7].parameters.weight"


def test_a_sweep_scores_the_base_and_the_fine_tunes_by_its_objective(folder: Path, capsys) -> None:
    write(
        folder,
        MODELS % ("{sweep: [0.5, 1.0]}", 0.5) + "merge_method: task_arithmetic\nstudy: {objective: agreement}\n",
        "swept",
    )
    code, out, err = call(capsys, "sweep", folder / "swept.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["reference_objectives"] == {
        "base": {"mean distance": 1.0}, "fine-tune": {"mean distance": pytest.approx(0.0, abs=1e-6)}
    }  # fmt: skip
    code, out, err = call(capsys, "sweep", folder / "swept.yaml")
    assert re.search(r"\n +base +1 +1 +1\n", out), out


def test_results_are_a_line_in_python_and_a_table_in_a_notebook(folder: Path) -> None:
    text = (
        MODELS % ("{search: [0, 1]}", 0.5) + "merge_method: task_arithmetic\nstudy: {objective: accuracy, trials: 2}\n"
    )
    found = search(read_template(write(folder, text, "open")), OPTIONS)
    assert repr(found).startswith(f"<SearchResult {folder / 'open-search'}: trial {found.chosen.number} of 2, mean acc")
    assert "<th>a: weight</th>" in found._repr_html_()
    swept = sweep(read_template(write(folder, text.replace("search: [0, 1]", "sweep: [0.5, 1.0]"), "swept")), OPTIONS)
    assert repr(swept).startswith(f"<SweepResult {folder / 'swept-sweep'}: 2 points, best a: weight ")
    assert "swept.best.yaml" in swept._repr_html_()
    scores = evaluate.Evaluation({"": 8}, (evaluate.ModelScores("m", {"": {"accuracy": 0.51234}}),))
    assert repr(scores) == "<Evaluation of 1 models: 8 rows>"
    assert "<th>m</th><td>accuracy 0.512</td>" in scores._repr_html_()


def harness(scores: dict[str, Any], given: dict[str, Any]) -> ModuleType:
    """Return a module with the two calls of lm_eval that are used."""
    made, tasks = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")

    def simple_evaluate(**told: Any) -> dict[str, Any]:
        print("a table")
        given.update(told)
        return {"results": scores}

    made.simple_evaluate, made.tasks = simple_evaluate, tasks  # type: ignore[attr-defined]
    tasks.TaskManager = dict  # type: ignore[attr-defined]
    return made


def test_tasks_of_lm_eval_are_an_objective(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    scores = {"toy": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "toy"}, "other": {"acc,none": 0.75}}
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    text = MODELS % ("{sweep: [0.5, 1.0]}", 0.5) + "merge_method: task_arithmetic\nstudy: {objective: {lm_eval: %s}}\n"
    path = write(folder, text % "[toy, other]", "swept")
    code, _, err = call(capsys, "sweep", path)
    assert (code, "pip install 'deltamerge[lm-eval]'" in err) == (1, True)
    made = harness(scores, given)
    monkeypatch.setitem(sys.modules, "lm_eval", made)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", made.tasks)
    code, out, err = call(capsys, "sweep", path, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["objectives"] == [{"name": "acc of toy, other", "less_is_better": False}]
    assert [row["objectives"] for row in found["rows"]] == [[0.625], [0.625]]
    assert given["tasks"] == ["toy", "other"]
    assert not Path(given["model_args"]["pretrained"]).exists()  # the merged folder is gone when it is judged
    write(folder, text % "{tasks: [toy], metric: f1}", "swept")
    code, _, err = call(capsys, "sweep", path, "--force")
    assert "lm_eval: toy has no f1" in err
    write(folder, text % "{tasks: [toy], folder: tasks}", "swept")
    code, _, err = call(capsys, "sweep", path, "--force")
    assert "may run programs" in err
    assert "--allow-command" in err


TOY = """\
task: toy
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_itself_scores_a_local_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    import transformers

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["<unk>", "<s>", "</s>", "the", "sky", "is", "blue", "red"]
    write_json(tmp_path / "words.json", {})
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder, len(words))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [{"q": "w3 w4", "choices": ["w5", "w6"], "gold": gold} for gold in (0, 1, 1, 1)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.json").write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    (tmp_path / "tasks" / "toy.yaml").write_text(TOY % (tmp_path / "tasks" / "rows.json"))
    goal = LmEval.model_validate({"tasks": ["toy"], "folder": "tasks"})
    found = lm_eval_value(goal, folder, tmp_path, "cpu")
    losses = []
    for choice in ("w5", "w6"):
        ids = torch.tensor([tokenizer(f"w3 w4 {choice}")["input_ids"]])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss) * (ids.shape[1] - 1))
    assert found == (0.25 if losses[0] < losses[1] else 0.75)


BAD = {
    "{search: [1, 0]}": "low < high",
    "{search: [0, 1], log: true}": "log needs bounds above 0",
    "{search: [0, 1], step: 2}": "step must be above 0",
    "{search: [0, 1], start: 2}": "start must be within",
    "{search: [0, 1], step: 0.25, start: 0.3}": "start must be 0 and a whole number of steps",
    "{search: [0, 1], grups: 2}": "unknown key 'grups'",
    "{search: [0, 1], groups: 0}": "groups and gradient",
    "{search: [0, 1], groups: 2, gradient: 2}": "exclude each other",
    "{search: [0.5]}": "at least two choices",
    "{search: {choice: [1, 2]}}": "or {choices",
    "{search: {choices: [1, 1]}}": "same choice twice",
    "{search: {choices: [1, 2]}, log: true}": "for numbers between",
    "{search: {choices: [1, 2]}, start: 3}": "one of the choices",
    "{sweep: []}": "needs a list",
    "{sweep: [1, 1]}": "same value twice",
    "{sweep: [1, 2], log: true}": "beside sweep",
    "{sweep: [{search: [0, 1]}, 2]}": "inside another",
}


@pytest.mark.parametrize("value", BAD)
def test_bad_open_values_are_named_at_their_place(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError) as refused:
        read_template(write(tmp_path, TWO.replace("{search: [0, 1]}", value, 1)))
    (problem,) = refused.value.problems
    assert BAD[value] in problem.message
    assert problem.line == 3
    assert problem.location.startswith("models[0].parameters.weight")


def test_a_range_ends_on_a_step() -> None:
    """As Optuna has it, with a warning."""
    (axis,) = template_of(loads_yaml("x: {search: [1, 10], step: 4, start: 5}", "r")).ranges
    assert (axis.low, axis.high, axis.first, axis.is_whole) == (1, 9, 5, True)
    (axis,) = template_of(loads_yaml("x: {search: [0.1, 0.7], step: 0.1}", "r")).ranges
    assert (axis.low, axis.high) == (0.1, 0.7)


def test_values_of_the_command_line_are_swept_as_they_are() -> None:
    texts = ["a, b", "{method: dare, density: 0.1}", "[0.1, 1]", "'no: 1'", "null"]
    found = settings_by_place([(("name",), text) for text in texts] + [(("seed",), "1")])
    source = loads_yaml(f"name: {found['name',]}\nseed: {found['seed',]}\n", "r")
    (axis,) = template_of(source).sweeps
    assert axis.values == ("a, b", {"method": "dare", "density": 0.1}, [0.1, 1], "no: 1", None)
    assert source.data["seed"] == 1


BAD_STUDIES = {
    "{objective: accurracy}": "study.objective: must be one of agreement, same_answers, metric",
    "{objective: []}": "study.objective: needs at least 1 item",
    "{objective: {measure: loss, of: nobody}}": "study.objective.of: 'nobody' is no fine-tune here",
    "{objective: {measure: loss, weights: {nobody: 2}}}": "study.objective.weights: 'nobody' is no fine-tune here",
    "{objective: {over: minimum, weights: {a: 2}}}": "study.objective: weights belong to the mean",
    "{objective: {command: {}}}": "study.objective.command: needs run",
    "{objective: {command: {run: score}, measure: loss}}": "study.objective: command stands alone",
    "{objective: {command: {run: score, timeout: 0}}}": "study.objective.command.timeout: must be at least 1",
    "{objective: [loss, agreement], sampler: cmaes}": "study.sampler: cmaes has one objective",
    "{objective: [loss, agreement], pruner: median}": "study.pruner: is for one objective that rows give",
    "{trials: 0}": "study.trials: must be at least 1",
    "{sampler: grid}": "study.sampler: must be one of gp, tpe, cmaes, nsga2, random",
}


@pytest.mark.parametrize("study", BAD_STUDIES)
def test_bad_studies_are_named_at_their_place(study: str) -> None:
    with pytest.raises(RecipeError) as refused:
        loads(ONE % "" + f"study: {study}\n")
    (problem,) = refused.value.problems
    assert f"{problem.location}: {problem.message}".startswith(BAD_STUDIES[study])
    assert problem.line == 4


def test_open_values_become_plain_text(folder: Path) -> None:
    text = "# why\n" + TWO.replace("[0, 1]}", "[0.01, 1], log: true, groups: 2}", 1)
    file = read_template(write(folder, text))
    first, second = "models[0].parameters.weight", "models[1].parameters.weight"
    values = file.template.values({f"{first}[0]": 0.25, f"{first}[1]": 0.5, second: 1}, 4)
    plain = file.file(values)
    assert plain.output.recipe.models[0].parameters["weight"] == (0.25, 0.25, 0.5, 0.5)
    assert plain.output.text.startswith("# why\n")
    assert file.template.start()[f"{first}[0]"] == pytest.approx(0.1)
    read = read_recipe(write(folder, plain.output.text, "plain")).output.recipe
    assert read.model_dump() == file.recipe(values).model_dump()
    swept = read_template(write(folder, ONE % ", prune: {sweep: {tenth: {method: dare, density: 0.1}}}", "swept"))
    ((labels, point),) = swept.template.points
    assert (labels, list(point.values())) == (("tenth",), [{"method": "dare", "density": 0.1}])
    with pytest.raises(RecipeError) as refused:  # one result is to be made
        read_recipe(write(folder, text))
    assert {str(problem.hint).split(",")[0] for problem in refused.value.problems} == {"deltamerge search recipe.yaml"}
    with pytest.raises(RecipeError, match="is no fine-tune here"):
        loads(ONE % "" + "study: {objective: {measure: loss, of: nobody}}")
    with pytest.raises(RecipeError, match="and others to be swept"):
        read_template(write(folder, TWO + "seed: {sweep: [0, 1]}"))
    weight = schema()["$defs"]["Parameters"]["properties"]["weight"]
    assert weight["anyOf"][1] == {"$ref": "#/$defs/Open"}
    assert Range((), 1, 9, step=2).is_whole
    assert not Range((), 0, 1).is_whole


@pytest.mark.parametrize("key", [False, True])
def test_candidates_have_mergekit_s_defaults_where_the_recipe_asks_for_them(folder: Path, key: bool) -> None:
    text = TWO.replace("task_arithmetic", "dare_linear") + "parameters: {density: 0.5}\n"
    path = write(folder, text + "mergekit: true\n" * key)
    file = read_either(path, mergekit_exact=not key)
    assert isinstance(file, TemplateFile)
    values = file.template.values({"models[0].parameters.weight": 0.25, "models[1].parameters.weight": 0.5}, 2)
    assert file.recipe(values).prune == Prune(rescale="l1")
    plain = text.replace("{search: [0, 1]}", "0.25", 1).replace("{search: [0, 1]}", "0.5")
    exact = read_recipe(write(folder, plain, "plain"), mergekit_exact=True).output.recipe
    for found in (file.recipe(values), file.file(values).output.recipe):
        assert found.model_dump() == exact.model_dump()


def test_a_sweep_scores_what_runs_write_and_goes_on(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    study = "study: {objective: {measure: loss}, test: calib.jsonl, together: 2}\n"
    path = write(folder, ONE % ", prune: {method: {sweep: [dare, magnitude]}, density: 0.3}" + study)
    asked = ("sweep", path, "--set", "seed=0", "--set", "seed=1", "--device", "cpu")
    measured: list[int] = []
    original = Bench.measure

    def counted(self: Bench, some: Any, part: Any, work: Path) -> Any:
        if len(measured) == 1:
            measured.append(0)
            raise KeyboardInterrupt
        measured.append(len(some))
        return original(self, some, part, work)

    monkeypatch.setattr(Bench, "measure", counted)
    assert call(capsys, *asked)[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    code, out, err = call(capsys, *asked, "--keep", "all", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert measured == [2, 0]
    assert len((folder / "recipe-sweep" / "results.jsonl").read_text().splitlines()) == 4  # two of them from before
    assert found["axes"] == ["models[0].prune.method", "seed"]
    for row, kept in zip(found["rows"], found["kept"], strict=True):
        plain = plain_scores(Path(kept), folder / "tuned", folder / "calib.jsonl")
        assert row["scores"]["a"]["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    best = min(range(4), key=lambda i: found["rows"][i]["objectives"][0])
    assert found["best"] == best
    assert Path(found["recipe"]) == path.with_name("recipe.best.yaml")
    assert yaml.safe_load(Path("recipe.best.yaml").read_text())["seed"] == int(found["rows"][best]["values"]["seed"])
    assert call(capsys, "run", "recipe.best.yaml", "--locked")[0] == 0
    assert load_tensors(folder / "recipe.best-merged").keys() == load_tensors(folder / "tuned").keys()
    with (folder / "recipe-sweep" / "results.jsonl").open("ab") as damaged:
        damaged.write(b"\xff\n" + b"[" * 100_000)
    code, out, err = call(capsys, *asked)  # nothing is left to do; seeds are averaged
    assert code == 0, err
    assert "±" in out
    assert (folder / "recipe-sweep" / "sweep.svg").read_text().startswith("<svg")
    code, _, err = call(capsys, "sweep", write(folder, ONE % "", "none"))
    assert (code, "no values to sweep" in err) == (1, True)
    wrong = write(folder, ONE % ", prune: {method: {sweep: [dare, nothing]}, density: 0.3}", "wrong")
    code, _, err = call(capsys, "sweep", wrong)
    assert (code, "with models[0].prune.method: nothing" in err) == (1, True)


def test_fine_tunes_may_be_swept_too_each_on_its_own_rows(folder: Path, capsys) -> None:
    lines = (folder / "calib.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[:10]))
    tune = "{model: ./%s, name: %s, parameters: {weight: 1.0}}"
    models = "{sweep: {%s}}" % ", ".join(f"{name}: {tune % (name, name)}" for name in ("tuned", "other"))  # noqa: UP031
    study = "study: {objective: loss, test: {tuned: calib.jsonl, other: some.jsonl}}\n"
    text = (
        f"base_model: ./base\nmodels: [{models}]\ncalibration: {{data: calib.jsonl, sequences: 8, length: 12}}\n{study}"
    )
    code, out, err = call(capsys, "sweep", write(folder, text), "--json", "--device", "cpu")
    assert code == 0, err
    found = json.loads(out)
    assert found["test_rows"] == {"tuned": 24, "other": 10}
    for row, (name, data) in zip(found["rows"], (("tuned", "calib"), ("other", "some")), strict=True):
        plain = plain_scores(folder / name, folder / name, folder / f"{data}.jsonl")
        assert row["scores"][name]["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert row["objectives"] == [row["scores"][name]["loss"]]
    code, _, err = call(capsys, "sweep", write(folder, text.replace("other: some", "others: some")))
    assert (code, "study.test.others: is no fine-tune here" in err) == (1, True)


def found_trials(found: Any) -> list[tuple[Any, ...]]:
    return [(t.number, tuple(t.params.values()), t.state, t.outcome.values) for t in found.trials]


STUDY = "study: {objective: %s, trials: 8, together: 4, sampler: %s, seed: 3}\n"
FEW = STUDY.replace("trials: 8, together: 4", "trials: 2, together: 2")


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("cmaes", marks=slow)])
def test_a_killed_search_ends_as_one_that_was_not(folder: Path, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = read_template(write(folder, TWO + STUDY % ("agreement", sampler)))
    whole = search(file, OPTIONS, folder / "whole")
    calls: list[int] = []
    original = Bench.measure

    def killed(self: Bench, some: Any, part: Any, work: Path) -> Any:
        calls.append(len(some))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, some, part, work)

    monkeypatch.setattr(Bench, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        search(file, OPTIONS, folder / "killed")
    monkeypatch.undo()
    assert found_trials(search(file, OPTIONS, folder / "killed")) == found_trials(whole)
    held = [t for t in whole.trials if t.held is not None]
    assert whole.trials[0] in held  # the start is compared, too
    assert min(t.held.values[0] for t in held if t.held) == (whole.chosen.held or Outcome()).values[0]
    with pytest.raises(InputError, match="begun with another recipe"):
        search(
            read_template(write(folder, TWO + "seed: 5\n" + STUDY % ("agreement", sampler))), OPTIONS, folder / "whole"
        )


def test_every_second_trial_of_tpe_is_near_the_best() -> None:
    optuna, settings = load_optuna(), Study.model_validate({})
    made = optuna.distributions
    space = {
        "plain": made.FloatDistribution(0, 1.5),
        "log": made.FloatDistribution(1e-4, 1, log=True),
        "steps": made.FloatDistribution(0, 1, step=0.25),
        "whole": made.IntDistribution(1, 9, step=2),
        "choice": made.CategoricalDistribution(["x", "y"]),
    }
    study = optuna.create_study(direction="maximize")
    done: list[tuple[float, dict[str, Any]]] = []
    moved = 0
    for number in range(24):
        study.sampler = sampler(optuna, settings, number)
        trial = study.ask(space)
        assert trial.params["whole"] in (1, 3, 5, 7, 9)
        assert trial.params["steps"] in (0, 0.25, 0.5, 0.75, 1)
        if number >= 8 and number % 2:
            best = max(done, key=lambda one: one[0])[1]
            most = 5 * 0.15 / (1 + (number - 8) / 4)  # five deviations
            assert abs(trial.params["plain"] - best["plain"]) <= most * 1.5
            assert abs(np.log(trial.params["log"] / best["log"])) <= most * np.log(1e4)
            assert trial.params["choice"] == best["choice"]
            moved += trial.params["plain"] != best["plain"]
        value = -abs(trial.params["plain"] - 0.4) - abs(np.log(trial.params["log"] / 0.03))
        study.tell(trial, value)
        done.append((value, dict(trial.params)))
    assert moved == 8
    failing = optuna.create_study()
    failing.sampler = sampler(optuna, settings, 9)
    assert failing.ask(space).params.keys() == space.keys()  # no trial is complete


@slow
def test_a_search_finds_what_a_grid_of_ten_times_its_evaluations_does(folder: Path) -> None:
    """On two numbers, within 5 %: 24 trials beside 16 × 16 points."""
    study = "study: {objective: agreement, trials: 24}\n"
    file = read_template(write(folder, TWO.replace("[0, 1]", "[0, 2]") + study))
    found = search(file, OPTIONS, folder / "found")
    best = min(trial.outcome.values[0] for trial in found.trials)
    steps = [round(2 * i / 15, 4) for i in range(16)]
    grid = TWO.replace("{search: [0, 1]}", f"{{sweep: {steps}}}")
    points = read_template(write(folder, grid + "study: {together: 64}\n", "grid"))
    bench = Bench(points, next(points.template.points)[1], candidates_of(points, OPTIONS), OPTIONS)
    outcomes = bench.measure([values for _, values in points.template.points], "search", folder)
    bench.close()
    assert best <= min(one.values[0] for one in outcomes) * 1.05


@slow
def test_several_objectives_choices_and_pruning(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    goals = "[{measure: loss, of: a}, {measure: loss, of: b}]"
    text = TWO + "prune: {method: {search: {choices: [dare, magnitude]}}, density: {search: [0.1, 1], log: true}}\n"
    write(folder, text + STUDY % (goals, "nsga2"))
    code, out, err = call(capsys, "search", "recipe.yaml", "--json", "--keep", "best", "--device", "cpu")
    assert code == 0, err
    found = json.loads(out)
    values = [tuple(t["objectives"]) for t in found["trials"]]
    front = [n for n, v in enumerate(values) if not any(w != v and w[0] <= v[0] and w[1] <= v[1] for w in values)]
    assert found["front"] == front
    assert {t["values"]["prune.method"] for t in found["trials"]} == {"dare", "magnitude"}
    page = (folder / "recipe-search" / "report.html").read_text()
    assert "Pareto front" in page
    assert "<script" not in page
    assert "## Search" in (folder / "recipe-search" / "best" / "README.md").read_text()
    assert call(capsys, "verify", folder / "recipe-search" / "best")[0] == 0
    code, _, err = call(capsys, "search", "recipe.yaml", "--trials", "10", "--json")  # it goes on
    assert (code, len(json.loads(out)["trials"])) == (0, 8), err
    code, _, err = call(capsys, "check", "recipe.yaml")
    assert code == 0, err
    code, out, err = call(capsys, "plan", "recipe.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["study"]["search"][:2] == ["models[0].parameters.weight", "models[1].parameters.weight"]


def test_the_memory_of_a_search_grows_by_the_hidden_states_of_a_candidate(folder: Path, capsys) -> None:
    memory = []
    for together in (2, 3, 7):
        text = TWO + f"study: {{objective: agreement, together: {together}}}\n"
        code, out, err = call(capsys, "plan", write(folder, text), "--json")
        assert code == 0, err
        memory.append(json.loads(out)["study"]["memory"])
    one = 2 * HELD_OUT * 12 * 32 * 4  # of two fine-tunes of width 32, rows of 12 tokens
    assert [memory[1] - memory[0], memory[2] - memory[1]] == [one, 4 * one]


@slow
@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_bad_trials_end_after_a_quarter_of_the_rows(folder: Path, pruner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned trial is worse on those rows than the median of the trials before it that went on (halving: than the
    best quarter), and is not measured on the others."""
    text = ONE % ", parameters: {weight: {search: [0, 6]}}"
    text += f"study: {{trials: 16, together: 4, pruner: {pruner}, sampler: random, seed: 2}}\n"
    seen: dict[str, list[float]] = {"first": [], "search": [], "held": []}
    original = Bench.measure

    def noted(self: Bench, some: Any, part: Any, work: Path) -> Any:
        seen[part] += [next(iter(values.values())) for values in some]
        return original(self, some, part, work)

    monkeypatch.setattr(Bench, "measure", noted)
    found = search(read_template(write(folder, text)), OPTIONS, folder / "study")
    weights = [next(iter(trial.params.values())) for trial in found.trials]
    first = [trial_quarter(folder / "study" / "study.db", n) for n in range(16)]
    pruned = [trial.number for trial in found.trials if trial.state == "pruned"]
    assert 0 < len(pruned) < 16
    assert seen["first"] == weights
    assert seen["search"] == [w for n, w in enumerate(weights) if n not in pruned]
    assert found.best not in pruned
    for n in range(16):
        if pruner == "median":
            whole = [first[k] for k in range(4 * (n // 4)) if k not in pruned]
            worse = len(whole) >= 8 and first[n] > float(np.median(whole))
        else:
            worse = first[n] > sorted(first[: n + 1])[max(0, (n + 1) // 4 - 1)]
        assert (n in pruned) == worse, (n, first, pruned)


def trial_quarter(path: Path, number: int) -> float:
    """What a trial's objective was on a quarter of the rows, by SQLite alone."""
    with sqlite3.connect(path) as file:
        ask = "select intermediate_value from trial_intermediate_values natural join trials where number = ?"
        ((value,),) = file.execute(ask, (number,)).fetchall()
    file.close()
    return float(value)


SAYS = "import sys, json, pathlib; folder = pathlib.Path(sys.argv[1]); "
COMMANDS: dict[str, tuple[str, str | float]] = {
    SAYS + "print('log'); print(json.dumps({'results': {'a.b': {'acc,none': 0.5}}}))": ("results.a.b.acc,none", 0.5),
    SAYS + "print(json.dumps({'score': len(list(folder.glob('*.safetensors')))}))": ("score", 1.0),
    SAYS + "print('all is well')": ("score", "prints no JSON object: all is well"),
    SAYS + "print('{\"score\": NaN}')": ("score", "is no finite number"),
    SAYS + 'print(\'{"score": "high"}\')': ("score", "is no finite number"),
    SAYS + "print('{\"result\": 1}')": ("score", "its JSON has no score"),
    SAYS + "sys.exit('out of memory')": ("score", "exit code 1: out of memory"),
    "import time; time.sleep(60)": ("score", "ended after 1 s"),
}


@pytest.mark.parametrize("program", COMMANDS)
def test_a_command_is_a_number_or_one_line(template: Path, program: str) -> None:
    value, expected = COMMANDS[program]
    asked = {
        "run": [sys.executable, "-c", program, "{folder}"],
        "value": value,
        "timeout": 1 if "sleep" in program else 60,
    }
    study = loads(ONE % "" + f"study: {json.dumps({'objective': {'command': asked}})}\n").study
    assert study is not None
    command = study.goals[0].command
    assert command is not None
    if isinstance(expected, float):
        assert value_of(command, template / "tuned", template) == expected
        return
    with pytest.raises(InputError) as failed:
        value_of(command, template / "tuned", template)
    assert expected in str(failed.value)
    assert "\n" not in str(failed.value)


def test_failing_objectives_end_in_a_line_and_the_study_keeps_what_was_done(
    folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    program = "import json,sys,pathlib,yaml; text=pathlib.Path(sys.argv[1],'recipe.yaml').read_text(); "
    program += "w=yaml.safe_load(text)['models'][0]['parameters']['weight']; "
    program += "sys.exit('too large') if w > 0.5 else print(json.dumps({'score': w}))"
    command = json.dumps({"command": {"run": [sys.executable, "-c", program, "{folder}"]}})
    write(folder, TWO + STUDY % (command, "random"))
    code, _, err = call(capsys, "search", "recipe.yaml")
    assert (code, "--allow-command" in err) == (1, True)
    code, out, err = call(capsys, "search", "recipe.yaml", "--allow-command", "--json")
    assert code == 0, err
    found = json.loads(out)
    states = [t["state"] for t in found["trials"]]
    assert {"complete", "failed"} == set(states)
    best = max((t for t in found["trials"] if t["state"] == "complete"), key=lambda t: t["objectives"][0])
    assert found["best"] == best["number"]
    assert all("exit code 1: too large" in t["error"] for t in found["trials"] if t["state"] == "failed")
    nonsense = json.dumps({"command": {"run": f"{sys.executable} -c 'print(1)' {{folder}}"}})
    write(folder, TWO + FEW % (nonsense, "random"), "nonsense")
    code, _, err = call(capsys, "search", "nonsense.yaml", "--allow-command")
    assert code == 1
    assert "trials all failed: " in err
    assert "prints no JSON object: 1" in err
    assert "Traceback" not in err
    write_json(folder / "recipe-search" / "study.db", "no database")
    code, _, err = call(capsys, "search", "recipe.yaml", "--allow-command")
    assert (code, "cannot be opened as a study" in err) == (1, True)


def test_fronts_and_ranks() -> None:
    outcomes = [Outcome((1.0, 5.0)), Outcome((2.0, 2.0)), Outcome((5.0, 1.0)), Outcome((3.0, 3.0)), Outcome(error="no")]
    assert pareto(outcomes, (True, True)) == [0, 1, 2]
    assert pareto(outcomes, (False, True)) == [2]
    assert rank(outcomes, (True, True))[0] == 1
    assert rank([Outcome((1.0,)), Outcome((2.0,))], (False,)) == [1, 0]


WHY = {
    "quantization": TWO + "output: {quantization: int8}\n",
    "no rows": TWO.replace("calibration:", "# "),
    "exact_match does not fit": TWO + "study: {objective: exact_match}\n",
    "is to be swept": TWO.replace("search: [0, 1]", "sweep: [0, 1]"),
    "no values to search": ONE % "",
    "must be in (0, 1]": TWO + "prune: {method: dare, density: {search: [0.5, 2]}}\n",
}


@pytest.mark.parametrize("said", WHY)
def test_what_cannot_be_searched_is_refused_by_name(folder: Path, said: str, capsys) -> None:
    code, _, err = call(capsys, "search", write(folder, WHY[said]))
    assert code == 1
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["search", "sweep"])
def test_the_recipe_that_ships_is_one(name: str) -> None:
    template = read_template(Path(__file__).parents[3] / "recipes" / f"{name}.yaml").template
    recipes = [loads(json.dumps(template.fill(values).data)) for values in template.examples()]
    assert len(recipes) == {"search": 5, "sweep": 5}[name]


def test_one_process_at_a_time(folder: Path) -> None:
    from deltamerge.apps.search.folder import StudyFolder
    from deltamerge.errors import OutputError

    one = StudyFolder(folder / "study")
    with one.locked(force=False), pytest.raises(OutputError, match="another process"), one.locked(force=False):
        pass
    for name, said in {"base": "holds something else", "calib.jsonl": "cannot be written"}.items():
        with pytest.raises(OutputError, match=said), StudyFolder(folder / name).locked(force=True):
            pass


SWEPT = ONE % ", prune: {method: magnitude, density: {sweep: [0.5, 0.25]}}" + (
    "study: {objective: {measure: loss}, test: calib.jsonl}\n"
)


@pytest.mark.parametrize("theirs", ["recipe.best.yaml", "recipe.best.lock"])
def test_a_sweep_leaves_a_user_s_file_where_the_best_would_go(folder: Path, capsys, theirs: str) -> None:
    path, file = write(folder, SWEPT), folder / theirs
    asked = ("sweep", path, "--device", "cpu", "-q")
    file.write_text("mine: precious\n")
    code, _, err = call(capsys, *asked)
    assert (code, f"{file}: is there, and was not written for recipe.yaml by deltamerge" in err) == (1, True), err
    assert file.read_text() == "mine: precious\n"
    assert not (folder / "recipe-sweep").exists()
    assert call(capsys, *asked, "--force")[0] == 0
    assert call(capsys, *asked)[0] == 0  # its own
    best = folder / "recipe.best.yaml"
    best.write_text(best.read_text().replace("sequences: 8", "sequences: 7"))
    (folder / "recipe.yml").write_text(SWEPT)
    changed = best.read_bytes()
    for template in (path, folder / "recipe.yml"):
        code, _, err = call(capsys, "sweep", template, "--device", "cpu", "-q", "--out", folder / "another")
        assert (code, "recipe.best.yaml: was changed since it was written, or is of another recipe" in err) == (1, True)
        assert best.read_bytes() == changed
    best.unlink()
    code, _, err = call(capsys, "sweep", folder / "recipe.yml", "--device", "cpu", "-q", "--out", folder / "another")
    assert (code, "recipe.best.lock: was changed since it was written, or is of another" in err) == (1, True), err


def test_what_somebody_writes_during_a_sweep_stays(folder: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    path, best, original = write(folder, SWEPT), folder / "recipe.best.yaml", Bench.measure

    def late(self: Bench, some: Any, part: Any, work: Path) -> Any:
        best.write_text("mine: precious\n")
        return original(self, some, part, work)

    monkeypatch.setattr(Bench, "measure", late)
    code, _, err = call(capsys, "sweep", path, "--device", "cpu", "-q")
    assert (code, "was not written for recipe.yaml" in err) == (1, True), err
    assert best.read_text() == "mine: precious\n"
    assert len((folder / "recipe-sweep" / "results.jsonl").read_text().splitlines()) == 2


def test_the_folder_of_a_study_is_one_recipe_s_and_emptied_of_its_own(folder: Path, capsys) -> None:
    path, other = write(folder, SWEPT), write(folder, SWEPT, "other")
    study = folder / "study"
    asked = ("--out", study, "--device", "cpu", "-q")
    assert call(capsys, "sweep", path, "--keep", "best", *asked)[0] == 0
    table = (study / "sweep.csv").read_bytes()
    code, _, err = call(capsys, "sweep", other, *asked)
    assert (code, "study: is of sweep recipe.yaml" in err) == (1, True), err
    for mine in (study / "notes.txt", study / "best" / "notes.txt", study / "mine" / "notes.txt"):
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("precious")
        code, _, err = call(capsys, "sweep", path, *asked, "--force")
        assert (code, "study: holds files that no study wrote: " in err) == (1, True), err
        assert mine.read_text() == "precious"
        mine.unlink()
    assert (study / "sweep.csv").read_bytes() == table
    (study / "mine").rmdir()
    assert call(capsys, "sweep", other, *asked, "--force")[0] == 0
    assert not (study / "best").exists()
