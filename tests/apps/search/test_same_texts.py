"""The share of completions that a merge says token by token as the fine-tune, against transformers alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from conftest import tiny_llama

from deltamerge.apps.search.evaluate import SCORE_KEPT, ScoredTask, _files, measured, open_model, under_head
from deltamerge.calibrate.rows.files import read
from deltamerge.recipe.schema import Calibration
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo, viewed
from deltamerge.tensors.views import cast


def test_texts_are_the_same_where_every_token_is(tmp_path: Path) -> None:
    import transformers

    base = tiny_llama(tmp_path / "base", seed=0, dtype=torch.float32, tokenizer=True)
    tiny_llama(tmp_path / "a", seed=1, base=base, sigma=0.004, dtype=torch.float32, tokenizer=True)
    numbers = torch.randint(4, 96, (40, 8), generator=torch.Generator().manual_seed(3)).tolist()
    texts = [[f"w{number}" for number in row] for row in numbers]
    lengths = [1 + i % 4 for i in range(len(texts))]
    rows = [
        {"prompt": " ".join(words[:-n]), "completion": " " + " ".join(words[-n:])}
        for words, n in zip(texts, lengths, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / one).eval() for one in ("a", "base")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    same = []
    for words, n in zip(texts, lengths, strict=True):
        encoded = tokenizer(" ".join(words), return_tensors="pt")
        with torch.no_grad():
            said, other = (model(**encoded).logits[0].argmax(-1)[-n - 1 : -1] for model in models)
        same.append(bool((said == other).all()))
    with Reader() as reader:
        settings = Calibration.model_validate({"data": "rows.jsonl", "length": 16, "precision": "float32"})
        task = ScoredTask("a", open_model(str(tmp_path / "a"), None), settings, tmp_path, reader, "cpu")
        sheet = task.sheet(read("rows.jsonl", folder=tmp_path), [], {SCORE_KEPT})
        others = under_head(task, open_model(str(base), None), "base")
        ((own, found),) = measured([(task, sheet)], [[task.own, others]])
    assert own[SCORE_KEPT] == 1
    assert 0.1 < sum(same) / len(same) < 0.9
    assert found[SCORE_KEPT] == sum(same) / len(same)


def test_files_that_are_read_through_views_count_as_the_models(tmp_path: Path) -> None:
    model = open_model(str(tiny_llama(tmp_path / "a", seed=0, dtype=torch.float32)), None)
    (tmp_path / "empty").mkdir()
    views = {
        name: TensorInfo(name, viewed(cast, (info.tensor,), info.shape, "BF16")) for name, info in model.tensors.items()
    }
    assert _files(replace(model, path=tmp_path / "empty", tensors=views)) == {tmp_path / "a" / "model.safetensors"}
