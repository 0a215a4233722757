"""Calibration data: every file kind, every error, and batches as a model takes them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import image_processor

from deltamerge.calibrate.rows import files as rows
from deltamerge.calibrate.rows.chats import Chat
from deltamerge.calibrate.rows.files import DataRow
from deltamerge.calibrate.rows.heads import check_head, class_labels
from deltamerge.calibrate.rows.splits import select, split
from deltamerge.errors import InputError
from deltamerge.recipe.schema import Calibration


def jsonl(path: Path, *records: Any) -> str:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path.name


def table(path: Path, *records: dict[str, Any]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path.name


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    records = [{"text": "a b", "label": "1"}, {"text": "ü, c", "label": "0"}]
    want = [DataRow("a b", "1", 1), DataRow("ü, c", "0", 2)]
    assert rows.read(jsonl(tmp_path / "a.jsonl", *records), folder=tmp_path, label="label") == want
    assert rows.read(table(tmp_path / "a.csv", *records), folder=tmp_path, label="label") == want
    (tmp_path / "a.txt").write_text("a b\n\nü, c\n", encoding="utf-8")
    assert [r.content for r in rows.read("a.txt", folder=tmp_path)] == ["a b", "ü, c"]
    for name in ("a.jsonl", "a.csv"):  # as spreadsheets and Windows write UTF-8
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert rows.read(name, folder=tmp_path, label="label") == want


def test_rows_of_parquet(tmp_path: Path) -> None:
    """More than are read at once; chats among them. A file that is none is named."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [{"text": f"t{i}", "messages": None} for i in range(2 * rows.READ_AT_ONCE)]
    records.append({"text": None, "messages": chat})
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    found = rows.read("a.parquet", folder=tmp_path)
    assert found[:-1] == [DataRow(f"t{i}", None, i + 1) for i in range(len(records) - 1)]
    assert found[-1] == DataRow(Chat((("user", "a"),)), None, len(records), "b")
    assert rows.count(tmp_path / "a.parquet", 10**6) == len(records)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"calibration data b\.parquet: not Parquet: "):
        rows.read("b.parquet", folder=tmp_path)


def test_pairs_and_pictures(tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a.jsonl", {"p": "x", "h": "y"})
    assert rows.read(name, folder=tmp_path, text=["p", "h"]) == [DataRow(("x", "y"), None, 1)]
    name = jsonl(tmp_path / "b.jsonl", {"image": "cat/1.png"})
    assert rows.read(name, folder=tmp_path, text="image")[0].content == tmp_path / "cat/1.png"
    for file in ("dog/2.png", "cat/1.png", "cat/note.md"):
        (tmp_path / "pictures" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / file).touch()
    found = rows.read("pictures", folder=tmp_path, label="label")
    assert [(r.content.name, r.label) for r in found] == [("1.png", "cat"), ("2.png", "dog")]


def test_rows_are_chosen_by_the_seed_and_keep_their_order() -> None:
    every = [DataRow(str(i), None, i + 1) for i in range(100)]
    chosen = [row.number for row in select(every, 20, 3)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 20
    assert chosen == [row.number for row in select(every, 20, 3)]
    assert chosen != [row.number for row in select(every, 20, 4)]
    assert set(chosen) < {row.number for row in select(every, 30, 3)}


GOOD = {"text": "a", "label": 1}


@pytest.mark.parametrize(
    ("name", "lines", "options", "message", "hint"),
    [
        ("a.jsonl", [GOOD, {"txt": "b"}], {}, "row 2: no field 'text'", "its fields are 'txt'"),
        ("a.jsonl", [GOOD, {"text": None}], {}, "row 2: nothing in field 'text'", None),
        ("a.jsonl", [GOOD], {"label": "y"}, "row 1: no field 'y'", "'text', 'label'"),
        ("a.jsonl", [GOOD, '{"text": \n'], {}, "row 2: not JSON", None),
        ("a.jsonl", ["[1]\n"], {}, "row 1: not a JSON object", None),
        ("a.jsonl", [], {}, "holds no rows", None),
        ("a.json", [GOOD], {}, "is no .jsonl, .csv, .txt or .parquet file", "a hub id"),
        ("a.jsonl", [GOOD], {"split": "test"}, "calibration.split is for hub data sets", None),
        ("a.jsonl", [GOOD], {"config": "en"}, "calibration.config is for hub data sets", None),
        ("a.jsonl", [GOOD], {"text": ["text", "other"]}, "row 1: no field 'other'", None),
        ("a.jsonl", [GOOD], {"text": ["text", "label"]}, "row 1: sentence pairs need two texts", None),
        ("a.csv", ["text,label\nx,1\ny\n"], {"label": "label"}, "row 2: nothing in field 'label'", None),
        ("a.csv", ['text\n"x\n'], {}, "not CSV", None),
        ("a.txt", ["x\n"], {"label": "label"}, "row 1: no field 'label'", None),
    ],
)
def test_bad_files(
    name: str, lines: list[Any], options: dict[str, Any], message: str, hint: str | None, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        rows.read(jsonl(tmp_path / name, *lines), folder=tmp_path, **options)
    assert f"calibration data {name}: {message}" in str(caught.value)
    assert hint is None or hint in (caught.value.hint or "")


def test_bad_places(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe4\xf6\n")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/1.png").touch()
    (tmp_path / "empty").mkdir()
    for name, label, message in (
        ("none.jsonl", None, "no such file"),
        ("none", None, "no such file"),
        ("here/none.jsonl", None, "no such file"),
        ("latin.txt", None, "not UTF-8"),
        ("empty", None, "holds no pictures"),
        ("flat", "label", "1.png lies in no folder named after its label"),
    ):
        with pytest.raises(InputError, match=message):
            rows.read(name, folder=tmp_path, label=label)


TWO = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}


@pytest.mark.parametrize(
    ("labels", "config", "want"),
    [
        ([0, 1, "1"], TWO, [0, 1, 1]),
        (["good", "bad"], TWO, [1, 0]),
        ([1.0], TWO, [1]),
        (["0.5", 2], {"id2label": {"0": "LABEL_0"}}, [0.5, 2.0]),
        ([0.5], {"problem_type": "regression", "num_labels": 1}, [0.5]),
        ([2], TWO, "row 1: label 2 does not fit a head of 2 labels"),
        ([1, -1], TWO, "row 2: label -1 does not fit a head of 2 labels"),
        (["ugly"], TWO, "row 1: label 'ugly' does not fit the head, whose labels are bad, good"),
        ([0.5], TWO, "row 1: label 0.5 does not fit the head"),
        (["x"], {"problem_type": "regression"}, "row 1: label 'x' is no number"),
    ],
)
def test_labels(labels: list[Any], config: dict[str, Any], want: Any) -> None:
    given = [DataRow("", label, number) for number, label in enumerate(labels, 1)]
    if isinstance(want, str):
        with pytest.raises(InputError, match=want.replace(".", r"\.")):
            class_labels(given, config)
    else:
        assert class_labels(given, config) == want


@pytest.mark.parametrize(
    ("architecture", "task", "fits"),
    [
        ("BertForSequenceClassification", "text-classification", True),
        ("BertModel", "text-classification", False),
        ("LlamaForCausalLM", "text-generation", True),
        ("GPT2LMHeadModel", "causal-lm", True),
        ("BertForSequenceClassification", "causal-lm", False),
        ("ViTForImageClassification", "image-classification", True),
        ("ViTModel", "image-classification", False),
    ],
)
def test_heads(architecture: str, task: str, fits: bool) -> None:
    if fits:
        check_head({"architectures": [architecture]}, task)
    else:
        with pytest.raises(InputError, match=f"task {task} needs .* but this is {architecture}"):
            check_head({"architectures": [architecture]}, task)


BERT = {"architectures": ["BertForSequenceClassification"], "max_position_embeddings": 32, **TWO}


@pytest.mark.parametrize(
    ("calibration", "labelled", "config", "message"),
    [
        ({"sequences": 9}, False, BERT, "8 rows, but 9 needed"),
        ({"sequences": 2}, True, BERT, None),
        ({"length": 33}, False, BERT, "calibration.length is 33, but the model has 32 positions"),
        ({"task": "causal-lm"}, False, BERT, "task causal-lm needs a model"),
        ({"task": "image-classification"}, False, BERT, "task image-classification needs a model"),
        ({"task": "text-classification"}, False, {"architectures": ["BertModel"]}, None),
        ({}, True, {"architectures": ["BertModel"]}, "task text-classification needs a model"),
        ({"metric": "pearson_spearman"}, True, BERT, "does not fit the head"),
    ],
)
def test_what_check_says_of_rows_and_head(
    calibration: dict[str, Any], labelled: bool, config: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    name = jsonl(tmp_path / "a.jsonl", *({"text": "a", "label": i % 2} for i in range(8)))
    asked = Calibration(data=name, **{"sequences": 4, "length": 16, **calibration})
    if message is None:
        search, held = split(asked, tmp_path, 0, config, labelled=labelled)
        assert not {row.number for row in search} & {row.number for row in held}
    else:
        with pytest.raises(InputError, match=message):
            split(asked, tmp_path, 0, config, labelled=labelled)


def tokenizer(folder: Path, **special: str) -> Path:
    """A tokenizer of single words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "</s>", "[CLS]", "a", "b", "c", "d"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=inner, unk_token="[UNK]", **special).save_pretrained(folder)
    return folder


def reader(folder: Path, architecture: str, task: str, length: int = 8, **settings: Any) -> Any:
    import transformers

    from deltamerge.calibrate.rows.batches import RowReader

    family = getattr(transformers, architecture.partition("For")[0] + "Config")
    config = family(architectures=[architecture], max_position_embeddings=16, **settings)
    return RowReader(folder, config, task=task, length=length)


def test_batches_of_texts(tmp_path: Path) -> None:
    tokenizer(tmp_path, pad_token="[PAD]")
    read = reader(tmp_path, "BertForSequenceClassification", "text-classification", length=4, num_labels=3)
    given = [DataRow("a b c", 2, 1), DataRow("d", 0, 2), DataRow("a b c d a b", 1, 3)]
    made = read.batches(given, size=2, labelled=True)
    ids = [b["input_ids"].tolist() for b in made.inputs]
    assert ids == [[[7, 0, 0], [4, 5, 6]], [[4, 5, 6, 7]]]  # by length, cut at 4
    assert made.inputs[0]["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert [label.tolist() for label in made.labels] == [[0, 2], [1]]


def test_words_are_the_tokens_that_texts_have(tmp_path: Path) -> None:
    """Neither special tokens nor others in brackets, nor ids that the model has no embedding of; none for pictures."""
    tokenizer(tmp_path / "texts", pad_token="[PAD]", sep_token="b")
    for known, words in ((30522, [4, 6, 7]), (7, [4, 6])):
        settings = {"vocab_size": known}
        read = reader(tmp_path / "texts", "BertForSequenceClassification", "text-classification", **settings)
        assert read.words.tolist() == words
    pytest.importorskip("PIL.Image")
    image_processor(tmp_path)
    assert reader(tmp_path, "ViTForImageClassification", "image-classification").words.tolist() == []


def test_rows_that_make_no_token(tmp_path: Path) -> None:
    tokenizer(tmp_path, pad_token="[PAD]")
    read = reader(tmp_path, "BertForSequenceClassification", "text-classification")
    with pytest.raises(InputError, match="2 rows make no token"):
        read.batches([DataRow("", None, 1), DataRow(" ", None, 2), DataRow("a", None, 3)], size=2)


def test_batches_of_pairs_and_steps(tmp_path: Path) -> None:
    tokenizer(tmp_path, pad_token="[PAD]")
    read = reader(tmp_path, "BertForSequenceClassification", "text-classification")
    some = [DataRow(("a", "b c"), None, i) for i in range(5)]
    made, steps = read.steps(some, step=3, size=2)
    assert [b["input_ids"].shape[0] for b in made.inputs] == [2, 1, 2]
    assert made.inputs[0]["input_ids"].tolist() == [[4, 5, 6]] * 2
    assert steps == [[0, 1], [2]]
    assert read.steps(some, step=4, size=2)[1] == steps  # not of 4 rows and 1


def test_language_models_pad_with_the_end_token_and_do_not_score_padding(tmp_path: Path) -> None:
    tokenizer(tmp_path, eos_token="</s>")
    read = reader(tmp_path, "LlamaForCausalLM", "text-generation")
    assert read.pad_token_id == 2
    given = [DataRow("a", "b", 1), DataRow("a b c", "d", 2)]
    made = read.batches(given, labelled=True)
    assert made.inputs[0]["input_ids"].tolist() == [[4, 5, 2, 2], [4, 5, 6, 7]]
    assert made.labels[0].tolist() == [[4, 5, -100, -100], [4, 5, 6, 7]]
    prompts = read.prompts(given)
    assert prompts.inputs[0]["input_ids"].tolist() == [[2, 2, 4], [4, 5, 6]]
    assert prompts.texts == [["b", "d"]]
    assert read.decode(torch.tensor([[4, 5, 2]])) == ["a b"]


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    bare, cls = tokenizer(tmp_path / "bare"), tokenizer(tmp_path / "cls", cls_token="[CLS]", eos_token="</s>")
    for name, config in (("none", "{}"), ("empty", '{"model_type": "qwen3"}')):  # transformers makes one for the second
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    for folder, message in (
        (bare, "no pad token"),
        (cls, "no pad token"),
        (tmp_path / "none", "no usable tokenizer"),
        (tmp_path / "empty", "no usable tokenizer: its vocabulary is empty"),
    ):
        with pytest.raises(InputError, match=message):
            reader(folder, "BertForSequenceClassification", "text-classification")
    tokenizer(tmp_path / "good", pad_token="[PAD]")
    with pytest.raises(InputError, match=r"calibration.length is 17, but the model has 16 positions"):
        reader(tmp_path / "good", "BertForSequenceClassification", "text-classification", length=17)


def test_batches_of_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image_processor(tmp_path)
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True)
        image.new("L", (9, 7), 128).save(tmp_path / "pictures" / name)
    labels: Any = {"id2label": {0: "dog", 1: "cat"}, "label2id": {"dog": 0, "cat": 1}}
    read = reader(tmp_path, "ViTForImageClassification", "image-classification", **labels)
    found = rows.read("pictures", folder=tmp_path, label="label")
    made = read.batches(found, labelled=True)
    assert made.inputs[0]["pixel_values"].shape == (2, 3, 8, 8)
    assert made.labels[0].tolist() == [1, 0]
    (tmp_path / "pictures/cat/1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"row 1: .*1\.png is no readable picture"):
        read.batches(found)


def test_rows_need_no_torch() -> None:
    import subprocess
    import sys

    names = ("rows", "q.search", "stage", "values")
    code = "".join(f"import deltamerge.calibrate.{n}; " for n in names) + "import sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
