"""The real huggingface_hub client against a small hub on 127.0.0.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load_tensors, tiny_llama, write_json
from running import make_plan, run
from safetensors.torch import save_file
from small_hub import COMMIT, TOKEN, Hub

from deltamerge.errors import InputError
from deltamerge.formats import safetensors as writer
from deltamerge.models import hub, hub_client
from deltamerge.models.checkpoint import open_checkpoint
from deltamerge.run.partition import Part
from deltamerge.tensors.reader import Reader

LAST = "model-00003-of-00003.safetensors"


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def model(server: Hub, tmp_path: Path) -> Path:
    """org/model: three shards, a tokenizer, and files that no merge needs."""
    folder = tiny_llama(tmp_path / "hub" / "model", seed=1, shards=3, tokenizer=True)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(bytes(1000))
    (folder / "consolidated.safetensors").write_bytes(bytes(1000))
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    server.repositories["org/model"] = folder
    return folder


def refused(reference: str, folder: Path, message: str, hint: str = "", *, weights: bool = False) -> None:
    with pytest.raises(InputError, match=message) as caught:
        hub.open_model(reference, folder, weights=weights)
    assert str(caught.value).startswith(f"{reference}: ")
    assert "\n" not in str(caught.value)
    assert hint in (caught.value.hint or "")
    assert TOKEN not in f"{caught.value} {caught.value.hint}"


def test_local_folders_come_first(tmp_path: Path) -> None:
    for name in ("org/model", "org/model@v1", "a+b"):
        tiny_llama(tmp_path / name, seed=1)
        checkpoint = hub.open_model(name, tmp_path, weights=False)
        assert (checkpoint.reference, checkpoint.path) == (name, tmp_path / name)
        assert (checkpoint.hub_id, checkpoint.revision) == (None, None)
    assert hub.open_model(str(tmp_path / "a+b"), Path("/nowhere"), weights=True).path == tmp_path / "a+b"


@pytest.mark.parametrize("reference", ["./org/model", "../model", "/org/model", "~/model", "a/b/c", "a b", "a@b@c"])
def test_what_is_neither_folder_nor_hub_id(tmp_path: Path, reference: str) -> None:
    (tmp_path / "alone").mkdir()
    said = "no such folder$" if reference[0] in "/~" else f"no such folder in {tmp_path / 'alone'}$"
    refused(reference, tmp_path / "alone", said, "org/name@revision")


def test_hub_ids_cannot_leave_the_cache(tmp_path: Path, server: Hub) -> None:
    for reference in ("org/model@../../x", "org/model@a/../../x", "org/model@/etc", "org/..@x", "org/--x"):
        with pytest.raises(InputError, match="no such"):
            hub.open_model(reference, tmp_path, weights=False)
    assert not server.requests


def adapter(server: Hub, tmp_path: Path) -> Path:
    """org/lora: a rank-2 LoRA of one layer of `model`."""
    folder = tmp_path / "hub" / "lora"
    folder.mkdir(parents=True)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    server.repositories["org/lora"] = folder
    return folder


def test_adapters(server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter(server, tmp_path)
    refused("org/lora", tmp_path, "is an adapter, not a model")
    for reference in ("org/model+org/lora", "org/model@v1+org/lora@v1", f"{model}+org/lora", f"org/model+{folder}"):
        checkpoint = hub.open_model(reference, tmp_path, weights=False)
        lora = checkpoint.adapter
        assert lora is not None
        assert checkpoint.reference == reference
        assert (lora.hub_id, lora.revision) in (("org/lora", COMMIT), (None, None))
        assert sum(info.kind != "stored" for info in checkpoint.tensors.values()) == 1
    assert all(span for _, span in server.fetched("adapter_model.safetensors"))
    for reference in ("org/model+org/model", "org/model+org/nothing"):
        with pytest.raises(InputError, match=r"has no adapter_config.json|no such model on the hub"):
            hub.open_model(reference, tmp_path, weights=False)
    (tmp_path / "r.yaml").write_text("base_model: org/model\nmodels: [{model: org/model+org/lora}]\n")
    lock = run(tmp_path / "r.yaml").lock
    assert lock["inputs"]["org/model+org/lora"]["commit"] == f"{COMMIT}+{COMMIT}"
    pins = {"org/model": COMMIT, "org/model+org/lora": f"{COMMIT}+{COMMIT}"}
    pinned = make_plan(tmp_path / "r.yaml", pins=pins).inputs.tunes[0].checkpoint
    assert pinned.reference == "org/model+org/lora"
    assert pinned.adapter is not None
    assert (pinned.revision, pinned.adapter.reference) == (COMMIT, f"org/lora@{COMMIT}")
    (model / "consolidated.safetensors").unlink()
    old, new = load_tensors(model), load_tensors(tmp_path / "r-merged")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}
    offline(monkeypatch)
    assert hub.open_model("org/model+org/lora", tmp_path, weights=True).adapter is not None


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_headers_without_weights(server: Hub, model: Path, tmp_path: Path, revision: str) -> None:
    checkpoint = hub.open_model(f"org/model{revision}", tmp_path, weights=False)
    truth = open_checkpoint(model)
    assert checkpoint.reference == f"org/model{revision}"
    assert (checkpoint.hub_id, checkpoint.revision) == ("org/model", COMMIT)
    assert checkpoint.config == truth.config
    for name, info in truth.tensors.items():
        found = checkpoint.tensors[name]
        assert (found.dtype, found.shape, found.begin, found.nbytes) == (
            info.dtype,
            info.shape,
            info.begin,
            info.nbytes,
        )
        assert found.path.name == info.path.name
    assert [file.name for file in checkpoint.files] == [file.name for file in truth.files]
    assert not any(file.exists() for file in checkpoint.files)
    shards = server.fetched(".safetensors")
    assert len(shards) == 3
    assert all(method == "GET" and span is not None for method, span in shards)


def test_a_long_header_takes_a_second_request(
    server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_client, "FIRST_BYTES", 100)
    checkpoint = hub.open_model("org/model", tmp_path, weights=False)
    assert checkpoint.tensors.keys() == open_checkpoint(model).tensors.keys()
    assert len(server.fetched(".safetensors")) == 6


def test_weights_are_downloaded_once_and_only_what_is_needed(server: Hub, model: Path, tmp_path: Path) -> None:
    checkpoint = hub.open_model("org/model", tmp_path, weights=True)
    truth = open_checkpoint(model)
    assert (checkpoint.hub_id, checkpoint.revision) == ("org/model", COMMIT)
    have = {str(p.relative_to(checkpoint.path)) for p in checkpoint.path.rglob("*") if p.is_file()}
    extra = {"pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "modeling_evil.py"}
    assert have == {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()} - extra
    with Reader() as reader:
        for name, info in truth.tensors.items():
            ours, theirs = bytearray(info.nbytes), bytearray(info.nbytes)
            reader.read_into(checkpoint.tensors[name], 0, ours)
            reader.read_into(info, 0, theirs)
            assert ours == theirs
    server.requests.clear()
    assert hub.open_model("org/model", tmp_path, weights=True).path == checkpoint.path
    assert hub.open_model("org/model", tmp_path, weights=False).path == checkpoint.path
    assert not [path for method, path, _, _ in server.requests if method == "GET" and "/resolve/" in path]
    server.requests.clear()
    assert hub.open_model(f"org/model@{COMMIT}", tmp_path, weights=False).path == checkpoint.path
    assert not server.requests


@pytest.mark.parametrize("weights", [False, True])
def test_offline_uses_the_cache(
    server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool
) -> None:
    hub.open_model("org/model", tmp_path, weights=True)
    hub.open_model("org/model@v1", tmp_path, weights=False)
    offline(monkeypatch)
    server.requests.clear()
    for revision in ("", "@main", "@v1", f"@{COMMIT}"):
        checkpoint = hub.open_model(f"org/model{revision}", tmp_path, weights=weights)
        assert (checkpoint.hub_id, checkpoint.revision) == ("org/model", COMMIT)
    assert not server.requests


@pytest.mark.parametrize("weights", [False, True])
def test_offline_and_not_in_the_cache(
    server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool
) -> None:
    offline(monkeypatch)
    refused(
        "org/model", tmp_path, "not .wholly. in the hub's cache, and HF_HUB_OFFLINE is set", "unset", weights=weights
    )


def test_offline_with_headers_only(server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.open_model("org/model", tmp_path, weights=False)
    offline(monkeypatch)
    for weights in (False, True):
        refused("org/model", tmp_path, "not .wholly. in the hub's cache", "unset", weights=weights)


@pytest.mark.parametrize("weights", [False, True])
def test_faults_of_a_repository(server: Hub, model: Path, tmp_path: Path, weights: bool) -> None:
    refused(
        "org/nothing", tmp_path, "no such folder in .*, and no such model on the hub", "hf auth login", weights=weights
    )
    refused("org/model@v7", tmp_path, "has no revision v7", "tree/main", weights=weights)
    server.gated.add("org/model")
    refused("org/model", tmp_path, "is gated", f"{server.endpoint}/org/model", weights=weights)


@pytest.mark.parametrize("weights", [False, True])
def test_repositories_without_a_usable_model(server: Hub, tmp_path: Path, weights: bool) -> None:
    for name, file in (("pickled", "pytorch_model.bin"), ("adapter", "adapter_config.json"), ("empty", "README.md")):
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        (folder / file).write_text("{}")
        server.repositories[f"org/{name}"] = folder
    refused("org/adapter", tmp_path, "is an adapter, not a model", weights=weights)
    refused("org/pickled", tmp_path, "only PyTorch pickle files", "pickles: true", weights=weights)
    refused("org/empty", tmp_path, "no safetensors weights", weights=weights)
    write_json(server.repositories["org/pickled"] / "config.json", {})
    refused("org/pickled", tmp_path, "only PyTorch pickle files", "pickles: true", weights=weights)


def test_torchs_files_on_the_hub_are_downloaded_where_they_are_allowed(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "old"
    folder.mkdir(parents=True)
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()}
    torch.save(tensors, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {"model_type": "test"})
    server.repositories["org/old"] = folder
    found = hub.open_model("org/old", tmp_path, weights=False, pickles=True)
    assert {name: info.shape for name, info in found.tensors.items()} == {"w": (2, 3), "b": (2,)}
    (tmp_path / "r.yaml").write_text("merge_method: passthrough\nmodels: [{model: org/old}]\npickles: true\n")
    merged = load_tensors(run(tmp_path / "r.yaml").folder)
    assert all(torch.equal(merged[name], tensors[name]) for name in tensors)


def test_a_lying_index_on_the_hub(server: Hub, model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../../../etc/x.safetensors"
    write_json(path, index)
    refused("org/model", tmp_path, "is not a plain .safetensors file name")


@pytest.mark.parametrize("weights", [False, True])
def test_files_that_the_hub_lacks(server: Hub, model: Path, tmp_path: Path, weights: bool) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()
    refused("org/model", tmp_path, "missing shard model-00002-of-00003.safetensors", weights=weights)
    (model / "config.json").unlink()
    refused("org/model", tmp_path, "has no config.json on the hub", weights=weights)


def test_a_truncated_file_on_the_hub(server: Hub, model: Path, tmp_path: Path) -> None:
    os.truncate(model / "model-00002-of-00003.safetensors", 3000)
    refused("org/model", tmp_path, "model-00002-of-00003.safetensors: the file is truncated")


def test_a_hub_in_trouble(server: Hub, model: Path, tmp_path: Path) -> None:
    server.status = 418
    refused("org/model", tmp_path, "answered 418|cannot be reached", "")


def test_an_unreachable_hub_leaves_the_cache(
    server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.open_model("org/model", tmp_path, weights=True)
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody + "/{repo_id}/resolve/{revision}/{filename}")
    for weights in (False, True):
        assert hub.open_model("org/model", tmp_path, weights=weights).revision == COMMIT
    refused(
        "org/other",
        tmp_path,
        "not .wholly. in the hub's cache, and http://127.0.0.1:9 cannot be reached",
        "HF_ENDPOINT",
    )


def test_the_token_goes_to_the_hub_and_nowhere_else(server: Hub, model: Path, tmp_path: Path) -> None:
    hub.open_model("org/model", tmp_path, weights=False)
    hub.open_model("org/model", tmp_path, weights=True)
    assert {token for _, path, _, token in server.requests if "org/model" in path} == {f"Bearer {TOKEN}"}
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert stored == []


def test_a_process_obeys_the_hubs_environment(server: Hub, model: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from deltamerge.models import hub\n"
        "c = hub.open_model('org/model', Path('.'), weights=sys.argv[1] == 'weights')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "print(c.revision, len(c.tensors))"
    )

    def run(argument: str, **more: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        environment = kept | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")} | more
        command = [sys.executable, "-c", script, argument]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    first = run("headers")
    assert first.stdout == f"{COMMIT} 21\n", first.stderr
    assert "UnreachableError" in run("weights", HF_HUB_OFFLINE="1").stderr
    assert run("weights").stdout == first.stdout
    server.status = 500
    assert run("weights", HF_HUB_OFFLINE="1").stdout == first.stdout


def test_local_references_need_no_hub_client(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "x", seed=0)
    script = (
        "import sys; from pathlib import Path; from deltamerge.models import hub\n"
        "hub.open_model('x', Path('.'), weights=True)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_a_recipe_runs_from_the_hub(server: Hub, tmp_path: Path) -> None:
    base = server.repositories["org/model"] = tiny_llama(tmp_path / "hub" / "base", seed=1, shards=3)
    server.repositories["org/tune"] = tiny_llama(tmp_path / "hub" / "tune", seed=2, base=base, shards=2)
    named = server.repositories["org/tune"] / "additional_chat_templates" / "tools.jinja"
    named.parent.mkdir()
    named.write_text("T")
    recipe = tmp_path / "hub.yaml"
    recipe.write_text("base_model: org/model\nmodels: [{model: org/tune@main, prune: {method: dare, density: 0.5}}]\n")
    planned = make_plan(recipe, device="cpu")
    assert not any(span is None for _, span in server.fetched(".safetensors"))
    folder = run(recipe, tmp_path / "out").folder
    assert load_tensors(folder).keys() == {output.name for output in planned.outputs}
    assert (folder / "additional_chat_templates" / "tools.jinja").read_text() == "T"
    locked = yaml.safe_load((folder / "recipe.lock").read_text())["inputs"]
    assert {entry["commit"] for entry in locked.values()} == {COMMIT}
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1])["base_model"] == ["org/model", "org/tune"]
    assert TOKEN not in "".join(p.read_text(errors="ignore") for p in folder.rglob("*.*"))


@pytest.mark.parametrize(
    ("name", "part"),
    [("config.json", None), ("tokenizer.json", Part(1, 2)), (LAST, None), (LAST, Part(1, 2)), (LAST, Part(2, 2))],
)
def test_a_damaged_cache_is_met_by_the_hubs_own_hashes(
    server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, part: Part | None
) -> None:
    monkeypatch.setattr(writer, "SAVE_SECONDS", 0.001)
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: org/model}]\noutput: {shard_size: 30KB}\n")
    truth = run(recipe, tmp_path / "truth" / "out")
    assert truth.lock["inputs"]["org/model"]["files"][name.replace("tokenizer", "config")]["size"]
    blob = (truth.plan.inputs.template.checkpoint.path / name).resolve()
    raw = blob.read_bytes()  # its size stays, and what is JSON
    blob.write_bytes(raw.replace(b"\n", b" ", 1) if name.endswith("json") else raw[:-1] + bytes([raw[-1] ^ 32]))
    if (name, part) == (LAST, Part(1, 2)):  # this part does not read it
        run(recipe, out, part=part)
        return
    with pytest.raises(InputError, match=f"{name}: differs from the hub's file: its hash is") as caught:
        run(recipe, out, part=part)
    assert str(blob) in (caught.value.hint or "")
    assert "--resume" not in (caught.value.hint or "")
    assert not out.exists()
    blob.unlink()
    run(recipe, out, resume=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in truth.folder.iterdir()}


def test_a_delta_on_the_hub_is_named_and_applied(server: Hub, tmp_path: Path) -> None:
    from deltamerge.run.apply import apply

    for name, seed in (("base", 0), ("tuned", 1)):
        base = server.repositories.get("org/base")
        server.repositories[f"org/{name}"] = tiny_llama(tmp_path / "hub" / name, seed=seed, base=base)
    recipe = tmp_path / "delta.yaml"
    recipe.write_text("base_model: org/base\nmodels: [{model: org/tuned}]\noutput: {kind: delta}\n")
    server.repositories["org/delta"] = run(recipe, tmp_path / "hub" / "delta").folder
    manifest = json.loads((tmp_path / "hub" / "delta" / "delta.json").read_text())
    assert manifest["base"] == {"id": "org/base", "commit": COMMIT}
    wanted = (tmp_path / "hub" / "tuned" / "model.safetensors").read_bytes()
    applied = apply("org/delta", "org/base", tmp_path / "applied", workers=1)
    assert (applied.folder / "model.safetensors").read_bytes() == wanted
    assert applied.lock["inputs"]["org/delta"]["commit"] == COMMIT
    again = tmp_path / "again.yaml"
    again.write_text("base_model: org/base\nmodels: [{model: org/delta}]\n")
    assert len(make_plan(again).outputs) == applied.tensors
    assert (run(again, tmp_path / "again").folder / "model.safetensors").read_bytes() == wanted


def test_pipelines_and_folders_of_repositories(
    server: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline is planned from its headers; `org/name:folder` is one component; offline both come from the cache."""
    for seed, name in enumerate(("base", "tuned")):
        whole = tmp_path / "hub" / name
        for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model.fp16")):
            folder = tiny_llama(whole / part, seed=seed, base=None if not seed else tmp_path / "hub" / "base" / part)
            (folder / "model.safetensors").rename(folder / f"{file}.safetensors")
        (whole / "tokenizer").mkdir()
        (whole / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
        (whole / "unet" / "own.py").write_text("raise SystemExit")
        (whole / "onnx").mkdir()
        (whole / "onnx" / "config.json").write_text("{}")
        parts = {part: ["diffusers", "X"] for part in ("unet", "text_encoder", "tokenizer", "vae")}
        write_json(whole / "model_index.json", {"_class_name": "P", **parts})
        server.repositories[f"org/{name}"] = whole
    recipe = "base_model: org/base{}\nmodels: [{{model: org/tuned{}}}]\noutput: {{kind: {}}}\n"
    (tmp_path / "r.yaml").write_text(recipe.format("", "@v1", "model"))
    planned = make_plan(tmp_path / "r.yaml")
    spans = server.fetched("diffusion_pytorch_model.safetensors")
    assert spans
    assert all(span for _, span in spans)
    assert not any(server.fetched(name) for name in ("merges.txt", "own.py", "onnx/config.json"))
    files = {"text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors"}
    assert {output.file for output in planned.outputs} == files
    done = run(tmp_path / "r.yaml")
    assert done.lock["inputs"]["org/base"]["commit"] == COMMIT
    assert {*files, "model_index.json"} <= done.lock["inputs"]["org/base"]["files"].keys()
    assert {*files, "tokenizer/merges.txt", "unet/own.py", "unet/config.json"} <= done.lock["outputs"].keys()
    assert not server.fetched("onnx/config.json")
    (tmp_path / "one.yaml").write_text(recipe.format(":unet", "@v1:unet", "model"))
    alone = run(tmp_path / "one.yaml").folder
    whole = load_tensors(done.folder / "unet")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_tensors(alone).items())
    for reference in ("org/base:nothing", "org/base:unet/x"):
        refused(reference, tmp_path, "has no folder")
    for reference in ("org/base:../x", "org/base:", "org/base:/unet", "org/base:.git"):
        refused(reference, tmp_path, "no such folder in")
    offline(monkeypatch)
    for reference in ("org/base", "org/tuned@v1:unet"):
        assert hub.open_model(reference, tmp_path, weights=True).revision == COMMIT
