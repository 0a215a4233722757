"""config.json and tokenizer files whose values have other types: used, or refused in one line, never a crash."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import make_plan, run
from vocabularies import three_models

from deltamerge.errors import InputError
from deltamerge.models.tokenizer_files import COPIED

RECIPE = """\
base_model: ./base
merge_method: task_arithmetic
models:
  - {model: ./a, parameters: {weight: 0.6}}
  - {model: ./b, parameters: {weight: 0.5}}
tokenizer: {source: union, pad_to_multiple_of: 8}
chat_template: auto
dtype: float32
"""
OTHERS: tuple[Any, ...] = (
    None,
    True,
    -1,
    3,
    1.5,
    10**12,
    "x",
    "\ud800",
    [],
    [3],
    ["x"],
    [None],
    [[]],
    [{}],
    {},
    {"x": 3},
)
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
GENERATION = {"eos_token_id": [2, 3], "pad_token_id": 0, "suppress_tokens": [5], "forced": {"bos_token_id": 1}}
NAMED = {"label2id": {"a": 0}, "id2label": {"0": "a"}, "text_config": {"vocab_size": 46}, "problem_type": "x"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = three_models(tmp_path_factory.mktemp("types"))
    shutil.copytree(folder / "a", folder / "whole")
    (folder / "whole" / "generation_config.json").write_text(json.dumps(GENERATION))
    tokens = json.loads((folder / "whole" / "tokenizer_config.json").read_text())
    decoder = {"0": {"content": "<pad>", "special": True}}
    more = {"added_tokens_decoder": decoder, "additional_special_tokens": ["<|im_start|>"], "chat_template": "A"}
    (folder / "whole" / "tokenizer_config.json").write_text(json.dumps(tokens | more))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def places(value: Any, at: tuple[Any, ...] = (), deepest: int = 4) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value, of long lists and objects the first entries."""
    yield at
    if len(at) == deepest:
        return
    some = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for count, (key, inner) in enumerate(some):
        if count < 40:
            yield from places(inner, (*at, key), deepest)


def put(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    if not at:
        return new
    changed = copy.copy(value)
    changed[at[0]] = put(value[at[0]], at[1:], new)
    return changed


def changed(folder: Path, file: str) -> Iterator[tuple[str, str]]:
    """What stands where, and the file with it."""
    whole = json.loads((folder / "whole" / file).read_text())
    if file == "config.json":
        whole |= NAMED
    for at in places(whole):
        if at[:3] in ((("model", "vocab", f"w{i}")) for i in range(3, 40)):
            continue  # one word is as good as another
        for new in OTHERS:
            yield f"{'.'.join(map(str, at))} = {new!a}", json.dumps(put(whole, at, new))


def attempt(models: Path, file: str, text: str, out: Path | None = None) -> InputError | None:
    """Merge with the file in place of the model's own; its error, which is one line."""
    shutil.rmtree(models / "a")
    shutil.copytree(models / "whole", models / "a")
    (models / "a" / file).write_text(text)
    try:
        if out is None:
            make_plan(models / "recipe.yaml", device="cpu", workers=1)
        else:
            run(models / "recipe.yaml", out, device="cpu", workers=1, force=True)
    except InputError as error:
        return error
    return None


@pytest.mark.parametrize("file", FILES)
def test_a_value_of_another_type_is_used_or_refused(models: Path, file: str) -> None:
    some = list(changed(models, file))
    for what, text in some[:: len(some) // 40]:
        try:
            error = attempt(models, file, text)
        except Exception as error:
            pytest.fail(f"{file}: {what}: {error!r}")
        assert error is None or "\n" not in str(error), what


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_every_value_of_another_type_is_used_or_refused(models: Path, tmp_path: Path, file: str) -> None:
    for what, text in changed(models, file):
        try:
            attempt(models, file, text, tmp_path / "out")
        except Exception as error:
            pytest.fail(f"{file}: {what}: {error!r}")


NAMED_FAULTS = {
    ("config.json", '"architectures": 3'): "architectures must be a list of texts, got a number",
    ("config.json", '"architectures": [null]'): "architectures must be a list of texts, got a list",
    ("config.json", '"vocab_size": "46"'): "vocab_size must be an integer, got text",
    ("config.json", '"text_config": {"vocab_size": []}'): "text_config: vocab_size must be an integer, got a list",
    ("config.json", '"label2id": {"a": "b"}'): "label2id: 'a' must be an integer, got text",
    ("tokenizer.json", '"added_tokens": 3'): "added_tokens must be a list, got a number",
    ("tokenizer.json", '"added_tokens": [3]'): "added_tokens: entry 0 must be an object with a text as content",
    ("tokenizer.json", '"model": {"vocab": [3]}'): "model.vocab: entry 0 must be a list of a token and its score",
    ("tokenizer_config.json", '"additional_special_tokens": 3'): "must be a list of tokens, got a number",
    ("tokenizer_config.json", '"chat_template": "\\ud800"'): "chat_template: half a surrogate pair, which is no text",
}


@pytest.mark.parametrize(("file", "text"), NAMED_FAULTS, ids=[f"{f}-{t[1:22]}" for f, t in NAMED_FAULTS])
def test_the_error_names_file_and_key(models: Path, file: str, text: str) -> None:
    whole = json.loads((models / "whole" / file).read_text())
    key = json.loads(f"{{{text}}}")
    error = attempt(models, file, json.dumps(whole | key))
    assert error is not None
    assert re.search(re.escape(file), str(error))
    assert NAMED_FAULTS[file, text] in str(error)


@pytest.mark.parametrize("file", COPIED)
def test_a_broken_small_file_is_refused_before_anything_is_read(models: Path, tmp_path: Path, file: str) -> None:
    for name in ("base", "tune"):
        shutil.copytree(models / "whole", tmp_path / name)
    (tmp_path / "tune" / file).write_text('{"a": 1,')
    (tmp_path / "recipe.yaml").write_text("base_model: ./base\nmodels: [{model: ./tune}]\n")
    with pytest.raises(InputError, match=re.escape(f"./tune: {file}: is not valid JSON")):
        make_plan(tmp_path / "recipe.yaml", device="cpu")
