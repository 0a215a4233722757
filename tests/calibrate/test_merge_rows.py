"""Merges that measure rows of every model's own, beside a plain walk with hooks in float64."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from calibration_rows import rows
from conftest import load_tensors, make_checkpoint, tiny_bert_pair, tiny_llama
from running import make_plan, run
from safetensors.numpy import load_file
from safetensors.torch import save_file

from deltamerge.calibrate.merge import coefficients
from deltamerge.calibrate.model import candidates
from deltamerge.calibrate.model.candidates import ReadDelta, combined
from deltamerge.calibrate.q.variations import MixedRows
from deltamerge.calibrate.values import Spooled, of_tensor
from deltamerge.engine.execute import shared_values
from deltamerge.errors import InputError, RecipeError
from deltamerge.tensors.tiles import Kept


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A base and two fine-tunes; each fine-tune's rows use words of its own."""
    folder = tmp_path_factory.mktemp("rows")
    base = tiny_llama(folder / "base", seed=0, dtype=torch.float32, tokenizer=True)
    for seed, name in enumerate("ab", 1):
        tiny_llama(folder / name, seed=seed, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
        lines = [
            " ".join(f"w{4 + 45 * (seed - 1) + (7 * i + 3 * j) % 45}" for j in range(3 + i % 6)) for i in range(30)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder


def recipe(folder: Path, name: str, method: str, more: str = "", parameters: str = "", shared: str = "") -> Path:
    path = folder / f"{name}.yaml"
    own = "{data: %s.jsonl, sequences: 6, length: 12%s}"
    listed = "".join(
        f"  - {{model: ./{m}, parameters: {{weight: {w}}}, calibration: {own % (m, shared)}}}\n"
        for m, w in WEIGHTS.items()
    )
    path.write_text(
        f"base_model: ./base\nmerge_method: {method}\nmodels:\n{listed}parameters: {{{parameters}}}\n{more}"
    )
    return path


WEIGHTS = {"a": 1.0, "b": 2.0}


def hooked(model: Any, batches: list[dict[str, torch.Tensor]], wanted: Any) -> dict[str, np.ndarray]:
    """E[x xᵀ] over real tokens of the linear layers whose names are wanted."""
    sums: dict[str, np.ndarray] = {}
    count = 0

    def hook(name: str, mask: torch.Tensor) -> Any:
        def see(module: Any, args: Any) -> None:
            x = args[0][mask].double().numpy()
            sums[name] = sums.get(name, 0) + x.T @ x

        return see

    for batch in batches:
        mask = batch["attention_mask"].bool()
        handles = [
            module.register_forward_pre_hook(hook(f"{name}.weight", mask))
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and wanted(name)
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        count += int(mask.sum())
    return {name: total / count for name, total in sums.items()}


def expected(folder: Path, plan: Any, method: str) -> dict[str, np.ndarray]:
    """The merged tensors, from transformers' own forward of whole models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltamerge.calibrate.rows.splits import split

    base = {name: tensor.double() for name, tensor in load_tensors(folder / "base").items()}
    tunes = [{n: t.double() for n, t in load_tensors(folder / name).items()} for name in WEIGHTS]
    weights, deltas = list(WEIGHTS.values()), {n: [(t[n] - b).numpy() for t in tunes] for n, b in base.items()}

    def mean(some: list[np.ndarray]) -> np.ndarray:
        return sum(w * d for w, d in zip(weights, some, strict=True)) / sum(weights)

    merged = {n: b + torch.from_numpy(mean(deltas[n])) for n, b in base.items()}
    batches = []
    for name, source in zip(WEIGHTS, plan.sources, strict=True):
        config = json.loads((folder / name / "config.json").read_text())
        search, _ = split(source.calibration, folder, 0, config, labelled=False)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        batches.append([
            tokenizer(row.content, truncation=True, max_length=12, return_tensors="pt", return_token_type_ids=False)
            for row in search
        ])  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    blocks = range(model.config.num_hidden_layers)
    for block in [None] if method == "regmean" else blocks:
        grams = []
        for tune, some in zip(tunes, batches, strict=True):
            mine = f"layers.{block}."
            state = tune if block is None else {n: tune[n] if mine in n else t for n, t in merged.items()}
            model.load_state_dict({n: t.float() for n, t in state.items()}, strict=False)
            grams.append(hooked(model, some, lambda name, mine="layers" if block is None else mine: mine in name))
        for name in grams[0]:
            found = reference.regmean(deltas[name], [g[name] for g in grams], weights)
            merged[name] = base[name] + torch.from_numpy(found)
    return {name: tensor.numpy() for name, tensor in merged.items()}


@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
def test_regmean_equals_a_plain_walk(models: Path, tmp_path: Path, method: str) -> None:
    path = recipe(models, method, method)
    wanted = expected(models, make_plan(path), method)
    folder = run(path, tmp_path / "out", workers=2).folder
    got = load_tensors(folder)
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        error = np.abs(tensor.double().numpy() - wanted[name]).max()
        assert error < 2e-5, (name, error)
    half = recipe(models, f"{method}-half", method, shared=", precision: bfloat16")
    again = run(half, tmp_path / "again", workers=1).folder
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not list((tmp_path).glob(".*"))


def test_rows_are_needed(models: Path) -> None:
    path = recipe(models, "lacking", "regmean")
    path.write_text(path.read_text().replace(", calibration: {data: b.jsonl, sequences: 6, length: 12}", ""))
    with pytest.raises(RecipeError, match="regmean needs rows of every model"):
        make_plan(path)


@pytest.mark.parametrize("shape", [(), (5, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "sparse", "slabs", "read"])
def test_the_gradient_of_a_sum_of_deltas(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], kind: str) -> None:
    """That of the written-out sum, in float64; of a large delta, slab by slab."""
    sparse, shown = kind == "sparse", []
    cut = kind in ("slabs", "read")
    monkeypatch.setattr(candidates, "SLAB", 8 if cut else 1 << 22)
    slabs = candidates._slabs
    monkeypatch.setattr(candidates, "_slabs", lambda *given: shown.append([*slabs(*given)]) or iter(shown[-1]))
    generator = torch.Generator().manual_seed(3)
    base, *deltas = (torch.randn(5, 4, generator=generator) for _ in range(4))
    deltas = [torch.where(delta > 0, delta, 0.0) for delta in deltas]
    factors = torch.randn(3, *shape, generator=generator)
    pull = torch.randn(5, 4, generator=generator)
    places = [delta.reshape(-1).nonzero()[:, 0] for delta in deltas]
    masked = [Kept(at, d.reshape(-1)[at]) for at, d in zip(places, deltas, strict=True)] if sparse else deltas
    if kind == "read":
        masked = [ReadDelta(d.shape, lambda start, stop, d=d: d.reshape(-1)[start:stop].clone()) for d in deltas]
    ours, plain = factors.clone().requires_grad_(True), factors.double().requires_grad_(True)
    made = combined(base, ours, masked)
    wanted = base.double() + sum(c * d.double() for c, d in zip(plain, deltas, strict=True))
    torch.testing.assert_close(made.double(), wanted, rtol=1e-6, atol=1e-6)
    made.backward(pull)
    wanted.backward(pull.double())
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=1e-5, atol=1e-5)
    assert {len(some) for some in shown} == ({3} if cut else set() if sparse and not shape else {1})


FITTED = "calibration: {data: a.jsonl, per: merge, coefficients: %s, sequences: 8, length: 12}\n"
FITS = {
    "layer": ("task_arithmetic", "lambda: 0.1", "prune: {method: magnitude, density: 0.5}\n"),
    "row": ("task_arithmetic", "lambda: 0.1", "prune: {method: dare, density: 0.6}\n"),
    "model": ("iso_c", "lambda: 0.05", ""),
}


@pytest.mark.parametrize("scope", FITS)
def test_coefficients_are_fitted_and_kept(models: Path, tmp_path: Path, scope: str) -> None:
    """The result is the sum of the recipe's own deltas times what the lock says, and the lock gives it again."""
    method, parameters, prune = FITS[scope]
    path = recipe(models, f"fitted-{scope}", method, FITTED % scope + prune, parameters)
    (stage,) = make_plan(path).describe()["stages"]
    assert (stage["model"], stage["scope"], stage["forward_passes"]) == ("merge", scope, 60)
    result = run(path, tmp_path / "out")
    found = result.lock["calibration"]["merge"]
    assert found["chosen"] == "calibrated", found["why"]
    assert found["held_out"]["calibrated"] < found["held_out"]["plain"]
    assert found["forward_passes"] <= 60
    assert "share of the base's" in found["held_out"]["measure"]
    folder, numbers = result.folder, dict(found["q"])
    if scope == "row":
        numbers |= {n.removeprefix("merge:"): v for n, v in load_file(folder / "recipe.rows").items()}
    base = {name: tensor.numpy() for name, tensor in load_tensors(models / "base").items()}
    alone = {}
    for name in WEIGHTS:  # each model's part of the sum, made without calibration
        plain = method == "task_arithmetic"
        one = recipe(models, "alone", "task_arithmetic", prune, parameters if plain else "")
        text = one.read_text()
        for m, weight in WEIGHTS.items():
            own = (weight if plain else 1.0) if m == name else 0.0
            text = text.replace(f"./{m}, parameters: {{weight: {weight}}}", f"./{m}, parameters: {{weight: {own}}}")
        one.write_text(text)
        alone[f"./{name}"] = run(one, tmp_path / name).folder
    if method == "iso_c":
        one = recipe(models, "alone", method, prune, parameters)
        alone["merged"] = run(one, tmp_path / "merged").folder
    parts = {delta: load_tensors(made) for delta, made in alone.items()}
    for name, tensor in load_tensors(folder).items():
        wanted = base[name].astype(float)
        for delta, made in parts.items():
            factor = numbers.get(f"{delta}:{name}")
            assert factor is not None, (delta, name)
            wanted = wanted + factor * (made[name].double().numpy() - base[name])
        np.testing.assert_allclose(tensor.double().numpy(), wanted, atol=2e-6, err_msg=name)
    for kept in folder.glob("recipe.*[ks]"):
        shutil.copy(kept, path.with_suffix(kept.suffix))
    again = run(path, tmp_path / "again", locked=True).folder
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    card = (folder / "README.md").read_text()
    assert "multiplied by its coefficient" in card


@pytest.fixture(scope="module")
def classifiers(models: Path, tmp_path_factory) -> Path:
    """A base and two fine-tunes with a head of three classes, which reads the first token through its own layer."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    folder = tmp_path_factory.mktemp("classifiers")
    config = DistilBertConfig(
        vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=2, num_labels=3, pad_token_id=0, initializer_range=0.5
    )
    torch.manual_seed(5)
    model = DistilBertForSequenceClassification(config).eval()
    for name in ("base", *WEIGHTS):
        model.save_pretrained(folder / name)
        for file in models.glob(f"{name}/*token*"):
            shutil.copy(file, folder / name)
        model.load_state_dict({n: t + 0.2 * torch.randn(t.shape) for n, t in load_tensors(folder / "base").items()})
    for file in models.glob("*.jsonl"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(("scope", "of"), [("model", "models"), ("row", "models"), ("row", "classifiers")])
def test_who_shares_weights_changes_no_coefficient(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, scope: str, of: str
) -> None:
    """Rows of all models at once, gradients that are summed before they reach the coefficients, and those that reach
    them one by one are the same sums. Weights are made in fewer calls."""
    from deltamerge.calibrate.merge import coefficients
    from deltamerge.calibrate.spec import Spec

    found, calls, models = [], [], request.getfixturevalue(of)
    weights = coefficients._Merge.weights
    for together, shares in ((True, False), (False, True), (False, False)):
        path = recipe(models, "shared", "task_arithmetic", FITTED % scope, "lambda: 0.1")
        plan = make_plan(path)
        ((stage, spec),) = plan.specs.items()
        assert spec.runs_together
        assert not spec.shares_weights
        more = dataclasses.replace(spec, parts=(*spec.parts, spec.parts[-1]))  # one walks at a time
        assert more.memory - spec.memory == more._states_bytes - spec._states_bytes
        monkeypatch.setattr(Spec, "runs_together", property(lambda _, together=together: together))
        if not together:
            assert spec.shares_weights
            assert spec.memory - dataclasses.replace(spec, coefficients=()).memory == 8 * sum(
                np.prod(one.shape) for one in spec.pruned
            )
        monkeypatch.setattr(Spec, "shares_weights", property(lambda _, shares=shares: shares))
        count: list[int] = []
        monkeypatch.setattr(
            coefficients._Merge, "weights", lambda *given, count=count: count.append(1) or weights(*given)
        )
        found.append(shared_values([stage], {})[stage])
        calls.append(len(count))
        monkeypatch.undo()
    assert found[0].record["forward_passes"] == found[2].record["forward_passes"]
    assert calls[0] <= 0.6 * calls[2]
    first, *more = ([loss for *_, loss in one.record["path"]] for one in found)
    assert len(first) > 2
    for losses in more:
        assert losses == pytest.approx(first, rel=1e-3)
    ours, *others = (one.q for one in found)
    assert ours or of == "classifiers"  # whose held-out rows are not answered better
    for theirs in others:
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_coefficients_in_bfloat16(models: Path) -> None:
    """Products and kept deltas of bfloat16 lead to a merge as near to the fine-tunes, by other bits."""
    found = {}
    for precision in ("float32", "bfloat16"):
        shared = f", precision: {precision}"
        path = recipe(models, "half", "task_arithmetic", FITTED % "row", "lambda: 0.1", shared)
        ((stage, spec),) = make_plan(path).specs.items()
        assert spec.halved == (precision == "bfloat16")
        found[precision] = shared_values([stage], {})[stage]
    exact, half = found["float32"], found["bfloat16"]
    assert half.record["chosen"] == exact.record["chosen"] == "calibrated"
    near, far = (exact.record["held_out"][key] for key in ("calibrated", "plain"))
    assert half.record["held_out"]["plain"] == pytest.approx(far, rel=0.02)
    assert half.record["held_out"]["calibrated"] == pytest.approx(near, abs=0.1 * (far - near))
    assert any(np.any(value != exact.q[name]) for name, value in half.q.items())


def test_deltas_that_files_give_are_read_anew(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, some rows at a time. The plan counts what the method makes alone."""
    from deltamerge.calibrate.q import subject

    path = recipe(models, "anew", "iso_c", FITTED % "model", "lambda: 0.05", ", precision: bfloat16")
    ((stage, spec),) = make_plan(path).specs.items()
    assert spec.differences == len(WEIGHTS)
    entries = sum(np.prod(one.shape) for one in spec.pruned)
    less = dataclasses.replace(spec, differences=0).memory - spec.memory
    assert less == pytest.approx(2 * len(WEIGHTS) * entries, abs=1)
    monkeypatch.setattr(candidates, "SLAB", 256)
    found, lengths, files, read = [], [list[int](), list[int]()], set(), subject.entries
    for reads in lengths:

        def noted(reader: Any, info: Any, start: int, stop: int, reads: list[int] = reads) -> torch.Tensor:
            reads.append(stop - start)
            files.add(info.path.parent.name)
            return read(reader, info, start, stop)

        monkeypatch.setattr(subject, "entries", noted)
        found.append(shared_values([stage], {})[stage])
        monkeypatch.setattr(subject, "is_difference", lambda node: False)
    assert found[0].q
    assert found[0].q == pytest.approx(found[1].q, rel=1e-3)  # deltas that are kept are rounded
    assert len(lengths[0]) > 100
    assert max(lengths[0]) <= 256
    assert not lengths[1]
    assert files == set(WEIGHTS)  # the base is there already


def test_coefficients_are_of_the_merged_model(models: Path) -> None:
    path = recipe(models, "alone", "task_arithmetic", (FITTED % "layer").replace("per: merge, ", ""))
    with pytest.raises(RecipeError, match="coefficients: are of the merged model\nhint: per: merge"):
        make_plan(path)


def of_base(path: Path, calibration: str = "{data: ./base.jsonl, sequences: 12, length: 12, weight: 2}") -> Path:
    """List the base with rows of words of both fine-tunes."""
    lines = [" ".join(f"w{5 + (11 * i + 13 * j) % 90}" for j in range(4 + i % 7)) for i in range(40)]
    path.with_name("base.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    listed = f"models:\n  - {{model: ./base, calibration: {calibration}}}\n"
    path.write_text(path.read_text().replace("models:\n", listed))
    return path


def test_rows_of_the_base_count_as_one_model_more(models: Path, tmp_path: Path) -> None:
    """The first figure is the mean of distances in float64: of each fine-tune a share of the base's, and of the base a
    share of the fine-tunes' mean one. The fit stays nearer to the base there than a fit without these rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deltamerge.calibrate.rows.splits import select, split

    path = of_base(recipe(models, "keeps", "task_arithmetic", FITTED % "layer", "lambda: 0.5"))
    plan, kept = make_plan(path), run(path, tmp_path / "kept")
    without = run(recipe(models, "keeps-nothing", "task_arithmetic", FITTED % "layer", "lambda: 0.5"), tmp_path / "not")
    found = kept.lock["calibration"]["merge"]
    assert found["models"] == ["./a", "./b", "./base"]
    assert found["chosen"] == "calibrated", found["why"]
    assert "of the base as a share of theirs" in found["held_out"]["measure"]
    assert sorted(kept.lock["inputs"]) == sorted([*without.lock["inputs"], "calibration data of ./base"])

    model = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(models / "base")
    states = {name: {n: t.double() for n, t in load_tensors(models / name).items()} for name in ("base", *WEIGHTS)}
    start = {n: b + 0.5 * sum(w * (states[m][n] - b) for m, w in WEIGHTS.items()) for n, b in states["base"].items()}
    done = [{n: t.double() for n, t in load_tensors(one.folder).items()} for one in (kept, without)]

    def distances(own: Any, others: list[Any], texts: list[str]) -> list[float]:
        sums, count = [0.0] * len(others), 0
        for text in texts:
            batch = tokenizer(text, truncation=True, max_length=12, return_tensors="pt", return_token_type_ids=False)
            logits = []
            for state in (own, *others):
                model.load_state_dict(state, strict=False)
                with torch.no_grad():
                    logits.append(model(**batch).logits[0].numpy())
            more = [float(reference.token_divergence(some, logits[0]).sum()) for some in logits[1:]]
            sums = [one + own for one, own in zip(sums, more, strict=True)]
            count += len(logits[0])
        return [one / count for one in sums]

    shares, held = [], []
    for name, source in zip((*WEIGHTS, "base"), plan.sources, strict=True):
        config = json.loads((models / name / "config.json").read_text())
        search, held = split(source.calibration, models, 0, config, labelled=False)
        texts = [row.content for row in select(search, max(1, round(0.2 * len(search))), 1)]
        if name == "base":
            ours, *theirs = distances(states[name], [start, *(states[m] for m in WEIGHTS)], texts)
            shares.append(ours / float(np.mean(theirs)))
        else:
            ours, bases = distances(states[name], [start, states["base"]], texts)
            shares.append(ours / bases)
    a, b, kept_share = shares
    assert found["path"][0][-1] == pytest.approx((a + b + 2 * kept_share) / 4, rel=1e-3)
    near, far = distances(states["base"], done, [row.content for row in held])
    assert near < 0.9 * far


def test_rows_of_the_base_stand_where_coefficients_are_fitted(models: Path, encoders: Path) -> None:
    plain = of_base(recipe(models, "plain", "ties", "", "density: 0.5"))
    with pytest.raises(RecipeError, match=r"models\[0\].calibration: rows of the base have an effect where coeff"):
        make_plan(plain)
    nothing = of_base(recipe(models, "nothing", "task_arithmetic", FITTED % "layer"), "{sequences: 4}")
    with pytest.raises(RecipeError, match=r"models\[0\].calibration: needs data"):
        make_plan(nothing)
    loss = of_base(recipe(models, "loss", "task_arithmetic", FITTED % "layer", shared=", metric: loss"))
    with pytest.raises(RecipeError, match="rows of the base do not go with a metric"):
        make_plan(loss)
    heavy = recipe(models, "heavy", "task_arithmetic", FITTED % "layer", shared=", weight: 2")
    with pytest.raises(RecipeError, match=r"models\[0\].calibration.weight: is of the base, where it is listed"):
        make_plan(heavy)
    with pytest.raises(InputError, match="rows of the base: BertModel answers with no tokens"):
        make_plan(of_base(recipe(encoders, "heads", "task_arithmetic", FITTED % "layer")))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> Path:
    """A base, and two fine-tunes of two labels."""
    folder = tmp_path_factory.mktemp("encoders")
    tiny_bert_pair(folder, dtype=torch.float32, sigma=0.05, tokenizer=True)
    shutil.copytree(folder / "tuned", folder / "a")
    tensors = load_tensors(folder / "tuned")
    generator = torch.Generator().manual_seed(9)
    make_checkpoint(folder / "b", {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "tuned" / file, folder / "b" / file)
    for name in "ab":
        rows(folder / f"{name}.jsonl")
    return folder


def answers(model: Any, logits: torch.Tensor, batch: Any) -> list[tuple[float, torch.Tensor]]:
    """(weight, log-likelihood) of a row: of its own text, or of each class."""
    if logits.dim() == 3:
        logs = logits[0, :-1].log_softmax(-1)
        return [(1.0, logs[range(len(logs)), batch["input_ids"][0, 1:]].sum())]
    logs = logits[0].log_softmax(-1)
    return [(float(value.detach().exp()), value) for value in logs]


@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_fisher_equals_plain_gradients(request, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from deltamerge.calibrate.rows.splits import split

    folder = request.getfixturevalue("models" if kind == "causal" else "encoders")
    path = recipe(folder, "fisher", "fisher")
    plan = make_plan(path)
    loader = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    base = {n: t.double().numpy() for n, t in load_tensors(folder / "base").items()}
    deltas: dict[str, list[np.ndarray]] = {n: [] for n in base}
    squares = []
    for name, source in zip(WEIGHTS, plan.sources, strict=True):
        model = loader.from_pretrained(folder / name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        search, _ = split(source.calibration, folder, 0, config, labelled=False)
        found: dict[str, np.ndarray] = {}
        for row in search:
            batch = tokenizer(row.content, truncation=True, max_length=12, return_tensors="pt")
            if kind == "causal":
                batch.pop("token_type_ids", None)
            for weight, term in answers(model, model(**batch).logits, batch):
                model.zero_grad()
                term.backward(retain_graph=True)
                for n, p in model.named_parameters():
                    n = n if n in base else n.removeprefix("bert.")
                    if p.grad is not None and n in base:
                        found[n] = found.get(n, 0) + weight * p.grad.double().numpy() ** 2 / len(search)
        squares.append(found)
        for n, tensor in load_tensors(folder / name).items():
            n = n if n in base else n.removeprefix("bert.")
            if n in base:
                deltas[n].append(tensor.double().numpy() - base[n])
    wanted = reference.fisher(deltas, squares, list(WEIGHTS.values()))
    got = load_tensors(run(path, tmp_path / "out", workers=2).folder)
    for n, tensor in got.items():
        n = n if n in base else n.removeprefix("bert.")
        if n in base:
            error = np.abs(tensor.double().numpy() - base[n] - wanted[n]).max()
            assert error < 2e-3 * np.abs(wanted[n]).max(), (n, error)
    assert not list(tmp_path.glob(".*"))


def test_fisher_of_gradients_that_are_no_numbers(models: Path, tmp_path: Path) -> None:
    """One line for gradients that are not finite; where all squares are too small for float32 nothing is divided."""
    shutil.copytree(models, tmp_path / "models")
    broken = load_tensors(tmp_path / "models" / "a")
    broken["model.norm.weight"][0] = torch.nan
    save_file(broken, tmp_path / "models" / "a" / "model.safetensors", metadata={"format": "pt"})
    path = recipe(tmp_path / "models", "broken", "fisher")
    with pytest.raises(InputError, match="the gradients of its answers are not finite"):
        run(path, tmp_path / "out", allow_nonfinite=True)
    np.zeros(4, np.float32).tofile(tmp_path / "squares")
    squares = Spooled(tmp_path, {("w", 0): tmp_path / "squares"}, {0: 1e-60})
    assert of_tensor(squares, name="w").part(0, 0, 4) is None


def test_states_that_heads_read_count_as_much_as_outputs(encoders: Path) -> None:
    """A look is the mean over fine-tunes of divergence and of change of states, each as a share of the base's."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from deltamerge.calibrate.rows.splits import select, split

    plan = make_plan(recipe(encoders, "states", "task_arithmetic", FITTED % "layer", "lambda: 0.1"))
    ((stage, spec),) = plan.specs.items()
    base = load_tensors(encoders / "base")

    def named(folder: Path) -> dict[str, torch.Tensor]:
        return {n.removeprefix("bert."): t for n, t in load_tensors(folder).items()}

    tunes = {name: named(encoders / name) for name in WEIGHTS}
    merged = {n: b + sum(0.1 * w * (tunes[m][n] - b) for m, w in WEIGHTS.items()) for n, b in base.items()}
    wanted = []
    for name, part in zip(WEIGHTS, spec.parts, strict=True):
        model = AutoModelForSequenceClassification.from_pretrained(encoders / name, dtype=torch.float64).eval()
        tokenizer = AutoTokenizer.from_pretrained(encoders / name)
        settings = {**model.config.to_dict(), "num_labels": model.config.num_labels}
        search, _ = split(part.source.calibration, encoders, part.source.seed, settings, labelled=False)
        some = select(search, max(1, round(0.2 * len(search))), part.source.seed + 1)
        states: list[torch.Tensor] = []
        model.classifier.register_forward_pre_hook(lambda module, given, seen=states: seen.append(given[0]))
        found = []
        for body in (tunes[name], merged, base):
            own = {n: t.double() for n, t in body.items() if n in base}
            model.base_model.load_state_dict(own, strict=False)
            with torch.no_grad():
                logs = [
                    model(**tokenizer(row.content, truncation=True, max_length=12, return_tensors="pt")).logits
                    for row in some
                ]
            found.append((torch.cat(logs).log_softmax(-1), torch.cat(states[-len(some) :])))
        (own_logs, own_states), *others = found
        shares = []
        for logs, ours in others:
            divergence = (own_logs.exp() * (own_logs - logs)).sum(-1).mean()
            change = ((ours - own_states).square().sum(-1) / own_states.square().sum(-1)).mean()
            shares.append((divergence, change))
        wanted.append(sum(a / b for a, b in zip(*shares, strict=True)) / 2)
    got = shared_values([stage], {})[stage].record
    assert got["path"][0][2] == pytest.approx(float(np.mean(wanted)), rel=1e-3)


def test_texts_are_mixed_with_others_of_their_batch_and_any_words() -> None:
    """Padding and special tokens stay. In an eighth of all cases each, others become tokens of the batch and of the
    vocabulary. Turns repeat."""
    ids = torch.tensor([[2, 11, 12, 13, 3], [2, 21, 22, 3, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": torch.zeros_like(ids)}
    words = torch.tensor([11, 12, 13, 21, 22, 31, 32])
    mixed = MixedRows([batch], words, (7, 1))
    turns = torch.stack([mixed.turn(number)[0]["input_ids"] for number in range(800)])
    changes = (turns != ids).float().mean(0)
    may = ids > 10
    assert (changes[~may] == 0).all()
    assert {*turns[:, may].flatten().tolist()} == {11, 12, 13, 21, 22, 31, 32}
    assert ((changes[may] - 0.125 * (4 / 5 + 6 / 7)).abs() < 0.1).all()  # one of five, or seven, is the token itself
    assert abs((turns[:, may] > 30).float().mean() - 0.125 * 2 / 7) < 0.01
    assert torch.equal(mixed.turn(3)[0]["input_ids"], turns[3])
    assert not torch.equal(MixedRows([batch], words, (7, 2)).turn(3)[0]["input_ids"], turns[3])


def test_pictures_are_mixed_and_mirrored() -> None:
    """(1 - s) x + s y in float64, y another of the batch, s at most a half, and half of them from right to left."""
    pictures = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    none, patches = torch.empty(0), {"pixel_values": pictures[0]}
    mixed = MixedRows([{"pixel_values": pictures}], none, (7,))
    x, mirrored = pictures.double().numpy(), list[bool]()
    for number in range(20):
        draw = np.random.default_rng((7, number))
        others, share = x[draw.permutation(6)], 0.5 * draw.random((6, 1, 1, 1), np.float32)
        wanted, flips = (1 - share) * x + share * others, draw.random((6, 1, 1, 1)) < 0.5
        mirrored += flips.flatten().tolist()
        (found,) = mixed.turn(number)
        np.testing.assert_allclose(found["pixel_values"], np.where(flips, wanted[..., ::-1], wanted), atol=1e-6)
    assert 40 < sum(mirrored) < 80
    assert MixedRows([patches], none, (7,)).turn(1) == [patches]


def test_the_data_of_classifiers_is_mixed_in_each_turn(classifiers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit of rows' factors takes the fine-tune's outputs for the data of each turn; other fits keep the data."""
    seen: list[tuple[tuple[int, ...], int]] = []
    turn = MixedRows.turn
    monkeypatch.setattr(MixedRows, "turn", lambda one, number: seen.append((one.seed, number)) or turn(one, number))
    for scope, passes in (("layer", 60), ("row", 300)):
        plan = make_plan(recipe(classifiers, "mixed", "task_arithmetic", FITTED % scope, "lambda: 0.1"))
        ((stage, spec),) = plan.specs.items()
        (described,) = plan.describe()["stages"]
        assert described["forward_passes"] == passes
        long = dataclasses.replace(
            spec.source, calibration=spec.source.calibration.model_copy(update={"length": 10**9})
        )
        assert dataclasses.replace(spec, source=long).passes == 60  # which would take too long
        record = shared_values([stage], {})[stage].record
        turns = len(record["path"]) - 1
        wanted = [((0, model), number) for number in range(1, turns) for model in range(2)] if scope == "row" else []
        assert seen == wanted
        assert record["forward_passes"] <= passes
    assert turns > 5


def test_texts_of_like_length_run_together_and_go_back_as_they_fit() -> None:
    lengths = {"a": 9, "b": 2, "c": 9, "d": 3, "e": 2}
    assert coefficients._alike(lengths, 2) == [["b", "e"], ["d", "a"], ["c"]]
    for room, want in ((0, [1] * 4), (5, [2, 1, 1]), (6, [2, 1, 1]), (9, [3, 1]), (99, [4])):
        found = coefficients._fitting([2, 3, 4, 5], room)
        assert [len(some) for some in found] == want
        assert [number for some in found for number in some] == [0, 1, 2, 3]
