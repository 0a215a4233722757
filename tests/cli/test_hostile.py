"""Files made by strangers to harm: each is refused by name, and nothing of the user's gets into an output."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import make_checkpoint, write_tokenizer
from running import make_plan, run
from safetensors.numpy import save_file
from xxhash import xxh3_64_hexdigest

from deltamerge.calibrate.rows.files import DataRow
from deltamerge.calibrate.rows.files import read as read_rows
from deltamerge.calibrate.rows.heads import class_labels
from deltamerge.errors import DeltamergeError, InputError, VerifyError
from deltamerge.files.journal import read_journal
from deltamerge.formats.delta.manifest import Record
from deltamerge.models.adapter import open_adapter
from deltamerge.models.checkpoint import INDEX, open_checkpoint
from deltamerge.run import lock as locks
from deltamerge.run.card import front_matter
from deltamerge.tensors import patterns


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    weights = {f"layers.{i}.w": torch.ones(4, 4) * i for i in range(2)}
    make_checkpoint(tmp_path / "base", weights, shards=2)
    make_checkpoint(tmp_path / "a", {name: tensor + 1 for name, tensor in weights.items()}, shards=2)
    path = tmp_path / "r.yaml"
    path.write_text("base_model: ./base\nmodels: [{model: ./a}]\n")
    return path


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD, "tokenizer.json", "generation_config.json", "vocab.txt"])
@pytest.mark.parametrize("absolute", [True, False])
def test_links_that_leave_a_models_folder(recipe: Path, tmp_path: Path, name: str, absolute: bool) -> None:
    model = tmp_path / "a"
    secret = tmp_path / "secret"
    if (model / name).exists():
        (model / name).rename(secret)
    else:
        secret.write_text("{}")
    (model / name).symlink_to(secret if absolute else Path("../secret"))
    with pytest.raises(InputError, match=f"{name} is a link that leaves the folder"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (model / name).unlink()
    secret.rename(model / "inner")
    (model / name).symlink_to("inner")
    assert run(recipe, tmp_path / "out").folder.is_dir()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_that_leave_an_adapters_folder(recipe: Path, tmp_path: Path, name: str) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    factors = {"lora_A": np.ones((1, 4), np.float32), "lora_B": np.ones((4, 1), np.float32)}
    save_file(
        {f"base_model.model.layers.0.{n}.weight": v for n, v in factors.items()}, adapter / "adapter_model.safetensors"
    )
    (adapter / name).rename(tmp_path / "secret")
    (adapter / name).symlink_to("../secret")
    with pytest.raises(InputError, match=f"{name} is a link that leaves the folder"):
        open_adapter(adapter, reference="lora")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_links_among_the_files_of_a_tokenizer(recipe: Path, tmp_path: Path, name: str) -> None:
    """Of a model that lends its tokenizer or template only."""
    write_tokenizer(tmp_path / "base", 4)
    write_tokenizer(tmp_path / "a", 4)
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "a" / name).unlink(missing_ok=True)
    (tmp_path / "a" / name).symlink_to(tmp_path / "secret")
    lent = "chat_template: ./a\n" if "chat" in name else "tokenizer_source: ./a\n"
    recipe.write_text(recipe.read_text() + lent)
    with pytest.raises(InputError, match=f"{name} is a link that leaves the folder"):
        run(recipe, tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARD])
def test_links_that_go_round(recipe: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / name).symlink_to(name)
    with pytest.raises(InputError, match=name):
        run(recipe, tmp_path / "out")


def test_a_target_that_is_a_link_to_itself(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(DeltamergeError, match="out: "):
        run(recipe, tmp_path / "out")


@pytest.mark.parametrize("text", [b'{"run":' + b"[" * 100_000 + b"}", b'{"run": ' + b"9" * 5000 + b"}", b"\xff"])
def test_records_that_no_run_wrote(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(xxh3_64_hexdigest(text + b"\n").encode() + b" " + text + b"\n")
    assert read_journal(path) == ([], 0)


ROWS = {
    "deep": (b'{"text": ' + b"[" * 100_000, "row 1: nested too deeply"),
    "digits": (b'{"text": ' + b"9" * 5000 + b"}", "row 1: not JSON"),
    "surrogate": (b'{"text": "\\ud800"}', "row 1: half a surrogate pair"),
    "fields": (b"{" + b",".join(b'"k%d": 1' % i for i in range(100_000)) + b"}", "row 1: no field 'text'"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_none(tmp_path: Path, case: str) -> None:
    raw, said = ROWS[case]
    (tmp_path / "rows.jsonl").write_bytes(raw)
    with pytest.raises(InputError, match=said) as caught:
        read_rows("rows.jsonl", folder=tmp_path)
    assert len(f"{caught.value} {caught.value.hint}") < 1000


def test_rows_without_end(tmp_path: Path) -> None:
    with (tmp_path / "rows.txt").open("wb") as file:
        file.truncate(20_000_000_000)  # of zeros, which take no disk
    with pytest.raises(InputError, match="has 20,000,000,000 bytes"):
        read_rows("rows.txt", folder=tmp_path)


@pytest.mark.parametrize("label", [float("inf"), 10**400, [1], "x" * 10_000])
@pytest.mark.parametrize("outputs", [1, 2])
def test_labels_that_are_none(label: object, outputs: int) -> None:
    if (label, outputs) == (float("inf"), 1):
        return  # a number, if a bad one
    with pytest.raises(InputError, match="row 1: label") as caught:
        class_labels([DataRow("a", label, 1)], {"num_labels": outputs})
    assert len(str(caught.value)) < 1000


def test_a_model_in_a_linked_folder_is_the_users_choice(recipe: Path, tmp_path: Path) -> None:
    shutil.move(tmp_path / "a", tmp_path / "elsewhere")
    (tmp_path / "a").symlink_to("elsewhere")
    assert run(recipe, tmp_path / "out").folder.is_dir()


@pytest.mark.parametrize("name", ["config.json", SHARD, "tokenizer.json", "README.md"])
def test_a_pipe_is_not_waited_for(recipe: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "a" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "a" / name)
    if name in ("config.json", SHARD):
        with pytest.raises(InputError):
            run(recipe, tmp_path / "out")
    else:
        assert name not in {path.name for path in run(recipe, tmp_path / "out").folder.iterdir()} - {"README.md"}


CARDS = {
    "a list": "license: [mit, gpl]", "a table": "license: {a: b}", "no such date": "date: 2024-99-99\nlicense: mit",
    "deep": "license: " + "[" * 1500, "an object": "license: !!python/object:os.system ls", "a key": "{[1]: 2}",
    "laughs": "a: &a [x,x]\nb: &b [*a,*a]\nlicense: *b", "endless": "license: " + "x" * 10**6,
    "bytes": "license: \udcff",
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "deep")) for c in CARDS])
def test_nonsense_in_a_card_gives_no_licence(recipe: Path, tmp_path: Path, case: str) -> None:
    text = f"---\n{CARDS[case]}\n---\n"
    for model in ("base", "a"):
        (tmp_path / model / "README.md").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert not isinstance(front_matter(make_plan(recipe)).get("license"), list | dict)
    assert run(recipe, tmp_path / "out").folder.is_dir()


HEAD = "format: 1\noutputs: {}\n"
LOCKS = {
    "not UTF-8": b"\xff", "a list": b"[]", "deep": ("x: " + "[" * 100_000).encode(), "no outputs": b"format: 1",
    "no such date": (HEAD + "x: 2024-99-99").encode(), "an object": (HEAD + "x: !!python/object:os.system ls").encode(),
    "a number": b"format: 1\noutputs: 3", "a file of text": b"format: 1\noutputs: {a: b}",
    "format": b"format: 9\noutputs: {}",
    "numbers as names": b"format: 1\noutputs: {1: {hash: a, size: 1}, a: {hash: a, size: 1}}",
    "inputs": (HEAD + "inputs: {./a: true}").encode(), "large": HEAD.encode() + b"#" * (1 << 26),
    "endless": (HEAD + "inputs: &a {./a: *a}").encode(), "many": f"{HEAD}x: [{'a,' * 1_100_000}]".encode(),
    "q": (HEAD + "calibration: {./a: {q: [1]}}").encode(),
}  # fmt: skip


@pytest.mark.parametrize("case", LOCKS)
def test_locks_that_are_none(tmp_path: Path, case: str) -> None:
    (tmp_path / "recipe.lock").write_bytes(LOCKS[case])
    with pytest.raises(InputError, match=r"recipe\.lock") as caught:
        locks.verify(tmp_path, 1)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "a/b", ""])
def test_a_lock_names_only_files_of_its_folder(tmp_path: Path, name: str) -> None:
    lock = {"format": 1, "outputs": {name: {"hash": "blake3:0", "size": 0}}}
    (tmp_path / "recipe.lock").write_text(yaml.safe_dump(lock))
    with pytest.raises(VerifyError, match=r"not a file name|missing"):
        locks.verify(tmp_path, 1)


def test_rows_of_q_must_fit_and_be_safetensors(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(
        "base_model: ./base\nmodels: [{model: ./a, prune: {method: magnitude, density: 0.5, "
        "q: {objective: layer_mse, scope: row}}}]\ncalibration: {data: x.txt}\n"
    )
    (tmp_path / "x.txt").write_text("a\n" * 100)
    plan = make_plan(recipe, data=False)
    record = {
        "objective": "layer_mse",
        "scope": "row",
        "search": plan.specs[plan.stages[0]].search,
        "q": {},
        "rows": "r.rows",
    }
    path = tmp_path / "r.lock"
    path.write_text(yaml.safe_dump({"format": 1, "outputs": {}, "calibration": {"./a": record}}))
    for content, message in ((np.ones((7, 1), np.float32), "has shape"), (b"junk", "truncated")):
        if isinstance(content, bytes):
            (tmp_path / "r.rows").write_bytes(content)
        else:
            save_file({"./a:layers.0.w": content}, tmp_path / "r.rows")
        with pytest.raises(DeltamergeError, match=message):
            locks.Lock.read(path).calibrated(plan)


def test_shapes_of_empty_tensors_do_not_overflow(recipe: Path, tmp_path: Path) -> None:
    for model in ("base", "a"):
        path = tmp_path / model / SHARD
        text = b'{"layers.1.w":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'
        path.write_bytes(len(text).to_bytes(8, "little") + text)
    run(recipe, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tensors["layers.1.w"].shape == (0, 1 << 62)


def test_a_delta_has_as_few_dimensions_as_a_tensor() -> None:
    with pytest.raises(ValueError, match="at most 64"):
        Record.model_validate(
            {"shape": [1 << 60] * 65, "dtype": "F32", "encoding": "dense", "count": 0, "result": "0" * 64}
        )


def test_a_pattern_of_the_recipe_that_would_search_for_ever(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    recipe.write_text(recipe.read_text() + "prune: {method: dare, density: 0.5, exclude: ['(.|.|.|.|.)*[A-Z]$']}\n")
    with pytest.raises(InputError, match=r"takes more than 0\.05 s to search"):
        make_plan(recipe)
