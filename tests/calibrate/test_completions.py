"""Rows of a prompt and its completion: what is compared is how a language model says the latter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_rows import rows as text_rows
from conftest import load_tensors, tiny_bert_pair, tiny_llama
from running import make_plan

from deltamerge.calibrate.model.blocks import BlockModel, from_reader
from deltamerge.calibrate.model.passes import COMPARED
from deltamerge.calibrate.q.objectives import Distribution, OutputChange, SameAnswers, collected
from deltamerge.calibrate.q.variations import Variations
from deltamerge.calibrate.rows import files as rows
from deltamerge.calibrate.rows.batches import RowReader, config_of, said
from deltamerge.calibrate.rows.chats import Chat
from deltamerge.calibrate.rows.files import DataRow
from deltamerge.errors import InputError

ROWS = [
    {"prompt": "w5 w6 w7", "completion": " w8 w9 w10"},
    {"prompt": "w11", "completion": " w12"},
    {"prompt": "w20 w21 w22 w23 w24", "completion": " w25 w26"},
    {"text": "w30 w31 w32"},
]
SCORED = {(0, 2), (0, 3), (0, 4), (1, 0), (2, 4), (2, 5), (3, 0), (3, 1), (3, 2)}
"""(row, place) of the logits that are compared: each says a token of a completion, or of a text."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("completions")
    base = tiny_llama(made / "base", seed=0, dtype=torch.float32, tokenizer=True)
    tiny_llama(made / "a", seed=1, base=base, dtype=torch.float32, sigma=0.05, tokenizer=True)
    return made


def read(path: Path, *records: Any, **options: Any) -> list[DataRow]:
    (path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return rows.read("rows.jsonl", folder=path, **options)


def test_rows_are_read_as_trl_names_them(tmp_path: Path) -> None:
    found = read(tmp_path, *ROWS)
    assert found[0] == DataRow("w5 w6 w7", None, 1, " w8 w9 w10")
    assert found[3] == DataRow("w30 w31 w32", None, 4)
    assert [row.label for row in read(tmp_path, ROWS[1], {**ROWS[0], "label": 3}, label="label")] == [" w12", 3]
    both = {"text": "w1", "prompt": "w2", "completion": "w3"}
    assert read(tmp_path, both)[0] == DataRow("w1", None, 1)
    assert read(tmp_path, ROWS[0], text="prompt")[0] == DataRow("w5 w6 w7", None, 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "w5"}, "row 1: no field 'text'"),
        ({"prompt": [{"role": "user", "content": "w5"}], "completion": "w6"}, "row 1: prompt and completion need"),
        ({"messages": []}, "row 1: no message asks for an answer"),
        ({"messages": [{"role": "assistant", "content": "w5"}]}, "row 1: no message asks for an answer"),
        ({"messages": [{"from": "human", "value": "w5"}]}, "row 1: message 1 has no role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "row 1: message 1 has no role and content"),
        ({"messages": [{"role": "user", "content": "w5", "tool_calls": [1]}]}, "row 1: message 1 has 'tool_calls'"),
        ({"messages": [{"role": "user", "content": "w5"}], "tools": [1]}, "row 1: a chat with tools"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "row 1: half a surrogate pair"),
        ({"prompt": "w5", "completion": "\ud800"}, "row 1: half a surrogate pair"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, record)


def test_what_fills_the_length_is_refused(folder: Path, tmp_path: Path) -> None:
    reader = RowReader(folder / "a", config_of(folder / "a"), task="causal-lm", length=5)
    with pytest.raises(InputError, match="row 3: its 5 tokens hold nothing of its completion"):
        reader.batches(read(tmp_path, *ROWS))


def batch(folder: Path, tmp_path: Path) -> tuple[dict[str, torch.Tensor], list[tuple[int, int]]]:
    """The batch of ROWS, and the (row of the batch, place) that are compared."""
    reader = RowReader(folder / "a", config_of(folder / "a"), task="causal-lm", length=12)
    (made,) = reader.batches(read(tmp_path, *ROWS)).inputs
    first = {f"w{n}": i for i, n in enumerate((5, 11, 20, 30))}
    order = [first[reader.tokenizer.decode(ids[:1]).strip()] for ids in made["input_ids"]]
    return made, [(k, place) for k, row in enumerate(order) for of, place in sorted(SCORED) if of == row]


def test_places_that_say_the_completion_are_compared(folder: Path, tmp_path: Path) -> None:
    made, wanted = batch(folder, tmp_path)
    assert [tuple(at) for at in made[COMPARED].nonzero().tolist()] == sorted(wanted)
    scored = {tuple(at) for at in (said(made)[:, 1:] >= 0).nonzero().tolist()}
    ends = {(i, int(mask.sum()) - 1) for i, mask in enumerate(made["attention_mask"])}  # nothing is said after
    assert scored == set(wanted) - ends


@pytest.mark.parametrize("kind", [Distribution, OutputChange, SameAnswers])
def test_objectives_are_of_completions_alone(folder: Path, tmp_path: Path, kind: Any) -> None:
    """They equal the written-out means over the places that say a completion, in float64."""
    from transformers import AutoModelForCausalLM

    made, wanted = batch(folder, tmp_path)
    tensors = {name: load_tensors(folder / name) for name in ("base", "a")}
    model = BlockModel(config_of(folder / "a"), tensors["a"])
    logits = {}
    for name in tensors:
        plain = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        given = {key: value for key, value in made.items() if key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            whole = plain(**given).logits
        logits[name] = torch.stack([whole[at] for at in wanted]).numpy()
    theirs, ours = logits["a"], logits["base"]
    tuned = from_reader(tensors["a"].__getitem__)
    if kind is SameAnswers:
        (objective,) = collected(model, tuned, [made], [SameAnswers.compared([made], regression=False)])
    else:
        objective = kind.of(model, tuned, [made])
    (parts,) = model.run([made], [from_reader(tensors["base"].__getitem__)], objective.reduce)
    if kind is SameAnswers:
        reference = np.mean(theirs.argmax(-1) != ours.argmax(-1))
    elif kind is OutputChange:
        top = np.argsort(-theirs, axis=-1)[:, :5]
        reference = np.mean((np.take_along_axis(ours, top, -1) - np.take_along_axis(theirs, top, -1)) ** 2)
    else:
        top = np.argsort(-theirs, axis=-1)[:, :64]
        p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (theirs, ours))
        p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
        p, q = (np.take_along_axis(x, top, -1) for x in (p, q))
        p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
        reference = np.mean(np.sum(p * np.log(p / q), -1))
    assert objective.value(parts) == pytest.approx(reference, rel=2e-4)


def test_chats_are_read_in_the_forms_of_trl(tmp_path: Path) -> None:
    """Messages; a prompt and a completion of messages; or a field that calibration.text names."""
    asks, answer = [message("system", "w1"), message("user", "w5")], message("assistant", "w6")
    chat = Chat((("system", "w1"), ("user", "w5")))
    records: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"messages": [*asks, answer]}, {}),
        ({"prompt": asks, "completion": [answer]}, {}),
        ({"talk": [*asks, {**answer, "tool_calls": None}]}, {"text": "talk"}),
    ]
    for record, options in records:
        assert read(tmp_path, record, **options) == [DataRow(chat, None, 1, "w6")]
        assert read(tmp_path, record, label="label", **options) == [DataRow(chat, "w6", 1, "w6")]
    assert read(tmp_path, {"messages": asks, "label": 3}, label="label") == [DataRow(chat, 3, 1)]


TEMPLATE = (
    "{% for one in messages %}{{ {'user': 'w52', 'assistant': 'w53'}[one.role] }} {{ one.content }} w54 {% endfor %}"
    "{% if add_generation_prompt %}w53{% endif %}"
)


@pytest.mark.parametrize("begins", [False, True])
def test_chats_are_texts_as_the_template_writes_them(folder: Path, tmp_path: Path, begins: bool) -> None:
    """Batches equal those of the texts. A mark of the beginning stands once, also where the template writes one."""
    from tokenizers.processors import TemplateProcessing

    reader = RowReader(folder / "a", config_of(folder / "a"), task="causal-lm", length=32)
    reader.tokenizer.chat_template = TEMPLATE
    if begins:
        reader.tokenizer.bos_token = "w50"
        ids = [("w50", reader.tokenizer.convert_tokens_to_ids("w50"))]
        reader.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("w50 $A", special_tokens=ids)
        reader.tokenizer.chat_template = "w50" + TEMPLATE
    asks = [message("user", "w5 w6"), message("assistant", "w7"), message("user", "w8")]
    chats = read(tmp_path, {"messages": [*asks, message("assistant", "w9 w10")]}, {"messages": asks})
    asked = "w52 w5 w6 w54 w53 w7 w54 w52 w8 w54 "
    texts = read(tmp_path, {"prompt": asked + "w53", "completion": " w9 w10 w54 "}, {"text": asked})
    same(reader.batches(chats).inputs, reader.batches(texts).inputs)
    same(reader.batches(chats[1:]).inputs, reader.batches(texts[1:]).inputs)
    (prompts,) = reader.prompts(chats).inputs
    assert reader.tokenizer.batch_decode(prompts["input_ids"]) == ["w50 " * begins + asked + "w53"] * 2
    assert {len(ids) for ids in prompts["input_ids"]} == {11 + begins}
    assert [str(row.content) for row in chats] == ["w8", "w8"]


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def same(found: list[dict[str, torch.Tensor]], wanted: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        (None, "row 1: a chat, but the model's tokenizer has no chat template"),
        (
            "{{ raise_exception('no system role') }}",
            "row 1: its chat template cannot take the messages.*no system role",
        ),
        ("{{ messages | length }}", "row 1: its chat template writes a chat otherwise once it is answered"),
    ],
)
def test_templates_that_cannot_write_a_chat(folder: Path, tmp_path: Path, template: str | None, wrong: str) -> None:
    reader = RowReader(folder / "a", config_of(folder / "a"), task="causal-lm", length=32)
    reader.tokenizer.chat_template = template
    with pytest.raises(InputError, match=wrong):
        reader.batches(read(tmp_path, {"messages": [message("user", "w5"), message("assistant", "w6")]}))


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ({"prompt": "w5", "completion": " w9"}, "a prompt and its completion, for language models alone"),
        ({"messages": [{"role": "user", "content": "w5"}]}, "a chat, for language models alone"),
    ],
)
def test_a_classifier_has_no_completions(tmp_path: Path, record: dict[str, Any], wrong: str) -> None:
    tiny_bert_pair(tmp_path, dtype=torch.float32, sigma=0.05, tokenizer=True)
    shutil.copytree(tmp_path / "tuned", tmp_path / "a")
    (tmp_path / "rows.jsonl").write_text((json.dumps(record) + "\n") * 20)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base_model: ./base\nmodels: [{model: ./a, prune: {method: magnitude, density: 0.5, q: output_change}}]\n"
        "calibration: {data: rows.jsonl, sequences: 6, length: 12}\n"
    )
    with pytest.raises(InputError, match=wrong):
        make_plan(recipe)
    text_rows(tmp_path / "rows.jsonl")
    assert make_plan(recipe)


def test_variations_are_drawn_from_the_fine_tune(folder: Path, tmp_path: Path) -> None:
    """A substitute is the inverse of the cumulated probabilities at a drawn number, in float64."""
    from transformers import AutoModelForCausalLM

    made, _ = batch(folder, tmp_path)
    tensors = load_tensors(folder / "a")
    model, tune = BlockModel(config_of(folder / "a"), tensors), from_reader(tensors.__getitem__)
    found = Variations.drawn(model, tune, [made], turns=40, special=torch.tensor([2, 3]), seed=7)
    real = made["attention_mask"].bool()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(folder / "a", dtype=torch.float64)
        shares = plain(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits.softmax(-1)[real]
    shares[:, [2, 3]] = 0.0
    sums = (shares / shares.sum(-1, keepdim=True)).cumsum(-1).numpy()
    drawn = found.substitutes[0].roll(-1, 2).movedim(0, -1)[real].numpy()
    places = np.random.default_rng((7, 0)).random(drawn.shape, np.float32)
    assert (np.take_along_axis(sums, drawn, 1) >= places - 1e-5).all()
    before = np.where(drawn > 0, np.take_along_axis(sums, np.maximum(drawn - 1, 0), 1), 0.0)
    assert (before <= places + 1e-5).all()
    assert not np.isin(drawn, [2, 3]).any()


def test_variations_change_prompts_alone(folder: Path, tmp_path: Path) -> None:
    """Completions, special tokens, first tokens and padding stay; a text without a prompt is varied as a whole."""
    made, wanted = batch(folder, tmp_path)
    ids, real = made["input_ids"], made["attention_mask"].bool()
    kept = int(ids[0, 1])
    found = Variations([made], [torch.full((300, *ids.shape), 50)], torch.tensor([kept]), seed=0)
    turns = torch.stack([found.turn(number)[0]["input_ids"] for number in range(300)])
    changed = (turns != ids).float().mean(0)
    may = torch.zeros_like(real)
    for row in range(len(ids)):
        first = min(place for k, place in wanted if k == row)
        whole = first == 0 and int(real[row].sum()) == len([1 for k, _ in wanted if k == row])
        may[row, 1 : int(real[row].sum()) if whole else first] = True
    may &= ids != kept
    assert may.any()
    assert (changed[~may] == 0).all()
    assert ((changed[may] - 0.3).abs() < 0.1).all()  # 0.3 on average, of 300 turns
    again = found.turn(3)[0]["input_ids"]
    assert torch.equal(again, turns[3])
    assert Variations([made], [], torch.empty(0), seed=0).turn(3) == [made]
