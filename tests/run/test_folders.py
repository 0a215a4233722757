"""Models of several folders: diffusers pipelines and sentence-transformers, merged, stored, resumed and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interrupted import Stop
from raw_tensors import Stored, stored, widened, write_checkpoint, write_weights
from running import finish, make_plan, run

from deltamerge.apps.chain.extract import extract
from deltamerge.cli import main
from deltamerge.errors import DeltamergeError
from deltamerge.formats import safetensors as writer
from deltamerge.outputs.output import output_of
from deltamerge.plan.planner import Plan
from deltamerge.run.apply import apply
from deltamerge.run.lock import verify
from deltamerge.run.partition import Part

WEIGHTS = {"a": 0.3, "b": 0.5}
MERGE = "merge_method: task_arithmetic\nbase_model: ./base\nmodels:\n" + "".join(
    f"  - {{model: ./{name}, parameters: {{weight: {weight}}}}}\n" for name, weight in WEIGHTS.items()
)
# folder -> weight file, dtype, and the shapes of its tensors
PARTS: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "text_encoder": ("model.safetensors", "F16", {f"layers.{i}.w": (6, 8) for i in range(2)}),
    "unet": (
        "diffusion_pytorch_model-0000{}-of-00002.safetensors", "BF16",
        {f"down_blocks.{i}.w": (8, 16) for i in range(4)} | {"conv_in.bias": (5,)},
    ),
    "vae": ("diffusion_pytorch_model.fp16.safetensors", "F32", {"decoder.mid.w": (3, 5), "post.bias": (4,)}),
}  # fmt: skip
LISTED = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "requires_safety_checker": False,
    "feature_extractor": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
OTHERS = {
    "scheduler/scheduler_config.json": '{"_class_name": "DDIMScheduler"}',
    "tokenizer/vocab.json": '{"a": 0}',
    "tokenizer/merges.txt": "#version: 0.2\n",
    "unet/config.json": '{"_class_name": "UNet2DConditionModel", "sample_size": 8}',
    "vae/config.json": '{"_class_name": "AutoencoderKL"}',
    "text_encoder/config.json": '{"model_type": "clip_text_model", "dtype": "float16"}',
}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def pipeline(folder: Path, seed: int, lacking: str = "") -> Path:
    """A pipeline whose U-Net has two shards and whose VAE is a variant."""
    draw = np.random.default_rng(seed)
    write(folder / "model_index.json", json.dumps(LISTED, indent=2))
    for name, text in OTHERS.items():
        write(folder / name, text)
    for part, (file, dtype, shapes) in PARTS.items():
        tensors = {name: stored(draw.normal(size=shape), dtype) for name, shape in shapes.items()}
        if part == lacking:
            shutil.rmtree(folder / part)
        elif "{}" not in file:
            write_weights(folder / part / file, tensors)
        else:
            halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
            weight_map = {}
            for i, half in enumerate(halves, 1):
                write_weights(folder / part / file.format(i), half)
                weight_map |= dict.fromkeys(half, file.format(i))
            index = folder / part / "diffusion_pytorch_model.safetensors.index.json"
            write(index, json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def first_step(planned: Plan, out: Path) -> str:
    return output_of(planned).next_steps(planned, out)[0]


def tensors_of(folder: Path) -> dict[str, Stored]:
    """Every tensor of every folder below, by its path."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        start = "" if path.parent == folder else f"{path.parent.relative_to(folder).as_posix()}/"
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
            array = np.frombuffer(data[begin + first : begin + end], kind).reshape(entry["shape"])
            found[start + name] = entry["dtype"], array
    return found


def expected(folder: Path, merged: Mapping[str, float] = WEIGHTS) -> dict[str, Stored]:
    """base + Σ weight · delta, in float64, rounded to the base's dtype."""
    base, tunes = tensors_of(folder / "base"), {name: tensors_of(folder / name) for name in merged}
    result = {}
    for name, (code, _) in base.items():
        value = widened(base[name])
        for model, weight in merged.items():
            if name in tunes[model]:
                value = value + weight * (widened(tunes[model][name]) - widened(base[name]))
        result[name] = stored(value, code)
    return result


def files(folder: Path) -> dict[str, bytes]:
    """What a folder holds, by path, but what names the run."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name not in ("README.md", "recipe.lock", "recipe.yaml")}


def same(found: Mapping[str, Stored], wanted: Mapping[str, Stored]) -> None:
    assert found.keys() == wanted.keys()
    for name, (code, array) in wanted.items():
        assert found[name][0] == code, name
        last = np.spacing(np.abs(widened((code, array))).astype(np.float32)) * (2**16 if code == "BF16" else 2**13)
        assert (np.abs(widened(found[name]) - widened((code, array))) <= last).all(), name


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        pipeline(tmp_path / name, seed)
    write(tmp_path / "r.yaml", MERGE)
    return tmp_path


def test_a_pipeline_is_merged_component_by_component(three: Path) -> None:
    plan = make_plan(three / "r.yaml")
    assert {o.file for o in plan.outputs} == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    assert any("diffusers pipeline" in note and "unet" in note for note in plan.notes)
    out = run(three / "r.yaml", three / "out").folder
    same(tensors_of(out), expected(three))
    others = {name: data for name, data in files(out).items() if not name.endswith(".safetensors")}
    assert others == {
        name: data for name, data in files(three / "base").items() if ".safetensors" not in name
    }  # bytes of configs, tokenizer, scheduler and list
    assert set(verify(out, 1)) == {*files(out), "README.md", "recipe.yaml"}
    assert "library_name: diffusers" in (out / "README.md").read_text()
    first = files(out)
    assert files(run(three / "r.yaml", out, force=True).folder) == first  # replaces what a run made
    assert not (three / ".out.partial").exists()
    # shards have diffusers' names, the variant where it stands, and an index of their own
    write(three / "r.yaml", MERGE + "output: {shard_size: 300}\n")
    small = files(run(three / "r.yaml", three / "small").folder)
    same(tensors_of(three / "small"), expected(three))
    assert "unet/diffusion_pytorch_model-00001-of-00004.safetensors" in small
    for number in (1, 2):
        run(three / "r.yaml", three / "parts", part=Part(number, 2))
    assert files(finish(three / "r.yaml", three / "parts").folder) == small
    index = json.loads(small["unet/diffusion_pytorch_model.safetensors.index.json"])
    assert index["weight_map"]["conv_in.bias"].startswith("diffusion_pytorch_model-0000")
    assert not any(name.startswith("unet/unet") or (name.endswith("model.safetensors.index.json") and "/" not in name)
                   for name in small)  # fmt: skip


def test_what_a_fine_tune_lacks_or_no_module_names_is_copied(three: Path) -> None:
    shutil.rmtree(three / "b")
    pipeline(three / "b", 2, lacking="vae")
    plan = make_plan(three / "r.yaml")
    assert any("copied from ./base" in note and "vae/ (all of its 2 tensors)" in note for note in plan.notes)
    base = tensors_of(three / "base")
    wanted = {n: base[n] if n.startswith("vae/") else t for n, t in expected(three).items()}
    same(tensors_of(run(three / "r.yaml", three / "out").folder), wanted)
    pair = "{models: [{model: ./a, parameters: {weight: 0.3}}]}"
    write(three / "r.yaml", f"merge_method: task_arithmetic\nbase_model: ./base\nmodules:\n  unet: {pair}\n")
    wanted = {n: t if n.startswith("unet/") else base[n] for n, t in expected(three, {"a": 0.3}).items()}
    write(three / "r.yaml", (three / "r.yaml").read_text() + "template: base\n")
    same(tensors_of(run(three / "r.yaml", three / "unet-only").folder), wanted)


def test_a_components_folder_is_a_model(three: Path) -> None:
    for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("vae", PARTS["vae"][0])):
        write(three / "r.yaml", re.sub(r"\./(\w+)", rf"./\1/{part}", MERGE))
        out = run(three / "r.yaml", three / f"out-{part}").folder
        assert {*files(out)} == {file, "config.json"}
        kind = json.loads(OTHERS[f"{part}/config.json"])["_class_name"]
        assert first_step(make_plan(three / "r.yaml"), out) == f'load    {kind}.from_pretrained("{out}")'
        assert (out / "config.json").read_text() == OTHERS[f"{part}/config.json"]  # diffusers' configs have no dtype
        wanted = {n.removeprefix(f"{part}/"): t for n, t in expected(three).items() if n.startswith(part)}
        same(tensors_of(out), wanted)


def test_a_delta_of_a_pipeline_makes_it_again(three: Path) -> None:
    out = run(three / "r.yaml", three / "out").folder
    write(three / "d.yaml", MERGE + "output: {kind: delta}\n")
    delta = run(three / "d.yaml", three / "delta").folder
    assert (delta / "tokenizer" / "merges.txt").is_file()
    applied = apply(str(delta), str(three / "base"), three / "applied", workers=1).folder
    assert files(applied) == files(out)
    assert verify(applied, 1)
    taken = extract(str(three / "a"), str(three / "base"), three / "taken")
    write(three / "again.yaml", MERGE.replace("./a", "./taken"))
    assert files(run(three / "again.yaml", three / "again").folder) == files(out)
    assert {*files(taken.folder)} >= {"delta.json", "model_index.json", "unet/config.json"}


def test_an_interrupted_pipeline_goes_on(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SAVE_SECONDS", 1e-4)
    write(three / "r.yaml", MERGE + "output: {shard_size: 300}\n")
    whole = files(run(three / "r.yaml", three / "whole").folder)
    with pytest.raises(KeyboardInterrupt):
        run(three / "r.yaml", three / "out", watch=Stop(three / "out", 900, KeyboardInterrupt()), workers=1)
    assert (three / ".out.partial" / "out" / "unet").is_dir()
    assert files(run(three / "r.yaml", three / "out").folder) == whole


def link(path: Path, target: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)


def entry(name: str) -> str:
    return json.dumps(LISTED | {name: ["diffusers", "X"]})


HOSTILE = {
    "a folder above": (lambda a: write(a / "model_index.json", entry("../base/unet")), "is no folder of a component"),
    "an absolute folder": (lambda a: write(a / "model_index.json", entry("/etc")), "is no folder of a component"),
    "a hidden folder": (lambda a: write(a / "model_index.json", entry(".git")), "is no folder of a component"),
    "a list of lists": (lambda a: write(a / "model_index.json", "[[1]]"), "model_index.json: is not a JSON object"),
    "a linked component": (lambda a: link(a / "unet", a.parent / "base" / "unet"), "unet is a link that leaves"),
    "a linked config": (lambda a: link(a / "unet" / "config.json", a.parent / "r.yaml"), "is a link that leaves"),
    "a linked shard": (
        lambda a: link(a / "vae" / PARTS["vae"][0], a.parent / "base" / "vae" / PARTS["vae"][0]),
        "is a link that leaves",
    ),
    "a shard elsewhere": (
        lambda a: write(
            a / "unet" / "diffusion_pytorch_model.safetensors.index.json",
            '{"weight_map": {"x": "../vae/diffusion_pytorch_model.safetensors"}}',
        ),
        "unet: diffusion_pytorch_model.safetensors.index.json: shard .* is not a plain",
    ),
    "a list of more": (lambda a: write(a / "model_index.json", entry("zork")), "lists zork, which is not there"),
    "a part of the folders": (lambda a: shutil.rmtree(a / "scheduler"), "lists scheduler, which is not there"),
    "no weights": (lambda a: [shutil.rmtree(a / part) for part in PARTS], "no component has weights"),
    "pickles": (
        lambda a: (a / "vae" / PARTS["vae"][0]).rename(a / "vae" / "diffusion_pytorch_model.bin"),
        "vae: only PyTorch pickle files",
    ),
    "another kind": (lambda a: [shutil.rmtree(a), write_checkpoint(a, {"w": stored([1.0], "F32")})], "has components"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_pipelines_that_are_refused(three: Path, case: str) -> None:
    change, message = HOSTILE[case]
    change(three / "a")
    write(three / "r.yaml", (three / "r.yaml").read_text() + "template: ./a\n")
    with pytest.raises(DeltamergeError, match=message) as caught:
        run(three / "r.yaml", three / "out")
    assert "\n" not in str(caught.value)
    assert not (three / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("tokenizer_source: base\n", "tokenizer_source: ./base is a pipeline, whose tokenizers are copied"),
        ("output: {kind: peft}\n", "output.kind peft: ./base is no model of transformers alone"),
        (
            "modules: {transformer: {models: [{model: ./a}]}}\n",
            "belongs to it\nhint: default is the whole model; names here: text_encoder, unet, vae",
        ),
        ("prune: {method: wanda, density: 0.5}\ncalibration: {data: rows.txt}\n", "is of diffusers"),
    ],
)
def test_what_pipelines_cannot_do_is_said(three: Path, more: str, message: str) -> None:
    write(three / "rows.txt", "a\n" * 60)
    text = MERGE[: MERGE.index("models:")] if more.startswith("modules") else MERGE
    write(three / "r.yaml", text + more)
    with pytest.raises(DeltamergeError, match=re.escape(message)):
        make_plan(three / "r.yaml")


def test_nothing_is_written_through_links_or_over_what_no_run_made(three: Path) -> None:
    outside = three / "outside"
    outside.mkdir()
    out = run(three / "r.yaml", three / "out").folder
    # a link in the place of a component's folder: of the output, of the work folder
    shutil.rmtree(out / "vae")
    (out / "vae").symlink_to(outside)
    with pytest.raises(DeltamergeError, match="vae"):
        verify(out, 1)
    with pytest.raises(DeltamergeError, match="--force replaces only files of runs"):
        run(three / "r.yaml", out, force=True)
    state = three / ".new.partial"
    (state / "out").mkdir(parents=True)
    (state / "deltamerge").write_text("A deltamerge run works in this folder. It is removed when the run ends.\n")
    (state / "out" / "unet").symlink_to(outside)
    with pytest.raises(DeltamergeError, match=r"out/unet \(a link\)"):
        run(three / "r.yaml", three / "new", force=True)
    assert not list(outside.iterdir())
    # a user's file beside a component's weights
    (out / "vae").unlink()
    shutil.rmtree(out)
    run(three / "r.yaml", out)
    write(out / "unet" / "notes.txt", "mine")
    with pytest.raises(DeltamergeError, match=r"would delete unet/notes\.txt"):
        run(three / "r.yaml", out, force=True)
    with pytest.raises(DeltamergeError) as caught:
        verify(out, 1)
    assert [*caught.value.also] == ["unet/notes.txt: not in the lock"]
    lock = (out / "recipe.lock").read_text()
    for name in ("unet/../../r.yaml", "/etc/passwd", "unet//config.json", "../r.yaml"):
        (out / "recipe.lock").write_text(lock.replace("unet/config.json:", f"{name}:"))
        with pytest.raises(DeltamergeError) as caught:
            verify(out, 1)
        assert f"{name}: not a file name" in caught.value.also


SENTENCES = {
    "modules.json": json.dumps([
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]),
    "config.json": '{"model_type": "bert", "architectures": ["BertModel"], "dtype": "float16"}',
    "config_sentence_transformers.json": '{"prompts": {"query": "q: "}}',
    "sentence_bert_config.json": '{"max_seq_length": 16}',
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": '{"in_features": 4, "out_features": 3}',
    "tokenizer.json": "{}",
}  # fmt: skip


def test_sentence_transformers_keep_all_and_dense_layers_are_merged(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        draw, folder = np.random.default_rng(seed), tmp_path / name
        for file, text in SENTENCES.items():
            write(folder / file, text)
        shapes = {"encoder.layer.0.w": (4, 4), "embeddings.w": (6, 4)}
        write_weights(folder / "model.safetensors", {n: stored(draw.normal(size=s), "F16") for n, s in shapes.items()})
        dense = {
            "linear.weight": stored(draw.normal(size=(3, 4)), "F32"),
            "linear.bias": stored(draw.normal(size=3), "F32"),
        }
        write_weights(folder / "2_Dense" / "model.safetensors", dense)
    write(tmp_path / "r.yaml", MERGE)
    out = run(tmp_path / "r.yaml", tmp_path / "out").folder
    same(tensors_of(out), expected(tmp_path))
    kept = {name: data.decode() for name, data in files(out).items() if not name.endswith(".safetensors")}
    assert kept == SENTENCES  # the dense layer's dtype is not the model's
    assert "sentence-transformers" in (out / "README.md").read_text()
    # a base that is the bare encoder: what it lacks is the fine-tune's
    for name in [*SENTENCES, "2_Dense/model.safetensors"]:
        if name != "config.json":
            (tmp_path / "base" / name).unlink()
    write(tmp_path / "r.yaml", "base_model: ./base\nmodels: [{model: ./a, parameters: {weight: 0.3}}]\n")
    found, own = tensors_of(run(tmp_path / "r.yaml", tmp_path / "one").folder), tensors_of(tmp_path / "a")
    same(found, expected(tmp_path, {"a": 0.3}) | {n: t for n, t in own.items() if n.startswith("2_Dense")})


def test_code_is_copied_and_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        table = {"AutoModel": "modeling_x.XModel", "AutoTokenizer": ["org/other--tok.T", None]}
        config = {"model_type": "x", "auto_map": table}
        write_checkpoint(tmp_path / name, {"w": stored(np.full(4, float(seed)), "F32")}, config)
        for file in ("modeling_x.py", "helper_x.py"):
            write(tmp_path / name / file, f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(7)\n")
    write(tmp_path / "r.yaml", MERGE)
    with pytest.raises(SystemExit) as left:
        main(["check", "-v", str(tmp_path / "r.yaml")])
    assert left.value.code == 0
    note = "brings its own code (modeling_x.py, org/other--tok.py): copied, never run"
    assert note in capsys.readouterr().err
    out = run(tmp_path / "r.yaml", tmp_path / "out").folder
    assert {*files(out)} == {"config.json", "model.safetensors", "modeling_x.py", "helper_x.py"}
    assert "never run" in (out / "README.md").read_text()
    assert not (tmp_path / "ran").exists()
    assert os.access(out / "modeling_x.py", os.R_OK)


def test_lone_files_and_mistrals_own(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        values = np.random.default_rng(seed).normal(size=(3, 4))
        tensors = {"layers.0.w": stored(values, "F16"), "lm_head.weight": stored(values, "F16")}
        write_checkpoint(tmp_path / name, tensors)
        shutil.copy(tmp_path / name / "model.safetensors", tmp_path / f"{name}.safetensors")
        (tmp_path / f"m-{name}").mkdir()
        shutil.copy(tmp_path / name / "model.safetensors", tmp_path / f"m-{name}" / "consolidated.safetensors")
        write(tmp_path / f"m-{name}" / "params.json", '{"dim": 4}')
        write(tmp_path / f"m-{name}" / "tekken.json", "{}")
    wanted = expected(tmp_path)
    for pattern, names in (
        (r"./\1.safetensors", {"model.safetensors"}),
        (r"./m-\1", {"consolidated.safetensors", "params.json", "tekken.json"}),
    ):
        write(tmp_path / "r.yaml", re.sub(r"\./(\w+)", pattern, MERGE))
        assert any("no config.json" in note for note in make_plan(tmp_path / "r.yaml").notes)
        out = run(tmp_path / "r.yaml", tmp_path / "out", force=True).folder
        assert {*files(out)} == names
        assert first_step(make_plan(tmp_path / "r.yaml"), out) == f'load    load_file("{out / min(names)}")'
        same(tensors_of(out), wanted)
        assert verify(out, 1)
        calibrated = "prune: {method: wanda, density: 0.5}\ncalibration: {data: rows.txt}\n"
        write(tmp_path / "rows.txt", "a\n" * 60)
        write(tmp_path / "c.yaml", (tmp_path / "r.yaml").read_text() + calibrated)
        with pytest.raises(DeltamergeError, match=r"has no config\.json, without which calibration"):
            make_plan(tmp_path / "c.yaml")
    # beside transformers' shards the consolidated file is not read
    for name in ("base", "a", "b"):
        write(tmp_path / name / "consolidated.safetensors", "not looked at")
    write(tmp_path / "r.yaml", MERGE)
    same(tensors_of(run(tmp_path / "r.yaml", tmp_path / "hf").folder), wanted)


@pytest.mark.parametrize(
    ("config", "loader"),
    [
        ({"architectures": ["XForCausalLM"]}, "AutoModelForCausalLM"),
        ({"architectures": ["XForConditionalGeneration"]}, "XForConditionalGeneration"),
        ({"architectures": ["XForCausalLM"], "auto_map": {"AutoModel": "m.X"}}, "AutoModelForCausalLM"),
        ({"architectures": ["XModel"], "auto_map": {"AutoModel": "m.X"}}, "AutoModel"),
        ({"architectures": ['X("; rm']}, "AutoModel"),
        ({"model_type": "x"}, "AutoModel"),
        ({"_class_name": 'U("; rm'}, "AutoModel"),
    ],
)
def test_what_loads_a_model_is_a_class_that_has_its_head(tmp_path: Path, config: dict[str, Any], loader: str) -> None:
    write_checkpoint(tmp_path / "a", {"layers.0.w": stored(np.ones((2, 2)), "F16")}, config)
    write(tmp_path / "r.yaml", "merge_method: passthrough\nmodels: [{model: ./a}]\n")
    assert first_step(make_plan(tmp_path / "r.yaml"), Path("out")) == f'load    {loader}.from_pretrained("out")'
