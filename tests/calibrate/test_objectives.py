"""Objectives against float64 sums over the plain model's outputs; candidates against a rebuilt model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import batches, make
from tolerance import gamma
from torch.overrides import TorchFunctionMode

from deltamerge.calibrate.model import passes
from deltamerge.calibrate.model.blocks import BlockModel, from_reader
from deltamerge.calibrate.model.candidates import Cache, apply, pruned
from deltamerge.calibrate.model.passes import Logits
from deltamerge.calibrate.q.objectives import (
    Distribution,
    Generation,
    LostScore,
    OutputChange,
    SameAnswers,
    Validation,
    collected,
    evaluate,
    head_inputs,
    is_regression,
    last_states,
    over_seeds,
)
from deltamerge.errors import InputError
from deltamerge.tensors.tiles import Kept


class Pair:
    """A fine-tune, its base, and a drawn mask, on a tiny architecture."""

    def __init__(self, architecture: str, folder: Path, **changes: Any) -> None:
        self.reference, self.tune = make(architecture, folder, **changes)
        self.config: Any = transformers.AutoConfig.from_pretrained(folder)
        self.model = BlockModel(self.config, self.tune)
        generator = torch.Generator().manual_seed(3)
        self.delta = {n: torch.randn(t.shape, generator=generator) * 0.05 for n, t in self.tune.items()}
        self.base = {n: t - self.delta[n] for n, t in self.tune.items()}
        self.masked = {n: d * (torch.rand(d.shape, generator=generator) < 0.3) for n, d in self.delta.items()}
        self.data = batches(architecture)
        self.tuned = from_reader(self.tune.__getitem__)

    def at(self, q: float) -> Any:
        return pruned(self.base.__getitem__, self.masked.get, dict.fromkeys(self.tune, q))

    def outputs(self, tensors: dict[str, torch.Tensor]) -> list[tuple[Any, Any]]:
        """(logits, last hidden state) of every batch, padding left out of the hidden state, float64."""
        states = {stored: state for state, stored in self.model.checkpoint_name.items()}
        self.reference.load_state_dict({states[n]: t for n, t in tensors.items()}, strict=False)
        self.reference.tie_weights()
        found = []
        for inputs in self.data:
            with torch.no_grad():
                result, hidden = self.reference(**inputs), self.reference.base_model(**inputs)[0]
            real = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
            logits = getattr(result, "logits", None)
            if logits is not None and logits.dim() == 3:
                logits = logits[real]
            found.append((None if logits is None else logits.double().numpy(), hidden[real].double().numpy()))
        return found


@pytest.mark.parametrize("architecture", ["BertModel", "ViTForImageClassification", "LlamaForSequenceClassification"])
def test_output_change_of_hidden_states(architecture: str, tmp_path: Path) -> None:
    pair = Pair(architecture, tmp_path)
    objective = OutputChange.of(pair.model, pair.tuned, pair.data)
    rebuilt = {n: t + pair.masked[n] / 0.4 for n, t in pair.base.items()}
    changes = [np.abs(a - b) for (_, a), (_, b) in zip(pair.outputs(pair.tune), pair.outputs(rebuilt), strict=True)]
    want = sum(c.sum() for c in changes) / sum(c.size for c in changes)
    got = evaluate(pair.model, objective, [pair.at(0.4), pair.tuned, pair.at(1.0)], group=2)
    assert got[0] == pytest.approx(want, rel=1e-4)
    assert got[1] == pytest.approx(0.0, abs=1e-6)
    assert got[2] != pytest.approx(want, rel=1e-2)


def test_output_change_of_a_language_model(tmp_path: Path) -> None:
    pair = Pair("GPT2LMHeadModel", tmp_path)
    objective = OutputChange.of(pair.model, pair.tuned, pair.data)
    rebuilt = {n: t + pair.masked[n] / 0.4 for n, t in pair.base.items()}
    squares = []
    for (z, _), (other, _) in zip(pair.outputs(pair.tune), pair.outputs(rebuilt), strict=True):
        top = np.argsort(-z, axis=1)[:, :5]
        squares.append((np.take_along_axis(other, top, 1) - np.take_along_axis(z, top, 1)) ** 2)
    want = np.concatenate(squares).mean()
    assert evaluate(pair.model, objective, [pair.at(0.4)])[0] == pytest.approx(want, rel=1e-4)


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_divergence_of_distributions(architecture: str, tmp_path: Path) -> None:
    pair = Pair(architecture, tmp_path)
    objective = Distribution.of(pair.model, pair.tuned, pair.data)
    rebuilt = {n: t + pair.masked[n] / 0.4 for n, t in pair.base.items()}
    tuned, other = (np.concatenate([z for z, _ in pair.outputs(t)]) for t in (pair.tune, rebuilt))
    p, q = softmax(tuned), softmax(other)
    want = (p * np.log(p / q)).sum(1).mean()
    assert evaluate(pair.model, objective, [pair.at(0.4)])[0] == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_states_count_beside_the_outputs(architecture: str, tmp_path: Path) -> None:
    """The loss of a batch is its divergence and `weight` times the mean share of its tokens' squared change."""
    pair = Pair(architecture, tmp_path)
    objective = Distribution.of(pair.model, pair.tuned, pair.data, states=last_states)
    assert objective.states is not None
    rebuilt = {n: t + pair.masked[n] / 0.4 for n, t in pair.base.items()}
    both = list(zip(pair.outputs(pair.tune), pair.outputs(rebuilt), strict=True))
    shares = [((b - a) ** 2).sum(-1).ravel() / (a**2).sum(-1).ravel() for (_, a), (_, b) in both]
    got = evaluate(pair.model, objective.states, [pair.at(0.4), pair.tuned])
    assert got[0] == pytest.approx(np.concatenate(shares).mean(), rel=1e-3)
    assert got[1] == pytest.approx(0.0, abs=1e-9)
    (plain,) = pair.model.run(pair.data, [pair.at(0.4)], objective.reduce)
    (summed,) = pair.model.run(pair.data, [pair.at(0.4)], replace(objective, weight=7.0).reduce)
    for (total, count), (more, again), share in zip(plain, summed, shares, strict=True):
        assert again == count
        assert more - total == pytest.approx(7.0 * count * share.mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("BertForSequenceClassification", "classifier"),
        ("ViTForImageClassification", "classifier"),
        ("LlamaForSequenceClassification", "score"),
    ],
)
def test_states_that_a_head_reads(architecture: str, head: str, tmp_path: Path) -> None:
    """Its last layer sees them: of each row, or of each real token."""
    pair = Pair(architecture, tmp_path)
    seen: list[torch.Tensor] = []
    pair.reference.get_submodule(head).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pair.outputs(pair.tune)
    found = pair.model.run(pair.data, [pair.tuned], lambda b, output: head_inputs(output, pair.data[b]))[0]
    for want, got, inputs in zip(seen, found, pair.data, strict=True):
        real = want if want.dim() == 2 else want[inputs["attention_mask"].bool()]
        np.testing.assert_allclose(got, real, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "regression"),
    [("BertForSequenceClassification", False), ("LlamaForCausalLM", False), ("BertForSequenceClassification", True)],
)
def test_same_answers(architecture: str, regression: bool, tmp_path: Path) -> None:
    """Of classes and of real tokens the share that are equal; of numbers their correlation."""
    pair = Pair(architecture, tmp_path)
    comparison = SameAnswers.compared(pair.data, regression=regression)
    (objective,) = collected(pair.model, pair.tuned, pair.data, [comparison])
    rebuilt = {n: t + pair.masked[n] / 0.4 for n, t in pair.base.items()}
    tuned, other = (np.concatenate([z for z, _ in pair.outputs(t)]) for t in (pair.tune, rebuilt))
    want = np.mean(tuned.argmax(1) == other.argmax(1))
    if regression:
        want = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(tuned.T, other.T, strict=True)])
    got = evaluate(pair.model, objective, [pair.at(0.4), pair.tuned])
    assert 1 - got[0] == pytest.approx(want, abs=1e-4)
    assert got[1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("regression", [False, True])
def test_the_score_that_is_expected_to_be_lost(regression: bool, tmp_path: Path) -> None:
    """Of classes what the fine-tune thinks of them, its logits divided by DOUBT; of numbers their correlation."""
    pair = Pair("BertForSequenceClassification", tmp_path)
    objective = LostScore.of(pair.model, pair.tuned, pair.data, regression=regression)
    rebuilt = {n: t + pair.masked[n] / 0.1 for n, t in pair.base.items()}
    tuned, other = (np.concatenate([z for z, _ in pair.outputs(t)]) for t in (pair.tune, rebuilt))
    believed = softmax(tuned / 2)
    want = sum(p[z.argmax()] for p, z in zip(believed, other, strict=True)) / believed.max(1).sum()
    assert want < 1
    if regression:
        want = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(tuned.T, other.T, strict=True)])
    got = evaluate(pair.model, objective, [pair.at(0.1), pair.tuned])
    assert 1 - got[0] == pytest.approx(want, abs=1e-4)
    assert got[1] == pytest.approx(0.0, abs=1e-6)


def test_divergence_over_a_large_vocabulary_is_a_lower_bound(tmp_path: Path) -> None:
    pair = Pair("LlamaForCausalLM", tmp_path, vocab_size=200)
    objective = Distribution.of(pair.model, pair.tuned, pair.data)
    rebuilt = {n: t + pair.masked[n] / 0.4 for n, t in pair.base.items()}
    tuned, other = (np.concatenate([z for z, _ in pair.outputs(t)]) for t in (pair.tune, rebuilt))
    p, q = softmax(tuned), softmax(other)
    top = np.argsort(-p, axis=1)[:, :64]
    lumped = [np.concatenate([c := np.take_along_axis(d, top, 1), 1 - c.sum(1, keepdims=True)], 1) for d in (p, q)]
    want = (lumped[0] * np.log(lumped[0] / lumped[1])).sum(1).mean()
    got = evaluate(pair.model, objective, [pair.at(0.4)])[0]
    assert got == pytest.approx(want, rel=1e-3)
    assert got <= (p * np.log(p / q)).sum(1).mean()


@pytest.mark.parametrize(
    ("architecture", "regression"), [("BertForSequenceClassification", True), ("BertModel", False)]
)
def test_squared_error_of_numbers(architecture: str, regression: bool, tmp_path: Path) -> None:
    pair = Pair(architecture, tmp_path)
    objective = Distribution.of(pair.model, pair.tuned, pair.data, regression=regression)
    rebuilt = {n: t + pair.masked[n] / 0.4 for n, t in pair.base.items()}
    tuned, other = (np.concatenate([o[0 if regression else 1] for o in pair.outputs(t)]) for t in (pair.tune, rebuilt))
    assert evaluate(pair.model, objective, [pair.at(0.4)])[0] == pytest.approx(((tuned - other) ** 2).mean(), rel=1e-3)


def test_validation(tmp_path: Path) -> None:
    pair = Pair("BertForSequenceClassification", tmp_path)
    labels = [torch.tensor([0, 2]), torch.tensor([1, 1, 0])]
    logits = np.concatenate([z for z, _ in pair.outputs(pair.tune)])
    y = torch.cat(labels).numpy()
    found = {m: evaluate(pair.model, Validation(pair.data, labels, m), [pair.tuned])[0] for m in ("accuracy", "loss")}
    assert found["accuracy"] == pytest.approx(1.0 - (logits.argmax(1) == y).mean())
    assert found["loss"] == pytest.approx(-np.log(softmax(logits)[np.arange(5), y]).mean(), rel=1e-4)


def test_validation_of_a_regression(tmp_path: Path) -> None:
    pair = Pair("BertForSequenceClassification", tmp_path, num_labels=1)
    labels = [torch.tensor([0.1, 0.5]), torch.tensor([1.0, -1.0, 0.0])]
    z, y = np.concatenate([z[:, 0] for z, _ in pair.outputs(pair.tune)]), torch.cat(labels).numpy()
    assert is_regression(pair.config)
    loss, correlation = (
        evaluate(pair.model, Validation(pair.data, labels, m), [pair.tuned])[0] for m in ("loss", "pearson_spearman")
    )
    assert loss == pytest.approx(((z - y) ** 2).mean(), rel=1e-4)
    assert -1.0 <= 1.0 - correlation <= 1.0


def test_validation_loss_of_a_language_model_is_transformers(tmp_path: Path) -> None:
    pair = Pair("LlamaForCausalLM", tmp_path)
    data = pair.data[:1]
    labels = data[0]["input_ids"].masked_fill(data[0]["attention_mask"] == 0, -100)
    with torch.no_grad():
        want = float(pair.reference(**data[0], labels=labels).loss)
    got = evaluate(pair.model, Validation(data, [labels], "loss"), [pair.tuned])[0]
    assert got == pytest.approx(want, rel=1e-4)


def test_exact_match_of_generated_texts(tmp_path: Path) -> None:
    pair = Pair("LlamaForCausalLM", tmp_path, eos_token_id=None)
    prompts = [
        {"input_ids": b["input_ids"].clamp_min(3), "attention_mask": torch.ones_like(b["input_ids"])} for b in pair.data
    ]

    def decode(tokens: torch.Tensor) -> list[str]:
        return [" ".join(map(str, row)) for row in tokens.tolist()]

    said = [decode(tokens) for tokens in pair.model.generate(prompts, pair.tuned, new_tokens=4)]
    right = Generation(prompts, said, decode, new_tokens=4)
    wrong = Generation(prompts, [said[0], ["?"] * 3], decode, new_tokens=4)
    assert evaluate(pair.model, right, [pair.tuned]) == [0.0]
    assert evaluate(pair.model, wrong, [pair.tuned, pair.tuned]) == pytest.approx([0.6, 0.6])
    last = [[text.split()[-1] for text in some] for some in said]
    assert evaluate(pair.model, Generation(prompts, last, decode, r"\d+", 4), [pair.tuned]) == [0.0]


@pytest.mark.parametrize(
    ("values", "want"), [([3.0], 3.0), ([1.0, 3.0], 2.0), ([1.0, 1.2, 5.0], 1.1), ([1.0, 9.0, 9.5, 10.0], 9.5)]
)
def test_over_seeds_drops_the_farthest(values: list[float], want: float) -> None:
    assert over_seeds(values) == pytest.approx(want)


@pytest.mark.parametrize("q", [0.3, torch.tensor(0.3), torch.rand(4, 1) + 0.1, torch.rand(1, 6) + 0.1])
def test_sparse_and_dense_deltas_apply_alike(q: Any) -> None:
    base, masked = torch.randn(4, 6), torch.randn(4, 6) * (torch.rand(4, 6) < 0.4)
    positions = masked.flatten().nonzero()[:, 0]
    kept = Kept(positions, masked.flatten()[positions])
    assert torch.equal(apply(base, masked, q), base + masked / q)
    torch.testing.assert_close(apply(base, kept, q), base + masked / q)
    if isinstance(q, torch.Tensor):
        gradients = []
        for delta in (masked, kept):
            leaf = q.clone().requires_grad_(True)
            loss: Any = (apply(base, delta, leaf) ** 2).sum()
            loss.backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], gradients[1])
    assert apply(base, None, q) is base


@pytest.mark.parametrize(
    ("recent", "pinned", "wanted"),
    [
        (80, 0, ["ab", "cd", "ef", "ab", "cd", "ef"]),  # in a circle the last used are always gone
        (80, 80, ["ab", "cd", "ef", "cd", "ef"]),
        (80, 120, ["ab", "cd", "ef", "d", "e"]),
        (80, 160, ["ab", "cd", "ef"]),
    ],
)
def test_a_cache_keeps_the_first_and_the_last(recent: int, pinned: int, wanted: list[str]) -> None:
    reads: list[str] = []

    def read(names: Sequence[str]) -> dict[str, torch.Tensor]:
        reads.append("".join(names))
        return {name: torch.zeros(10) for name in names}

    cache = Cache(read, recent, pinned)
    for _ in range(2):
        for part in ("ab", "cd", "ef"):
            for _variant in range(3):
                assert list(cache.several(list(part))) == list(part)
    assert reads == wanted
    cache.clear()
    cache("a")
    assert reads[-1] == "a"


def test_several_logits_are_refused():
    """A reader of scenes gives characters, byte pairs and word pieces."""
    with pytest.raises(InputError, match="the model gives 3 logits, and calibration compares one"):
        _ = Logits((torch.zeros(1, 2, 3),) * 3).per_token  # type: ignore[arg-type]


class _Largest(TorchFunctionMode):
    """Remembers the most bytes of logits over a vocabulary that one function returned."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary, self.nbytes = vocabulary, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dim() > 1 and made.shape[-1] == self.vocabulary:
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


@pytest.mark.parametrize(
    ("architecture", "changes", "in_pieces"),
    [
        ("LlamaForCausalLM", {}, True),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": False}, True),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": 2.0}, False),  # it computes on with the product
    ],
)
def test_logits_come_in_pieces_whose_size_changes_nothing(
    architecture: str, changes: dict[str, Any], in_pieces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(architecture, tmp_path, vocab_size=211, **changes)
    labels = [b["input_ids"].masked_fill(b["attention_mask"] == 0, -100) for b in pair.data]
    found = []
    for tokens in (1, 4, 1000):
        monkeypatch.setattr(passes, "PIECE_BYTES", tokens * 211 * 4)
        with _Largest(211) as largest:
            some = [made.of(pair.model, pair.tuned, pair.data) for made in (OutputChange, Distribution)]
            some.append(Validation(pair.data, labels, "loss"))
            found.append([x for one in some for x in evaluate(pair.model, one, [pair.at(0.4), pair.tuned])])
        assert (largest.nbytes <= tokens * 211 * 4) == (in_pieces or tokens == 1000)
        whole = OutputChange.of(pair.model, pair.tuned, pair.data)
        with _Largest(211) as largest:
            evaluate(pair.model, whole, [pair.at(0.4)])
        assert (largest.nbytes == 0) == in_pieces  # 5 logits a token are all it needs
    # a logit is a sum over neurons and its log-probability one over words, in an order that the piece's size may change
    apart = gamma(pair.config.hidden_size + 211)
    assert found[0] == pytest.approx(found[1], rel=apart)
    assert found[1] == pytest.approx(found[2], rel=apart)
    assert found[0][1] == 0.0  # of the fine-tune itself
