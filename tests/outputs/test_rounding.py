"""Quantised merges whose codes are chosen by the inputs of their layers, on tiny models, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_rows import rows
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_llama
from interrupted import Stop, files
from packed_files import CASES
from running import finish, make_plan, run

from deltamerge.calibrate.rows.splits import split
from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats import safetensors
from deltamerge.formats.quantised.feedback import Feedback, total
from deltamerge.formats.quantised.scheme import coding_like
from deltamerge.models.checkpoint import decoded, open_checkpoint
from deltamerge.run.partition import Part
from deltamerge.tensors.reader import Reader

CALIBRATION = "calibration: {data: rows.jsonl, text: text, sequences: 20, length: 12}\n"
FORMS = {
    "int4": "{scheme: int4, group: 16}",
    "int8": "int8",
    "fp8": "{scheme: fp8, block: [16, 16]}",
    "rows": "{scheme: fp8, strategy: channel}",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llamas")
    tiny_llama(folder / "base", seed=1, tokenizer=True)
    tiny_llama(folder / "tune", seed=2, base=folder / "base", tokenizer=True, sigma=3e-3)
    rows(folder / "rows.jsonl", 40)
    return folder


def recipe(folder: Path, form: str, rounding: str | None, *, more: str = CALIBRATION, shard: str = "5GB") -> Path:
    path = folder / f"{form.strip('{}').replace(' ', '')[:12]}-{rounding}.yaml"
    chosen = "" if rounding is None else f", rounding: {rounding}"
    output = f"output: {{quantization: {form}{chosen}, shard_size: {shard}}}\n"
    path.write_text(f"base_model: ./base\nmodels: [{{model: ./tune}}]\n{more}{output}")
    return path


def values_of(folder: Path) -> dict[str, np.ndarray]:
    """The float64 values of matrices, by our readers, which have tests of their own."""
    found = {}
    with Reader() as reader:
        for name, info in decoded(open_checkpoint(folder)).tensors.items():
            raw = np.empty(info.nbytes, np.uint8)
            reader.read_into(info, 0, raw)
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[info.dtype]
            found[name] = torch.frombuffer(raw, dtype=dtype).reshape(info.shape).double().numpy()
    return found


def inputs_of(folder: Path, texts: Sequence[Any]) -> dict[str, np.ndarray]:
    """C of every linear layer, by a plain forward in float64, row by row."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found: dict[str, torch.Tensor] = {}
    count = 0

    def see(name: str, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        found[name] = found.get(name, torch.zeros(())) + x.T @ x

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: see(f"{name}.weight", args[0]))
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :12]
            model(input_ids=ids)
            count += ids.numel()
    return {name: (total / count).numpy() for name, total in found.items()}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_lose_less_by_an_independent_measure(llamas: Path, tmp_path: Path, form: str) -> None:
    made = {how: run(recipe(llamas, FORMS[form], how), tmp_path / how) for how in ("nearest", "inputs")}
    said = {how: result.lock["quantization"] for how, result in made.items()}
    (source,) = make_plan(recipe(llamas, FORMS[form], "inputs")).sources
    texts = [
        row.content
        for row in split(
            source.calibration, llamas, source.seed, {"architectures": ["LlamaForCausalLM"]}, labelled=False
        )[0]
    ]
    c = inputs_of(llamas / "tune", texts)
    whole, base = values_of(llamas / "tune"), values_of(llamas / "base")
    lost = {}
    for how, result in made.items():
        stored = values_of(result.folder)
        names = list(result.lock["quantization"]["tensors"])
        assert len(names) >= 12
        sums = np.zeros((2, 4))
        for n in names:
            parts = [whole[n] - stored[n], whole[n], whole[n] - base[n], stored[n] - base[n]]
            sums[0] += [np.square(part).sum() for part in parts]
            sums[1] += [np.trace(part @ c[n] @ part.T) for part in parts]
        lost[how] = float(np.sqrt(sums[1, 0] / sums[1, 1]))
        assert said[how]["relative_error"] == pytest.approx(np.sqrt(sums[0, 0] / sums[0, 1]), rel=2e-3)
        assert said[how]["outputs"]["relative_error"] == pytest.approx(lost[how], rel=2e-3)
        for part, (off, _, delta, written) in ((said[how], sums[0]), (said[how]["outputs"], sums[1])):
            along = (written + delta - off) / 2
            assert part["delta"]["projection"] == pytest.approx(along / delta, rel=5e-3)
            assert part["delta"]["share"] == pytest.approx(along**2 / delta / written, rel=5e-3)
    assert said["inputs"]["outputs"]["nearest"] == said["nearest"]["outputs"]["relative_error"]
    assert lost["inputs"] < 0.85 * lost["nearest"]
    plain = run(recipe(llamas, FORMS[form], None, more=""), tmp_path / "plain")
    assert all(torch.equal(t.view(torch.uint8), load_tensors(plain.folder)[n].view(torch.uint8))
               for n, t in load_tensors(made["nearest"].folder).items() if t.dim())  # fmt: skip


def test_without_rows_the_nearest_codes_say_what_survives(llamas: Path, tmp_path: Path) -> None:
    said = run(recipe(llamas, "int8", "nearest", more=""), tmp_path / "out").lock["quantization"]
    assert 0 < said["delta"]["share"] < 1
    assert "outputs" not in said
    assert "outputs" not in run(recipe(llamas, "int8", None), tmp_path / "plain").lock["quantization"]


def test_bytes_are_the_same_however_it_is_run(llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = recipe(llamas, FORMS["int4"], "inputs", shard="10KB"), tmp_path / "b" / "out"
    truth = files(run(path, tmp_path / "a" / "out", workers=1).folder)
    assert b"survives" in truth["README.md"]
    monkeypatch.setattr(safetensors, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(path, out, workers=1, watch=Stop(out, 20_000, KeyboardInterrupt()))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "native", lambda: None)
        assert files(run(path, out, workers=3, resume=True).folder) == truth
    for part in (1, 2):
        run(path, tmp_path / "c" / "out", part=Part(part, 2))
    assert files(finish(path, tmp_path / "c" / "out").folder) == truth


def test_the_recipe_runs_as_written(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "models" / "base", seed=1, tokenizer=True)
    for seed, name in enumerate(("math", "code"), 2):
        tiny_llama(tmp_path / "models" / name, seed=seed, base=base, tokenizer=True)
    rows(tmp_path / "calib.jsonl", 40)
    text = (Path(__file__).parents[2] / "recipes" / "int4-inputs.yaml").read_text()
    assert "sequences: 256" in text
    (tmp_path / "r.yaml").write_text(text.replace("sequences: 256", "sequences: 20, length: 12"))
    said = run(tmp_path / "r.yaml").lock["quantization"]
    assert said["outputs"]["relative_error"] < 0.9 * said["outputs"]["nearest"]
    assert said["outputs"]["delta"]["share"] > said["delta"]["share"]


def test_experts_are_chosen_by_the_tokens_that_they_get(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "head_dim": 16, "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 96,
             "num_local_experts": 3, "layer_types": ["full_attention"], "pad_token_id": 0}  # fmt: skip
    tiny_llama(tmp_path / "words", seed=0, tokenizer=True)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**shape)).bfloat16()
    for name in ("tune", "base"):
        model.save_pretrained(tmp_path / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name / file).write_bytes((tmp_path / "words" / file).read_bytes())
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(tmp_path / "base").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            count, inputs, outputs = tensor.shape
            stored[f"{name}_blocks"] = torch.randint(0, 256, (count, outputs, inputs // 32, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.full((count, outputs, inputs // 32), 118, dtype=torch.uint8)
        else:
            stored[name] = tensor
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    make_checkpoint(tmp_path / "base", stored, config=config | {"quantization_config": {"quant_method": "mxfp4"}})
    rows(tmp_path / "rows.jsonl", 40)
    made = run(recipe(tmp_path, "keep", "inputs"), tmp_path / "out")
    said = made.lock["quantization"]
    assert len(said["tensors"]) == 2
    assert "unseen" not in said
    assert 0 < said["outputs"]["relative_error"] < 0.8 * said["outputs"]["nearest"]
    settings = transformers.Mxfp4Config(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made.folder, quantization_config=settings)
    assert torch.isfinite(loaded(torch.arange(4, 20)[None]).logits).all()


BAD: dict[str, tuple[str, str, str]] = {
    "no rows": ("", "{quantization: int4, rounding: inputs}", "output.rounding: inputs needs calibration"),
    "plain": (CALIBRATION, "{rounding: inputs}", "output.rounding: nothing is quantised"),
    "another word": (CALIBRATION, "{quantization: int8, rounding: random}", "output.rounding"),
    "a group": ("", "{quantization: {scheme: nvfp4, group: 32}}", "output.quantization.group: is not for nvfp4"),
    "no such rows": (CALIBRATION.replace("rows.", "lost."), "{quantization: int8, rounding: inputs}", "lost.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line(llamas: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    more, output, message = BAD[case]
    path = llamas / "bad.yaml"
    path.write_text(f"base_model: ./base\nmodels: [{{model: ./tune}}]\n{more}output: {output}\n")
    code, _, err = call(capsys, "check", str(path))
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_a_stack_is_refused_and_its_way_out_works(llamas: Path, tmp_path: Path) -> None:
    layers = ("[0, 2]", "[1, 2]")
    stack = "slices:\n" + "".join(f"- sources: [{{model: ./tune, layer_range: {one}}}]\n" for one in layers)
    path = llamas / "stack.yaml"
    path.write_text(
        f"merge_method: passthrough\n{stack}{CALIBRATION}output: {{quantization: int8, rounding: inputs}}\n"
    )
    with pytest.raises(InputError, match="layers are stacked") as caught:
        make_plan(path)
    assert "in the next" in (caught.value.hint or "")
    second = f"merge_method: passthrough\nmodels: [{{model: deeper}}]\n{CALIBRATION}"
    first, output = f"name: deeper\nmerge_method: passthrough\n{stack}", "{quantization: int8, rounding: inputs}"
    path.write_text(f"{first}---\n{second}output: {output}\n")
    said = run(path, tmp_path / "out").lock["quantization"]
    assert len(said["tensors"]) == 21
    assert said["outputs"]["relative_error"] < said["outputs"]["nearest"]


def test_a_plan_has_the_stage_and_its_memory(llamas: Path) -> None:
    plan = make_plan(recipe(llamas, "int8", "inputs"))
    assert plan.moments is not None
    assert sum(plan.memory.describe()[part] for part in ("rounding", "quantised_outputs")) > 100_000_000
    assert [source.model for source in plan.sources] == ["./tune"]
    with pytest.raises(InputError, match="--memory"):
        make_plan(recipe(llamas, "int8", "inputs"), memory=100_000_000)


@pytest.mark.parametrize("name", [
    "gptq of 4 bits, version 2, no order", "gptq of 2 bits", "awq", "mxfp4 of compressed-tensors", "mxfp4",
    "nvfp4 of modelopt",
])  # fmt: skip
def test_forms_that_are_kept_are_chosen_too(tmp_path: Path, name: str) -> None:
    made = CASES[name]()
    make_checkpoint(tmp_path / "one", made.tensors, config={"quantization_config": made.config})
    checkpoint = decoded(open_checkpoint(tmp_path / "one"))
    scheme = checkpoint.quantised
    assert scheme is not None
    with Reader() as reader:
        for weight, parts in scheme.weights.items():
            infos = [scheme.stored[part] for part in parts]
            coding = coding_like(scheme.plain[weight], infos, made.config, weight).rounded("inputs", None)
            values = drawn_like(values_of(tmp_path / "one")[weight])
            c, lost = moments(coding.inputs), [0.0, 0.0]
            stored: dict[str, list[bytes]] = {part.name: [] for part in coding.parts}
            for unit in coding.units(0, values.size):
                fed = Feedback(lambda _, c=c: c, coding.shape[-2], None, True)
                rows_ = values.reshape(-1)[unit.start : unit.stop].reshape(-1, coding.matrix[1])
                for part, array in zip(coding.parts, coding.coder.encode(rows_, reader, fed)[0], strict=True):
                    stored[part.name].append(np.ascontiguousarray(array).tobytes())
                sums = total(fed.sums)
                lost = [lost[0] + sums.lost_outputs, lost[1] + sums.nearest_outputs]
            again = dict(made.tensors)
            for part in coding.parts:
                like = made.tensors[part.name]
                raw = torch.frombuffer(bytearray(b"".join(stored[part.name])), dtype=torch.uint8)
                again[part.name] = raw.view(like.dtype).reshape(like.shape)
            make_checkpoint(tmp_path / "two", again, config={"quantization_config": made.config})
            off = values - values_of(tmp_path / "two")[weight]
            off = off.swapaxes(-1, -2) if getattr(coding.coder, "turned", False) else off
            seen = float(np.einsum("...ij,jk,...ik->...", off, c, off).sum())
            assert lost[0] == pytest.approx(seen, rel=1e-4)
            assert lost[0] < 0.9 * lost[1]


def drawn_like(values: np.ndarray) -> np.ndarray:
    found = np.random.default_rng(0).standard_normal(values.shape) * values.std()
    return found.astype(np.float32)


def moments(columns: int) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((3 * columns, columns))
    x += 2 * np.random.default_rng(2).standard_normal((3 * columns, 1))
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", ["nf4", "int8", "mlx"])
def test_a_form_without_a_choice_is_named(tmp_path: Path, name: str) -> None:
    made = CASES[name]()
    key = "quantization_config" if "quant_method" in made.config else "quantization"
    make_checkpoint(tmp_path / "base", made.tensors, config={"model_type": "test", key: made.config})
    plain = {n: torch.from_numpy(x).float() for n, x in values_of(tmp_path / "base").items()}
    make_checkpoint(tmp_path / "tune", plain, config={"model_type": "test"})
    with pytest.raises(InputError, match=r"output\.rounding: is not for its form"):
        make_plan(recipe(tmp_path, "keep", "nearest", more=""))
