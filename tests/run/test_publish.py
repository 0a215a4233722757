"""push and run hf://, with the real huggingface_hub client against the small hub of test_hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from calls import call
from conftest import tiny_llama
from running import run
from small_hub import COMMIT, TOKEN, Hub

from deltamerge.files.hashes import hash_output

# huggingface_hub's own way of calling its http client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RECIPE = """\
base_model: org/base
models: [{model: org/tune, prune: {method: dare, density: 0.5}}]
"""


@pytest.fixture
def merged(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = server.repositories["org/base"] = tiny_llama(tmp_path / "hub" / "base", seed=1)
    server.repositories["org/tune"] = tiny_llama(tmp_path / "hub" / "tune", seed=2, base=base)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    folder = run(tmp_path / "recipe.yaml", tmp_path / "merged").folder
    (folder / "notes.txt").write_text("not of the merge")
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_pushed_merge_is_private_and_complete(server: Hub, merged: Path, capsys) -> None:
    code, out, err = call(capsys, "push", merged, "me/merged")
    assert (code, out) == (0, ""), err
    assert f"{server.endpoint}/me/merged/commit/{COMMIT}" in err
    pushed = server.repositories["me/merged"]
    assert server.private == {"me/merged"}
    assert {p.name: p.read_bytes() for p in pushed.iterdir()} == {
        p.name: p.read_bytes() for p in merged.iterdir() if p.name != "notes.txt"
    }
    assert TOKEN not in out + err


def test_no_path_of_this_machine_is_published(server: Hub, merged: Path, capsys, tmp_path: Path) -> None:
    base = tmp_path / "hub" / "base"
    for reference in (str(base), f"{base}@main", "~/base"):
        (tmp_path / "private.yaml").write_text(RECIPE.replace("base_model: org/base", f"base_model: {base}"))
        folder = run(tmp_path / "private.yaml", tmp_path / "private").folder
        text = (folder / "recipe.yaml").read_text().replace(f"base_model: {base}", f"base_model: {reference}")
        (folder / "recipe.yaml").write_text(text)
        lock = folder / "recipe.lock"
        entry = hash_output(folder / "recipe.yaml")
        said = yaml.safe_load(lock.read_text())
        said["outputs"]["recipe.yaml"] = {"hash": entry, "size": len(text.encode())}
        lock.write_text(yaml.safe_dump(said))
        before = len(server.requests)
        code, _, err = call(capsys, "push", folder, "me/private")
        assert (code, f"its recipe names paths of this machine: {reference}" in err) == (1, True)
        assert len(server.requests) == before
        shutil.rmtree(folder)


def test_public_must_be_said(server: Hub, merged: Path, capsys) -> None:
    assert call(capsys, "push", merged, "me/open", "--public")[0] == 0
    assert server.private == set()
    before = len(server.requests)
    code, _, err = call(capsys, "push", merged, "me/open")
    assert code == 2
    assert "me/open: is public" in err
    assert not any("/commit/" in path for _, path, _, _ in server.requests[before:])


def test_what_arrived_is_not_sent_again(server: Hub, merged: Path, capsys) -> None:
    call(capsys, "push", merged, "me/merged")
    before = len(server.requests)
    assert call(capsys, "push", merged, "me/merged")[0] == 0
    assert not any(method == "PUT" for method, *_ in server.requests[before:])


def test_a_folder_that_is_not_what_its_lock_says_is_not_pushed(server: Hub, merged: Path, capsys) -> None:
    (merged / "config.json").write_text("{}")
    code, _, err = call(capsys, "push", merged, "me/merged")
    assert code == 1
    assert "config.json" in err
    assert "me/merged" not in server.repositories


@pytest.mark.parametrize(
    ("status", "message"), [(401, "may not be written"), (403, "hf auth login"), (500, "answered 500")]
)
def test_a_hub_that_refuses(server: Hub, merged: Path, capsys, status: int, message: str) -> None:
    server.status = status
    code, _, err = call(capsys, "push", merged, "me/merged")
    assert code == 1
    assert message in err
    assert TOKEN not in err
    assert "Traceback" not in err


def test_an_upload_that_breaks_off_goes_on(server: Hub, merged: Path, capsys) -> None:
    server.broken = True
    code, _, err = call(capsys, "push", merged, "me/merged")
    assert code == 1
    assert "push again" in err
    server.broken = False
    assert call(capsys, "push", merged, "me/merged")[0] == 0
    assert (server.repositories["me/merged"] / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["../up", "a/b/c", "me/x@main", ""])
def test_a_name_that_is_none(server: Hub, merged: Path, capsys, name: str) -> None:
    assert call(capsys, "push", merged, name)[0] == 2
    assert all(method != "POST" for method, *_ in server.requests)


def test_a_published_merge_is_run_again_to_the_same_bytes(server: Hub, merged: Path, capsys) -> None:
    call(capsys, "push", merged, "me/merged")
    code, out, err = call(capsys, "run", "hf://me/merged", "--out", "again", "--json")
    assert code == 0, err
    assert json.loads(out)["published"] == {"commit": COMMIT, "differs": []}
    assert f"the same bytes as hf://me/merged at {COMMIT[:12]}" in err
    assert Path("again/model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    code, _, err = call(capsys, "run", f"hf://me/merged@{COMMIT}")
    assert code == 0, err
    assert Path("merged-merged/model.safetensors").exists()


def test_other_bytes_are_named(server: Hub, merged: Path, capsys) -> None:
    call(capsys, "push", merged, "me/merged")
    lock = server.repositories["me/merged"] / "recipe.lock"
    lock.write_text(re.sub(r"(model.safetensors:\n\s+hash: blake3:)\w{6}", r"\g<1>000000", lock.read_text()))
    code, _, err = call(capsys, "run", "hf://me/merged", "--out", "again")
    assert code == 1
    assert f"not the bytes of hf://me/merged at {COMMIT[:12]}: model.safetensors" in err


def test_inputs_that_changed_are_refused(server: Hub, merged: Path, tmp_path: Path, capsys) -> None:
    call(capsys, "push", merged, "me/merged")
    lock = server.repositories["me/merged"] / "recipe.lock"
    lock.write_text(lock.read_text().replace(COMMIT, "f" * 40))
    code, _, err = call(capsys, "run", "hf://me/merged", "--out", "again")
    assert code == 1
    assert f"org/base@{'f' * 40}: has no revision" in err
    assert not Path("again").exists()


def test_a_merge_of_local_folders_cannot_be_run_elsewhere(server: Hub, merged: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "local.yaml").write_text(RECIPE.replace("org/", "./hub/"))
    folder = run(tmp_path / "local.yaml", tmp_path / "local").folder
    call(capsys, "push", folder, "me/local")
    code, _, err = call(capsys, "run", "hf://me/local")
    assert code == 1
    assert "./hub/base, ./hub/tune" in err


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf://org/tune", "has no recipe.yaml on the hub"),
        ("hf://org/nothing", "no such model on the hub"),
        ("hf://", "not a hub id"),
        ("hf://../../x", "not a hub id"),
    ],
)
def test_what_is_no_published_merge(server: Hub, merged: Path, capsys, reference: str, message: str) -> None:
    code, out, err = call(capsys, "run", reference)
    assert (code, out) == (1, "")
    assert f"error: {reference}: {message}" in err
    assert "local folder" not in err


@pytest.mark.parametrize(("offline", "message"), [(True, "HF_HUB_OFFLINE is set"), (False, "cannot be reached")])
def test_a_published_merge_that_is_out_of_reach(
    server: Hub, merged: Path, capsys, monkeypatch, offline: bool, message: str
) -> None:
    """No local folder was looked for, so none is spoken of."""
    from huggingface_hub import constants

    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    code, out, err = call(capsys, "run", "hf://org/nothing")
    assert (code, out) == (1, "")
    assert "error: hf://org/nothing: not (wholly) in the hub's cache" in err
    assert message in err
    assert "folder" not in err
