"""A GGUF file beside the checkpoint: transformers reads the same model and tokenizer from it, its numbers are those of
llama.cpp's formats, and what is not known is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from calls import call
from conftest import load_tensors, make_checkpoint, tiny_llama
from running import run
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from deltamerge.errors import InputError, OutputError
from deltamerge.files.progress import Phase, heard
from deltamerge.models.checkpoint import decoded, open_checkpoint
from deltamerge.models.gguf_tokenizer import CONTROL, SPLITS, UNUSED, USER_DEFINED, described, vocabulary
from deltamerge.models.vocabulary_files import sentences
from deltamerge.tensors.reader import Reader

gguf = pytest.importorskip("gguf")

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 336, "max_position_embeddings": 256}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
TEXT = "The quick  brown fox, isn't it 1234567? \n\n<think> OKay<|end|>"


def byte_level(pattern: str) -> Any:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT * 3, "the brown dog isn't the quick fox 12 345"], trainer)
    tokenizer.add_tokens(["<think>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def models_of(folder: Path, config: Any, tokenizer: Any) -> None:
    for seed, name in enumerate(("base", "tune")):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += (0.1 * torch.randn(parameter.shape)).bfloat16()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def merge(folder: Path, kind: str) -> Path:
    (folder / "r.yaml").write_text(
        f"base_model: ./base\nmodels: [{{model: ./tune, parameters: {{weight: 0.5}}}}]\noutput: {{gguf: {kind}}}\n"
    )
    return run(folder / "r.yaml", folder / "out").folder


CASES: dict[str, tuple[Any, str, str]] = {
    "llama": (transformers.LlamaConfig(**SHAPE), "llama-bpe", "f16"),
    "mistral": (transformers.MistralConfig(**SHAPE, head_dim=32, sliding_window=None), "tekken", "q8_0"),
    "qwen2": (transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True), "qwen2", "bf16"),
    "qwen3": (transformers.Qwen3Config(**SHAPE, head_dim=128), "qwen2", "bf16"),  # 128: transformers' reader takes that
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same_model_from_it(case, tmp_path):
    config, pre, kind = CASES[case]
    pattern = next(pattern for pattern, name in SPLITS.items() if name == pre)
    models_of(tmp_path, config, byte_level(pattern))
    out = merge(tmp_path, kind)
    name = f"model-{kind}.gguf"
    assert f"{name}:" in (out / "recipe.lock").read_text()
    plain = transformers.AutoTokenizer.from_pretrained(out)
    read = transformers.AutoTokenizer.from_pretrained(out, gguf_file=name)
    ids = plain(TEXT, add_special_tokens=False).input_ids
    assert read(TEXT, add_special_tokens=False).input_ids == ids
    one, two = (
        transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **more)
        for more in ({}, {"gguf_file": name})
    )
    with torch.no_grad():
        expected, found = one(torch.tensor([ids])).logits, two(torch.tensor([ids])).logits
    assert (expected - found).abs().max() <= (0.03 if kind == "q8_0" else 0) * expected.abs().max()
    tensors = load_tensors(out)
    ours = decoded(open_checkpoint(out / name)).tensors  # by our own reader
    assert {n: info.shape for n, info in ours.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    with Reader() as read_by:
        for tensor, info in ours.items():
            values = np.empty(info.nbytes, np.uint8)
            read_by.read_into(info, 0, values)
            numbers = {"F32": np.float32, "F16": np.float16}.get(info.dtype)
            if numbers is not None and kind != "q8_0":
                assert np.array_equal(values.view(numbers).reshape(info.shape), tensors[tensor].float().numpy()), tensor
    reader = gguf.GGUFReader(out / name)
    stated = {field.name: field.contents() for field in reader.fields.values()}
    assert stated["tokenizer.ggml.pre"] == pre
    assert stated["general.file_type"] == {"f16": 1, "q8_0": 7, "bf16": 32}[kind]
    words, kinds = stated["tokenizer.ggml.tokens"], stated["tokenizer.ggml.token_type"]
    assert len(words) == len(kinds) == SHAPE["vocab_size"]
    assert [kinds[words.index(word)] for word in ("<|end|>", "<think>", f"[PAD{len(words) - 1}]")] == [
        CONTROL, USER_DEFINED, UNUSED,
    ]  # fmt: skip
    if kind == "q8_0":
        values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        exact = tensors["model.layers.1.mlp.up_proj.weight"].double().numpy().reshape(-1, 32)
        scale = (np.abs(exact).max(1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
        got = values["blk.1.ffn_up.weight"].reshape(-1, 32)
        assert (np.abs(got - exact) <= (0.5 + 127 / 2**11) * scale).all()  # a step of codes, and one of the scale
        assert {t.name: t.tensor_type.name for t in reader.tensors}["blk.0.attn_norm.weight"] == "F32"


def test_every_long_phase_of_a_gguf_file_is_told_and_the_file_has_its_line(tmp_path):
    told: list[Phase] = []

    class Heard:
        def begun(self, phase: Phase) -> None:
            told.append(phase)

        def ended(self, phase: Phase) -> None: ...

    models_of(tmp_path, CASES["llama"][0], byte_level(next(p for p, name in SPLITS.items() if name == "llama-bpe")))
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base_model: ./base\nmodels: [{model: ./tune}]\noutput: {gguf: f16}\n")
    with heard(Heard()):
        made = run(recipe, tmp_path / "out")
        described(open_checkpoint(made.folder / "model-f16.gguf"))
    (line,) = made.remarks
    assert line.startswith("model-f16.gguf: ")
    phases = {phase.name: phase for phase in told}
    writing = phases["writing model-f16.gguf"]
    assert writing.total == writing.done > SHAPE["vocab_size"] * SHAPE["hidden_size"]
    assert {"reading model-f16.gguf", "making the tokenizer of model-f16.gguf"} <= phases.keys()


def test_frequencies_of_long_contexts(tmp_path):
    config = transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3)
    models_of(tmp_path, config, byte_level(next(iter(SPLITS))))
    found = {t.name: t.data for t in gguf.GGUFReader(merge(tmp_path, "bf16") / "model-bf16.gguf").tensors}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 10000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(found["rope_freqs.weight"], plain / scaled.double().numpy(), rtol=1e-5)


def protobuf(field: int, value: Any) -> bytes:
    if isinstance(value, int):
        return bytes([field << 3, value])
    if isinstance(value, float):
        return bytes([field << 3 | 5]) + struct.pack("<f", value)
    assert len(value) < 128
    return bytes([field << 3 | 2, len(value)]) + value


def test_sentencepiece(tmp_path):
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "t", "h", "e", "th", "\u2581the"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 6]
    pieces = b"".join(
        protobuf(1, protobuf(1, word.encode()) + protobuf(2, -float(i)) + (protobuf(3, kind) if kind != 1 else b""))
        for i, (word, kind) in enumerate(zip(words, kinds, strict=True))
    )
    tokenizer = transformers.LlamaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[("t", "h")])
    tokenizer.add_tokens(["<think>"])
    models_of(tmp_path, transformers.LlamaConfig(**SHAPE), tokenizer)
    for name in ("base", "tune"):
        (tmp_path / name / "tokenizer.model").write_bytes(pieces)
    out = merge(tmp_path, "f16")
    stated = {f.name: f.contents() for f in gguf.GGUFReader(out / "model-f16.gguf").fields.values()}
    assert stated["tokenizer.ggml.model"] == "llama"
    assert stated["tokenizer.ggml.tokens"][: len(words)] == words
    assert stated["tokenizer.ggml.token_type"][: len(words)] == kinds
    assert stated["tokenizer.ggml.scores"][: len(words)] == [-float(i) for i in range(len(words))]
    assert stated["tokenizer.ggml.tokens"][len(words) :][:2] == ["<think>", f"[PAD{len(words) + 1}]"]
    (tmp_path / "tune" / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.model"):
        vocabulary(tmp_path / "tune", 0)
    for broken in (b"\x80" * 50, pieces[:-1], b"\x0a\xff", b"\x0b", b"\x0a\x05\x0a\x03\xff\xff\xff"):
        with pytest.raises(InputError, match="is no SentencePiece model"):
            list(sentences(broken, Path("tokenizer.model")))


def test_what_is_not_known_is_refused(tmp_path, capsys):
    tiny_llama(tmp_path / "base", seed=1, tokenizer=True)
    tiny_llama(tmp_path / "tune", seed=2, base=tmp_path / "base", tokenizer=True)
    (tmp_path / "r.yaml").write_text("base_model: ./base\nmodels: [{model: ./tune}]\noutput: {gguf: q8_0}\n")

    def said() -> str:
        code, _, err = call(capsys, "check", tmp_path / "r.yaml")
        assert code == 1
        return err

    assert "tokenizer.json: a tokenizer of type WordLevel is not written as GGUF" in said()
    tokenizer = byte_level(r"\p{N}+|\p{L}+|.")
    tokenizer.save_pretrained(tmp_path / "tune")
    assert "splits text in a way that is not known here" in said()
    byte_level(next(iter(SPLITS))).save_pretrained(tmp_path / "tune")
    path = tmp_path / "tune" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}))
    assert "rope_type yarn is not written as GGUF" in said()
    for model in ("base", "tune"):
        (tmp_path / model / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    assert "gpt_neox is not written as GGUF, only llama, mistral, qwen2, qwen3" in said()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "rms_norm_eps"}))
    assert "config.json has no rms_norm_eps that is a number" in said()
    path.write_text(json.dumps(config))
    tokens = tmp_path / "tune" / "tokenizer.json"
    kept = json.loads(tokens.read_text())
    for broken in ({"id": 10**12, "content": "x"}, {"content": "x"}, {"id": 3}, "x"):
        tokens.write_text(json.dumps(kept | {"added_tokens": [broken]}))
        assert "tokenizer.json: has" in said()
    tokens.write_text(json.dumps(kept))
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "model.layers.1." in said()
    path.write_text(json.dumps(config))
    recipe = (tmp_path / "r.yaml").read_text()
    (tmp_path / "r.yaml").write_text(recipe.replace("gguf:", "kind: delta, gguf:"))
    assert "output.gguf: a delta is no GGUF file" in said()
    (tmp_path / "r.yaml").write_text(recipe.replace("q8_0", "q4_k"))
    assert "output.gguf: must be one of q8_0, f16, bf16" in said()
    (tmp_path / "r.yaml").write_text(recipe)
    with pytest.raises(InputError, match=r"the tokenizer has .* tokens, the embedding 96 rows"):
        run(tmp_path / "r.yaml", tmp_path / "out")


def test_a_gguf_base_cannot_be_kept(tmp_path, capsys):
    from gguf_files import write

    write(tmp_path / "base.gguf", "llama", types=("Q8_0",))
    base = decoded(open_checkpoint(tmp_path / "base.gguf"))
    tensors = {name: torch.zeros(info.shape) for name, info in base.tensors.items()}
    make_checkpoint(tmp_path / "tune", tensors, config=base.config)
    path = tmp_path / "r.yaml"
    path.write_text("base_model: ./base.gguf\nmodels: [{model: ./tune}]\noutput: {quantization: keep}\n")
    code, _, err = call(capsys, "check", path)
    assert code == 1
    assert "output.quantization: ./base.gguf (gguf" in err
    assert "is in a form that cannot be written, only read" in err
    assert "hint: write plain weights: quantization: none" in err


def test_numbers_that_float16_does_not_hold(tmp_path):
    models_of(tmp_path, transformers.LlamaConfig(**SHAPE), byte_level(next(iter(SPLITS))))
    tensors = load_tensors(tmp_path / "tune")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 3e5
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "tune" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OutputError, match=r"blk.0.ffn_up.weight: holds values beyond 65504"):
        merge(tmp_path, "f16")
