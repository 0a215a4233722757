"""Chains in codes: each version has the bytes of quantising the version's weights anew, through every door."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_tensors, make_checkpoint, tiny_llama
from quantised_models import fp8
from test_chain import NAMES, Tensors, refused, same, succeed

import deltamerge as dm
from deltamerge.apps.chain.requantise import QuantisedChain, extract_quantised
from deltamerge.apps.serve.fine_tunes import ServedModel
from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import BlockCoder
from deltamerge.models.chain.folder import line, read_note
from deltamerge.models.references import open_model

DRAFT = "mtp.layers.0.mlp.up_proj.weight"
FORMS = {
    "blocks": "{scheme: fp8, block: [16, 16]}",
    "channels": "{scheme: fp8, strategy: channel}",
    "int8": "int8",
    "int4": "{scheme: int4, group: 16}",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
}


def quantise(folder: Path, model: str, form: str, template: str | None = None) -> Path:
    """What a run makes of a model whose output is quantised."""
    merge = f"merge_method: passthrough\nmodels: [{{model: ./{model}}}]\n"
    if template is not None:
        models = (
            f"[{{model: ./{model}, parameters: {{weight: 1}}}}, {{model: ./{template}, parameters: {{weight: 0}}}}]"
        )
        merge = f"merge_method: linear\ntemplate: ./{template}\nmodels: {models}\n"
    recipe = f"{merge}output: {{quantization: {form}}}\n"
    (folder / "r.yaml").write_text(recipe)
    out = folder / f"{model}-{form.translate({ord(c): None for c in '{}[]:, '})}"
    if not out.exists():
        succeed("run", folder / "r.yaml", "--out", out, "--workers", 1)
    return out


def moved(state: Tensors, turn: int) -> Tensors:
    """A step: in every other tensor a hundredth of the entries, in one block, and the largest of one row."""
    generator = torch.Generator().manual_seed(turn)
    new = {name: tensor.clone() for name, tensor in state.items()}
    for number, tensor in enumerate(new.values()):
        if (number + turn) % 2:
            at = torch.randperm(tensor.numel(), generator=generator)[: max(1, tensor.numel() // 100)]
            flat = tensor.view(-1)
            flat[at] = (flat[at].float() * 1.25).to(tensor.dtype)
            flat[flat.abs().argmax()] *= 1.5
    return new


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a layer that drafts tokens, tuned-1…3, and their chain."""
    folder = tmp_path_factory.mktemp("requantise")
    tiny_llama(folder / "base", seed=1)
    config = json.loads((folder / "base" / "config.json").read_text())
    state = load_tensors(folder / "base")
    state[DRAFT] = 0.05 * torch.randn(48, 32, generator=torch.Generator().manual_seed(5)).bfloat16()
    make_checkpoint(folder / "base", state, config=config)
    with dm.DeltaWriter(folder / "run", base=folder / "base") as writer:
        for turn in range(1, 4):
            state = moved(state, turn)
            make_checkpoint(folder / f"tuned-{turn}", state, config=config)
            writer.write(state, step=turn)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_versions_have_the_bytes_of_a_full_quantisation(made: Path, tmp_path: Path, form: str) -> None:
    base, out = quantise(made, "base", FORMS[form]), tmp_path / "run-q"
    written = succeed("extract", made / "run", "--quantized", base, "--out", out, "--workers", 1, "--json")
    assert [one["name"] for one in written["versions"]] == NAMES[:3]
    assert all(0 < one["tensors"] < len(load_tensors(base)) for one in written["versions"])
    state = load_tensors(base)
    for number, name in enumerate(NAMES[:3], 1):
        wanted = quantise(made, f"tuned-{number}", FORMS[form])
        succeed("apply", out / name, "--base", base, "--out", tmp_path / name)
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / name / file).read_bytes() == (wanted / file).read_bytes()
        dm.load_delta(out / name).apply_(state)
        assert same(state, load_tensors(wanted))
        note = read_note(out / name)
        assert note is not None
        assert note.step == number
    assert any(DRAFT.removesuffix("weight") in entry for entry in line(out / NAMES[2])[0].delta.entries)
    again = succeed("extract", made / "run", "--quantized", base, "--out", out, "--json")
    assert again["versions"] == []


def test_a_version_that_was_folded_meanwhile_is_no_gap(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    base = quantise(made, "base", FORMS["channels"])
    succeed("remove", tmp_path / "run" / NAMES[2])
    more = ("--quantized", base, "--out", tmp_path / "run-q", "--workers", 1)
    succeed("extract", tmp_path / "run", *more)
    shutil.copytree(made / "run" / NAMES[2], tmp_path / "run" / NAMES[2])
    succeed("squash", tmp_path / "run", "--keep", 0)
    assert [one["name"] for one in succeed("extract", tmp_path / "run", *more, "--json")["versions"]] == [NAMES[2]]
    state = load_tensors(base)
    assert dm.load_delta(tmp_path / "run-q").apply_(state) == 3
    assert same(state, load_tensors(quantise(made, "tuned-3", FORMS["channels"])))


def per_tensor(folder: Path, source: Path) -> Path:
    """A checkpoint in FP8 with a scale a tensor, and of activations."""
    written: Tensors = {}
    for name, tensor in load_tensors(source).items():
        if "proj" in name:
            stored, _ = fp8(name, tensor, tuple(tensor.shape), suffix="_scale")  # type: ignore[arg-type]
            written |= stored | {name.removesuffix("weight") + "input_scale": torch.tensor(0.5)}
            written[f"{name}_scale"] = written[f"{name}_scale"].reshape(())
        else:
            written[name] = tensor
    config = json.loads((source / "config.json").read_text())
    said = {"quant_method": "fp8", "activation_scheme": "static"}
    return make_checkpoint(folder, written, config={**config, "quantization_config": said})


def test_one_scale_a_tensor(made: Path, tmp_path: Path) -> None:
    """The largest entry moves the scale, and with it every code. Scales of activations stay."""
    if not (made / "theirs").exists():
        per_tensor(made / "theirs", made / "base")
    base = quantise(made, "base", "keep", "theirs")
    out = tmp_path / "run-q"
    with QuantisedChain(out, base, open_model(str(made / "base"), made, weights=True)) as chain:
        chain.catch_up(line(made / "run" / NAMES[2]), open_model(str(made / "base"), made, weights=True), 1)
    state = load_tensors(base)
    for number, name in enumerate(NAMES[:3], 1):
        dm.load_delta(out / name).apply_(state)
        wanted = load_tensors(quantise(made, f"tuned-{number}", "keep", "theirs"))
        assert same(state, wanted)
    assert any("input_scale" in name for name in state)


def test_a_writer_keeps_it_too_and_only_what_changed_is_coded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = quantise(made, "base", FORMS["blocks"])
    rows: list[int] = []
    encode = BlockCoder.encode
    monkeypatch.setattr(BlockCoder, "encode", lambda *given: (rows.append(len(given[1])), encode(*given))[1])
    states = [load_tensors(made / ("base" if not number else f"tuned-{number}")) for number in range(4)]
    quantized = {tmp_path / "run-q": base}
    with dm.DeltaWriter(tmp_path / "run", base=made / "base", quantized=quantized) as writer:
        writer.write(states[1]).result()
        whole, rows[:] = sum(rows), []
        writer.write(states[1]).result()
        assert rows == []  # nothing changed
        writer.write(states[2]).result()
        assert 0 < sum(rows) < whole / 2
    with dm.DeltaWriter(tmp_path / "run", quantized=quantized) as writer:  # it goes on
        writer.write(states[3])
    state = load_tensors(base)
    assert dm.load_delta(tmp_path / "run-q").apply_(state) == 4
    assert same(state, load_tensors(quantise(made, "tuned-3", FORMS["blocks"])))
    succeed("squash", tmp_path / "run-q", "--keep", 1)
    with dm.DeltaWriter(tmp_path / "run", quantized=quantized) as writer:
        writer.write(states[1])
    assert dm.load_delta(tmp_path / "run-q").apply_(state) == 1
    assert same(state, load_tensors(quantise(made, "tuned-1", FORMS["blocks"])))
    assert dm.load_delta(tmp_path / "run-q" / "000004").apply_(state, base=base) < 0  # back


def test_it_is_served_read_and_mirrored(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zstandard")
    base, wanted = quantise(made, "base", FORMS["channels"]), quantise(made, "tuned-2", FORMS["channels"])
    monkeypatch.chdir(tmp_path)
    extract_quantised(str(made / "run"), str(base), Path("run-q"), workers=2)
    state = load_tensors(base)
    switch = dm.Switch(state)
    switch.to("run-q/000002")
    assert same(state, load_tensors(wanted))
    switch.to(None)
    assert same(state, load_tensors(base))
    served = ServedModel(base)
    changes = served.changes("run-q/000002")
    touched = dict(served.weights(changes, served.touched(changes)))
    assert same(state | touched, load_tensors(wanted))
    assert succeed("diff", f"{base}+run-q/000002", wanted, "--json")["changed"] == 0  # read as weights
    succeed("verify", "run-q", "--base", base)
    succeed("extract", "run-q", "--as", "slime", "--out", "updates", "--base", base)
    succeed("extract", "run-q", "--as", "slime", "--out", "updates", "--base", base)


def test_what_is_no_quantisation_of_the_base_is_refused(made: Path, tmp_path: Path) -> None:
    base, run = quantise(made, "base", FORMS["int8"]), made / "run"
    assert "is not quantised" in refused("extract", run, "--quantized", made / "base", "--out", tmp_path / "a")
    other = quantise(made, "tuned-1", FORMS["int8"])
    said = refused("extract", run, "--quantized", other, "--out", tmp_path / "b")
    assert "differs from the base's, quantised" in said or "is not the base's" in said
    assert "is for one chain" in refused("extract", run, "--quantized", base, "--out", tmp_path / "c", "--density", 0.1)
    assert "is no chain" in refused("extract", made / "tuned-1", "--quantized", base, "--out", tmp_path / "d")
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and any(path.glob("delta.json"))]
    extract_quantised(str(run), str(base), tmp_path / "e", workers=1)
    after = ("--out", tmp_path / "e" / "000004", "--after", tmp_path / "e" / "000003")
    assert "has its codes" in refused("extract", other, "--base", base, *after)
    with dm.DeltaWriter(tmp_path / "other", base=made / "base") as writer:
        writer.write(moved(load_tensors(made / "tuned-3"), 9))
    with pytest.raises(InputError, match="is of no version of"):
        extract_quantised(str(tmp_path / "other"), str(base), tmp_path / "e", workers=1)
    broken = load_tensors(made / "tuned-1")
    broken["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    with (
        pytest.raises(InputError, match=r"up_proj\.weight: has values that are not finite"),
        dm.DeltaWriter(tmp_path / "nan", base=made / "base", quantized={tmp_path / "nan-q": base}) as writer,
    ):
        writer.write(broken)


class Undrafted(torch.nn.Module):
    """A model whose class leaves the layers out that draft tokens, as transformers' do."""

    _keys_to_ignore_on_load_unexpected = (r"^mtp\.",)

    def __init__(self, state: Tensors) -> None:
        super().__init__()
        self.state = {name: tensor for name, tensor in state.items() if name != DRAFT}

    def state_dict(self, *_: Any, **__: Any) -> Tensors:  # type: ignore[override]
        return self.state


def test_layers_that_a_model_does_not_load_stay_the_bases(made: Path, tmp_path: Path) -> None:
    model = Undrafted(load_tensors(made / "base"))
    with dm.DeltaWriter(tmp_path / "run", model, base=made / "base") as writer:
        for number in (1, 2):
            model.state = {n: t for n, t in load_tensors(made / f"tuned-{number}").items() if n != DRAFT}
            writer.write()
    state = load_tensors(made / "base")
    dm.load_delta(tmp_path / "run").apply_(state)
    assert same(state, load_tensors(made / "tuned-2") | {DRAFT: load_tensors(made / "base")[DRAFT]})
    model._keys_to_ignore_on_load_unexpected = ()  # type: ignore[assignment]
    with pytest.raises(InputError, match="has no mtp"):
        dm.DeltaWriter(tmp_path / "other", model, base=made / "base")
