"""`deltamerge convert`: a model in every form that a merge reads, written in those that it writes; transformers' load
and save is the judge of plain ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tolerance import gamma
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from deltamerge.models.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/: float32; pickled/: the same in torch's own shards; lone.safetensors."""
    root = tmp_path_factory.mktemp("convert")
    tiny_llama(root / "model", seed=1, dtype=torch.float32, vocab_size=96)
    tensors = load_tensors(root / "model")
    make_checkpoint(root / "pickled", {}, config=json.loads((root / "model/config.json").read_text()))
    (root / "pickled" / "model.safetensors").unlink()
    torch.save(tensors, root / "pickled" / "pytorch_model.bin")
    (root / "lone.safetensors").write_bytes((root / "model/model.safetensors").read_bytes())
    return root


def bits(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    return {n: (t.dtype, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for n, t in load_tensors(folder).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source", ["model", "pickled"])
def test_a_plain_dtype_is_what_transformers_loads_and_saves(source, dtype, folder, tmp_path, capsys):
    code, out, _ = call(
        capsys, "convert", folder / source, tmp_path / "out", "--dtype", dtype, "--shard-size", "20KB", "--json"
    )
    assert code == 0
    assert json.loads(out)["lock"]["outputs"]
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    model.save_pretrained(tmp_path / "theirs")
    assert bits(tmp_path / "out") == bits(tmp_path / "theirs")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype
    assert dtype != "float32" or bits(tmp_path / "out") == bits(folder / "model")


def test_a_lone_file_stays_one(folder, tmp_path, capsys):
    assert call(capsys, "convert", folder / "lone.safetensors", tmp_path / "out", "-q")[0] == 0
    assert bits(tmp_path / "out") == bits(folder / "model")
    assert not (tmp_path / "out" / "config.json").exists()


def test_to_quantised_and_back_keeps_what_stays(folder, tmp_path, capsys):
    """int8 is the same bytes under `keep`; plain again, it is near what it was, and what was not quantised is equal."""
    coded, kept, plain = (tmp_path / name for name in ("coded", "kept", "plain"))
    assert (
        call(capsys, "convert", folder / "model", coded, "--quantization", "int8", "--dtype", "bfloat16", "-q")[0] == 0
    )
    assert "quantization_config" in json.loads((coded / "config.json").read_text())
    assert call(capsys, "convert", coded, kept, "--quantization", "keep", "-q")[0] == 0
    assert bits(kept) == bits(coded)
    assert call(capsys, "convert", coded, plain, "--dtype", "bfloat16", "-q")[0] == 0
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    whole, again = load_tensors(folder / "model"), load_tensors(plain)
    for name, tensor in whole.items():
        assert again[name].dtype == torch.bfloat16
        half_a_step = float(tensor.abs().max()) / 127 / 2  # of int8; then each value is rounded twice, as is its scale
        torch.testing.assert_close(again[name].float(), tensor, rtol=gamma(3, torch.bfloat16), atol=half_a_step)
    norm = "model.norm.weight"
    assert torch.equal(again[norm], whole[norm].bfloat16())


def test_a_gguf_file_out_and_in(tmp_path, capsys):
    """GGUF f16 out; the GGUF file alone in, to the values that were rounded to float16."""
    pytest.importorskip("gguf")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<|e|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["some words"], trainer)
    tiny_llama(tmp_path / "model", seed=1, dtype=torch.float32, vocab_size=tokenizer.get_vocab_size())
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|e|>").save_pretrained(tmp_path / "model")
    assert call(capsys, "convert", tmp_path / "model", tmp_path / "out", "--gguf", "f16", "-q")[0] == 0
    (file,) = (tmp_path / "out").glob("*.gguf")
    alone = file.rename(tmp_path / "alone.gguf")
    assert call(capsys, "convert", alone, tmp_path / "back", "--dtype", "float32", "-q")[0] == 0
    whole, back = load_tensors(tmp_path / "model"), load_tensors(tmp_path / "back")
    assert whole.keys() == back.keys()
    for name, tensor in whole.items():
        assert torch.equal(back[name], tensor.half().float() if tensor.ndim == 2 else tensor), name


def test_a_dry_run_writes_nothing_and_an_unfinished_one_goes_on(folder, tmp_path, capsys):
    code, out, _ = call(
        capsys, "convert", folder / "pickled", tmp_path / "out", "--dtype", "float16", "--dry-run", "--json"
    )
    assert code == 0
    assert {t["dtype"] for t in json.loads(out)["tensors"]} == {"F16"}
    assert "passthrough" in call(capsys, "convert", folder / "model", tmp_path / "out", "--dry-run")[1]
    assert not (tmp_path / "out").exists()
    assert call(capsys, "convert", folder / "model", tmp_path / "out")[0] == 0
    assert "up to date" in call(capsys, "convert", folder / "model", tmp_path / "out")[2]
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "passthrough" in recipe
    assert call(capsys, "verify", tmp_path / "out")[0] == 0


BAD = {
    "no model": (["nowhere", "out"], 1, "nowhere"),
    "dtype": (["MODEL", "out", "--dtype", "int3"], 1, "dtype"),
    "size": (["MODEL", "out", "--shard-size", "-1"], 1, "shard_size"),
    "scheme": (["MODEL", "out", "--quantization", "q4"], 2, "q4"),
    "no out": (["MODEL"], 2, "OUT"),
    "no code here": (["MODEL", "out", "--gguf", "f16"], 1, "tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, code, said = BAD[case]
    found = call(capsys, "convert", *(str(folder / "model") if a == "MODEL" else a for a in arguments))
    assert found[0] == code
    assert said in found[2]
    assert "Traceback" not in found[2]
    assert not (tmp_path / "out").exists()


def test_the_reader_of_torch_s_files_runs_nothing(folder, tmp_path, capsys):
    """What `--allow-pickles` says elsewhere is what convert is for; an object that is no tensor is refused."""

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, ("open('ran', 'w')",)

    bad = tmp_path / "bad"
    make_checkpoint(bad, {}, config={"model_type": "llama"})
    (bad / "model.safetensors").unlink()
    torch.save({"w": Attack()}, bad / "pytorch_model.bin")
    code, _, said = call(capsys, "convert", bad, tmp_path / "out")
    assert code == 1
    assert "pytorch_model.bin" in said
    assert not (Path.cwd() / "ran").exists()
    assert open_checkpoint(folder / "pickled", pickles=True).tensors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "error: ./nowhere: no such folder in "),
        (["--dtype", "float8"], "hint: fewer bits are a quantization: fp8, int8 or int4 "),
        (["--dtype", "float23"], "hint: did you mean 'float32'?"),
    ],
)
def test_hints_speak_of_what_was_typed(tmp_path, capsys, monkeypatch, flags, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "convert", "./nowhere", "out", *flags)
    assert (code, said in err, "models[" in err) == (1, True, False), err


def test_the_name_of_a_file_is_no_folder(folder, tmp_path, capsys):
    code, _, err = call(capsys, "convert", str(folder / "model"), str(tmp_path / "model.gguf"))
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert err.splitlines()[0] == f"error: {tmp_path}/model.gguf: is named as a file, and OUT is a folder"
    assert err.splitlines()[1].endswith(f"{tmp_path}/model --gguf q8_0")
