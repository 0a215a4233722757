"""Activations against float64 hooks, predicted errors against what a run loses, the decision, the recipe that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny_models
import torch
import transformers
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama, write_tokenizer
from running import make_plan, run

from deltamerge.apps.inspect.study import inspect
from deltamerge.apps.recommend.prune import CALIBRATED, PruneCandidate, Question, Recommendation, decide
from deltamerge.apps.recommend.prune import recommend_prune as recommend
from deltamerge.calibrate.q.objectives import divergence as fitted
from deltamerge.calibrate.q.subject import Subject
from deltamerge.cli import main
from deltamerge.errors import InputError, OutputError
from deltamerge.recipe.prune import choose
from deltamerge.tensors.reader import Reader

ROWS: dict[str, Any] = {"data": "calib.jsonl", "sequences": 8, "length": 12}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recommend")
    tiny_bert_pair(folder / "bert", dtype=torch.float32, sigma=0.05, tokenizer=True)
    base = tiny_llama(folder / "llama" / "base", seed=0, dtype=torch.float32)
    tiny_llama(folder / "llama" / "tuned", seed=1, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    _, tensors = tiny_models.make("GPT2LMHeadModel", folder / "gpt2" / "base")
    config = json.loads((folder / "gpt2" / "base" / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    tuned = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    make_checkpoint(folder / "gpt2" / "tuned", tuned, config=config)
    write_tokenizer(folder / "gpt2" / "tuned", 60)
    random = np.random.default_rng(4)
    for name in ("bert", "llama", "gpt2"):
        lines = [
            {"text": " ".join(f"w{n}" for n in random.integers(4, 58, 4 + i % 5)), "label": i % 2} for i in range(24)
        ]
        (folder / name / "calib.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def subject(folder: Path, held: bool = False) -> list[dict[str, torch.Tensor]]:
    """The rows that are searched on, or held out, as the model takes them."""
    path = folder / "rows.yaml"
    path.write_text(
        "base_model: ./base\nmodels: [{model: ./tuned, prune: {method: magnitude, density: 0.1, q: output_change}}]\n"
        f"calibration: {json.dumps(ROWS)}\n"
    )
    with Reader() as reader:
        ((stage, spec),) = make_plan(path, device="cpu").specs.items()
        one = Subject(spec.source, *spec.models(stage.inputs), reader)
        return [dict(inputs) for inputs in one.batches["held" if held else "search"].inputs]


def load(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of_layers(folder: Path) -> dict[str, np.ndarray]:
    """(tokens, n) float64 inputs of every linear layer of the fine-tune, by its weight's name."""
    seen: dict[str, list[np.ndarray]] = {}
    model = load(folder / "tuned")
    keep: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def hook(_: Any, args: Any, key: str = f"{name}.weight") -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                mask = keep[-1].reshape(-1)
                x = x[mask.bool()] if len(mask) == len(x) else x
                seen.setdefault(key, []).append(x.double().numpy())

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in subject(folder):
            keep.append(batch["attention_mask"])
            model(**batch)
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_influence_is_that_of_float64(models, monkeypatch, family):
    folder = models / family
    monkeypatch.chdir(folder)
    density = 0.05
    found = inspect("./tuned", "./base", calibration=ROWS, density=density).activations
    assert found is not None
    base, tune, inputs = load_tensors(folder / "base"), load_tensors(folder / "tuned"), inputs_of_layers(folder)
    assert len(found.layers) >= 12
    p = 1 - density
    phi, log = (1 - 2 * p) / np.log((1 - p) / p), np.log(2 / 0.05)
    for one in found.layers:
        delta = (tune[one.name].double() - base[one.name.removeprefix("bert.")].double()).numpy()
        x = inputs[one.name]
        c = delta[None] * x[:, None]
        a, d = ((x @ delta.T) ** 2).mean(0), (c**2).sum(2).mean(0)
        wanted = {
            "mean_abs_delta": np.abs(delta).mean(),
            "mean_abs_influence": np.abs(c).mean(),
            "influence": np.abs(c.mean((0, 2))).mean(),
            "influence_variance": ((c**2).mean((0, 2)) - c.mean((0, 2)) ** 2).mean(),
            "change": np.sqrt(a.mean()),
            "coherence": d.sum() / a.sum(),
            "bound": np.sqrt((phi * log * d).mean()) / density,
            "typical": np.sqrt((2 * p / density * log * d).mean()),
            "dare_error": p / density * d.sum() / a.sum(),
            "least_squares_q": min(1, density + p * d.sum() / a.sum()),
        }
        for key, value in wanted.items():
            assert getattr(one, key) == pytest.approx(value, rel=2e-4, abs=1e-8), (one.name, key)
        assert one.least_squares_error == pytest.approx(1 - density / one.least_squares_q)
        assert one.tokens == len(x)
        order = np.argsort(-np.abs(x).mean(0), kind="stable")[:3]
        assert [m.feature for m in one.massive] == sorted(order.tolist())
    assert found.total.coherence == pytest.approx(np.mean([one.coherence for one in found.layers]))


def test_weights_stored_the_other_way_have_influence_but_no_wanda(models, monkeypatch):
    monkeypatch.chdir(models / "gpt2")
    found = inspect("./tuned", "./base", calibration=ROWS)
    assert found.activations is not None
    assert len(found.activations.layers) == 12
    answer = recommend("./tuned", "./base", 0.1, calibration=ROWS)
    assert "wanda" not in {one.name for one in answer.candidates}
    assert {"dare", "magnitude_q"} <= {one.name for one in answer.candidates}


def random_pair(folder: Path, sigma: float) -> tuple[str, str]:
    _, tensors = tiny_models.make("ViTForImageClassification", folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    tuned = {n: t + sigma * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    make_checkpoint(folder / "tuned", tuned, config=config)
    return str(folder / "tuned"), str(folder / "base")


@pytest.mark.parametrize(("sigma", "large"), [(1e-3, False), (5e-2, True)])
def test_without_data_importance_sampling_whatever_the_size_of_the_delta(tmp_path, sigma, large):
    model, base = random_pair(tmp_path, sigma)
    answer = recommend(model, base, 0.05, out=tmp_path / "r.yaml")
    assert answer.method == "importance_sampling"
    (chosen,) = (one for one in answer.candidates if one.name == answer.method)
    assert chosen.prune == choose(0.05, rows=False).prune
    assert answer.evidence.large == large
    assert answer.paper.method == ("wanda" if large else "darex_q")
    assert f"the delta is {'large' if large else 'small'} for this density" in answer.why[1]
    theirs = load_tensors(tmp_path / "base")
    delta = {
        n: (t.double() - theirs[n].double()).numpy()
        for n, t in load_tensors(tmp_path / "tuned").items()
        if "classifier" not in n
    }
    energy = sum(float((d**2).sum()) for d in delta.values())
    sampled = 0.0
    for d in delta.values():
        sampled += float(np.sum(d**2 * (1 / reference.keep_probability(d, 0.05) - 1)))
    kept = sum(float((reference.magnitude(d, 0.05) ** 2).sum()) for d in delta.values())
    wanted = {
        "dare": 19.0,
        "darex_q": 0.95,
        "importance_sampling": sampled / energy,
        "importance_sampling_q": sampled / energy / (1 + sampled / energy),
        "magnitude": 1 - kept / energy,
        "magnitude_q": 1 - kept / energy,
        "wanda": None,
        "wanda_q": None,
    }
    assert [one.name for one in answer.candidates] == list(wanted)
    for one in answer.candidates:
        assert one.delta_error == (None if wanted[one.name] is None else pytest.approx(wanted[one.name], rel=1e-2))
        assert (one.layer_error, one.lost, one.metric, one.q) == (None, None, None, None)
    assert (tmp_path / "r.yaml").read_text() == answer.recipe
    merged = load_tensors(run(tmp_path / "r.yaml", tmp_path / "out").folder)
    assert merged.keys() == theirs.keys()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_a_mask_loses_is_what_its_run_loses(models, monkeypatch, tmp_path, family):
    """How far plain masks' predictions are, computed again from the checkpoints that their recipes write."""
    folder = models / family
    monkeypatch.chdir(folder)
    answer = recommend("./tuned", "./base", 0.2, calibration=ROWS)
    batches = subject(folder, held=True)
    assert answer.evidence.held_out == sum(len(batch["input_ids"]) for batch in batches)

    def outputs(at: Path) -> torch.Tensor:
        rows = []
        with torch.no_grad():
            model = load(at)
            for batch in batches:
                logits = model(**batch).logits
                rows.append(logits if logits.dim() == 2 else logits[batch["attention_mask"].bool()])
        return torch.cat(rows).double().log_softmax(-1)

    truth = outputs(folder / "tuned")

    def divergence(at: Path) -> float:
        logs = outputs(at)
        if family == "llama":  # over the 64 likeliest tokens and the rest

            def grouped(values: torch.Tensor) -> torch.Tensor:
                top = values.gather(-1, truth.topk(64).indices)
                return torch.cat([top, (1 - top.exp().sum(-1, keepdim=True)).log()], -1)

            return float((grouped(truth).exp() * (grouped(truth) - grouped(logs))).sum(-1).mean())
        return fitted(logs.numpy(), truth.numpy())

    def model(name: str, prune: dict[str, Any]) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"base_model: {folder / 'base'}\nmodels: [{{model: {folder / 'tuned'}, name: tuned, "
            f"prune: {json.dumps(prune)}}}]\n"
        )
        return run(path, tmp_path / name).folder

    # nothing kept: a density that rounds to no entry leaves the base and the fine-tune's head
    nothing = divergence(model("nothing", {"method": "magnitude", "density": 1e-6}))
    for one in answer.candidates:
        if one.name in ("dare", "importance_sampling", "magnitude"):
            lost = divergence(model(one.name, one.prune)) / nothing
            assert one.lost == pytest.approx(lost, rel=2e-3), one.name


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "llama"])
def test_the_recommended_recipe_runs_where_it_was_written(models, monkeypatch, capsys, family):
    folder = models / family
    monkeypatch.chdir(folder)
    (folder / "elsewhere").mkdir()
    label = ["--label", "label"] if family == "bert" else []
    arguments = ["recommend", "./tuned", "--base", "./base", "--density", "0.05", "--calibration", "calib.jsonl",
                 "--sequences", "8", "--length", "12", "--out", "elsewhere/r.yaml", *label]  # fmt: skip
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert (leaving.value.code, err) == (0, "elsewhere/r.yaml: written\n")
    answer = Recommendation.model_validate_json(out)
    assert answer.method in {one.name for one in answer.candidates}
    assert all(one.lost is not None and one.lost >= 0 for one in answer.candidates)
    assert (answer.evidence.metric == "accuracy") == (family == "bert")
    assert "base_model: ../base" in answer.recipe
    assert run(folder / "elsewhere" / "r.yaml", folder / "elsewhere" / "out").folder.is_dir()
    with pytest.raises(OutputError, match="exists"):
        recommend("./tuned", "./base", 0.05, out=folder / "elsewhere" / "r.yaml")
    # every candidate is a recipe
    for one in answer.candidates:
        path = folder / "one.yaml"
        path.write_text(
            f"base_model: ./base\nmodels: [{{model: ./tuned, prune: {json.dumps(one.prune)}}}]\n"
            f"calibration: {json.dumps(ROWS)}\n"
        )
        assert make_plan(path, device="cpu").outputs
    with pytest.raises(SystemExit):
        main(arguments[:6])
    out, _ = capsys.readouterr()
    assert "→ " not in out  # without rows the mask with the least error of the delta is not the one advised
    assert "sampling: magnitude" in out
    assert "the paper" in out


def candidates(**lost: float) -> list[PruneCandidate]:
    names = [name for mask, calibrated in CALIBRATED.items() for name in (mask, calibrated)]
    values = dict.fromkeys(names, 0.9) | lost
    fields = {"delta_error": None, "layer_error": None, "metric": None, "q": None}
    return [PruneCandidate(name=n, prune={}, needs_calibration=False, lost=v, **fields) for n, v in values.items()]


@pytest.mark.parametrize(
    ("lost", "method"),
    [
        # sentiment and intensity of shared/data at density 0.01, as `recommend` measured them
        ({"dare": 0.873, "importance_sampling_q": 0.338, "magnitude_q": 0.278, "wanda_q": 0.329}, "magnitude_q"),
        ({"dare": 0.404, "importance_sampling": 0.133, "magnitude_q": 0.101, "wanda_q": 0.118}, "magnitude_q"),
        ({"dare": 0.05, "magnitude_q": 0.01}, "dare"),
        ({"dare": 0.3, "importance_sampling": 0.08, "magnitude_q": 0.07}, "importance_sampling"),
        ({"magnitude_q": 0.5, "wanda_q": 0.2}, "wanda_q"),
    ],
)
def test_the_decision(tmp_path, lost, method):
    answer = recommend(*random_pair(tmp_path, 0.05), 0.05)
    chosen, why = decide(answer.evidence, candidates(**lost), 0.05)
    assert chosen == method
    assert why


def test_the_papers_answer_follows_labels_and_architecture(models, monkeypatch):
    from deltamerge.apps.recommend.prune import paper

    monkeypatch.chdir(models / "llama")
    evidence = recommend("./tuned", "./base", 0.9).evidence
    small, large = (evidence.model_copy(update={"large": large}) for large in (False, True))
    assert paper(Question("m", "b", 0.1, decoder=True, labelled=False), large).prune["method"] == "wanda"
    q = {
        (decoder, labelled): paper(Question("m", "b", 0.1, decoder, labelled), small).prune["q"]
        for decoder in (False, True)
        for labelled in (False, True)
    }
    assert q[False, True] == {"objective": "validation", "scope": "layer"}
    assert q[True, False] == {"objective": "output_change", "scope": "global"}


def test_what_cannot_be_recommended_is_said(models, monkeypatch, capsys):
    monkeypatch.chdir(models / "bert")
    with pytest.raises(InputError, match="no field 'body'"):
        recommend("./tuned", "./base", 0.1, calibration=ROWS | {"text": "body"})
    with pytest.raises(InputError, match="no such file"):
        inspect("./tuned", "./base", calibration=ROWS | {"data": "absent.jsonl"})
    for arguments in (["--density", "1.5"], ["--density", "0.1", "--label", "label"]):
        with pytest.raises(SystemExit) as leaving:
            main(["recommend", "./tuned", "--base", "./base", *arguments])
        assert leaving.value.code == 2
    capsys.readouterr()


@pytest.mark.slow
def test_real_fine_tunes_without_data(shared_data):
    for name in ("sentiment", "intensity"):
        model, base = str(shared_data / name), str(shared_data / "base")
        for density in (0.1, 0.01):
            answer = recommend(model, base, density)
            assert answer.method == "importance_sampling"
            assert any("--calibration" in why for why in answer.why) == (density == 0.01)


@pytest.mark.slow
def test_a_real_fine_tune_on_plain_english(shared_data, tmp_path, monkeypatch):
    docs = Path(__file__).parents[2] / "docs"
    lines = [line for file in sorted(docs.rglob("*.md")) for line in file.read_text().splitlines()]
    (tmp_path / "lines.txt").write_text("\n".join(line for line in lines if line[:1].isalpha() and len(line) > 60))
    monkeypatch.chdir(tmp_path)
    rows = {"data": "lines.txt", "sequences": 24, "length": 40}
    answer = recommend(str(shared_data / "sentiment"), str(shared_data / "base"), 0.01, calibration=rows)
    assert answer.method == "magnitude_q"
