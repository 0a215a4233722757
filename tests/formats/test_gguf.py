"""GGUF files: names, values and config are those of transformers' own loader; what it cannot tell is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import pytest
import transformers
from conftest import write_json
from gguf_files import MODELS, add, write
from running import make_plan, run
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deltamerge.errors import InputError
from deltamerge.formats.gguf import file as gguf_file
from deltamerge.formats.gguf.config import ARCHITECTURES
from deltamerge.formats.gguf.file import read_gguf_header
from deltamerge.formats.gguf.model import tensor_of
from deltamerge.models import hub_client
from deltamerge.models.checkpoint import Checkpoint, open_checkpoint
from deltamerge.models.hub import open_model
from deltamerge.tensors.dtypes import ITEMSIZE, bits_type, widen
from deltamerge.tensors.reader import Reader

# What transformers' loader leaves at its class's default although the file says it.
LEFT_OUT = {
    "gpt2": {"n_positions", "n_inner"}, "qwen3": {"head_dim"}, "qwen3moe": {"moe_intermediate_size"},
    "qwen2moe": {"moe_intermediate_size", "shared_expert_intermediate_size"},
    "t5": {"feed_forward_proj", "dense_act_fn"}, "nemotron": {"partial_rotary_factor", "rope_parameters"},
}  # fmt: skip


def values_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All tensors in float32; pieces of any length are the same bytes."""
    rng, found = np.random.default_rng(0), {}
    with Reader() as reader:
        for name, info in checkpoint.tensors.items():
            whole = np.empty(info.nbytes // ITEMSIZE[info.dtype], bits_type(info.dtype))
            reader.read_into(info, 0, whole)
            cuts = sorted({0, whole.size, *rng.integers(0, whole.size, 3).tolist()})
            for low, high in pairwise(cuts):
                piece = np.empty(high - low, whole.dtype)
                reader.read_into(info, low, piece)
                assert piece.tobytes() == whole[low:high].tobytes(), name
            found[name] = widen(whole, info.dtype).reshape(info.shape)
    return found


def as_float32(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: as_float32(inner) for key, inner in value.items()}
    return float(np.float32(value)) if isinstance(value, float) else value


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_file_is_what_transformers_loads(arch, tmp_path):
    write(tmp_path / "m.gguf", arch)
    ours = open_checkpoint(tmp_path / "m.gguf")
    config = transformers.AutoConfig.for_model(**ours.config)
    auto = transformers.AutoModelForSeq2SeqLM if arch == "t5" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32", config=config)
    theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = values_of(ours)
    left = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert set(theirs) - set(found) <= left
    assert set(found) <= set(theirs)
    for name, value in found.items():
        assert value.shape == theirs[name].shape, name
        assert value.tobytes() == theirs[name].tobytes(), name
    said = as_float32(transformers.AutoConfig.for_model(**ours.config).to_dict())
    loaded = as_float32(transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict())
    differ = {key for key in said if said[key] != loaded.get(key)} - {"_name_or_path", "architectures", "dtype"}
    assert differ <= LEFT_OUT.get(arch, set())
    assert ours.config["architectures"] == [type(model).__name__]


def test_every_architecture_is_tested():
    assert {*MODELS, "t5encoder"} == set(ARCHITECTURES)


KINDS = [  # those of gguf 0.19 that it turns into numbers, but plain floats
    kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits and kind.name != "BF16"
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_every_type_of_block_is_what_gguf_makes_of_it(tmp_path):
    """Random bytes, so that scales take every value; pieces begin anywhere in a row."""
    rng, stored = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for kind in KINDS:
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        stored[kind] = rng.integers(0, 256, (3, 512 // elements * nbytes), dtype=np.uint8)
        writer.add_tensor(kind.name, stored[kind], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    blocks = {block.name: block for block in read_gguf_header(tmp_path / "m.gguf").blocks}
    with Reader() as reader:
        for kind in KINDS:
            info = tensor_of(blocks[kind.name], "w")
            assert info.shape == (3, 512)
            expected = gguf.dequantize(stored[kind], kind).reshape(-1)
            for low, high in ((0, 1536), (100, 700), (511, 1025)):
                found = np.empty(high - low, np.float32)
                reader.read_into(info, low, found)
                assert found.tobytes() == expected[low:high].tobytes(), kind.name


def flipped(at: int, value: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[at : at + len(value)] = value
        path.write_bytes(bytes(raw))

    return apply


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new))


def nothing(path: Path) -> None:
    pass


# What is written (keys), done to the file, and said.
CORRUPT: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "no GGUF": ({}, flipped(0, b"GGML"), "is no GGUF file"),
    "version 1": ({}, flipped(4, struct.pack("<I", 1)), "is GGUF of version 1, known are versions 2 and 3"),
    "big-endian": ({}, flipped(4, struct.pack(">I", 3)), "is GGUF of big-endian"),
    "too many tensors": ({}, flipped(8, struct.pack("<Q", 1 << 40)), "tensors, more than 200,000"),
    "too many keys": ({}, flipped(16, struct.pack("<Q", 1 << 40)), "keys, more than 100,000"),
    "a header that ends early": ({}, cut(0.02), "its header ends early"),
    "weights that end early": ({}, cut(0.9), "do not lie in the file"),
    "a name twice": ({}, replaced(b"blk.1.attn_q.weight", b"blk.1.attn_k.weight"), "two tensors of one name"),
    "an unknown tensor": (
        {}, replaced(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"), "transformers has no blk.1.attn_z.weight in a",
    ),
    "an unknown architecture": (
        {}, replaced(b"llama", b"mamma"), "is GGUF of the architecture 'mamma', which is not read",
    ),
    "heads that do not divide": (
        {"llama.attention.head_count": 5}, nothing, "blk.0.attn_q.weight: 64 rows are no 5 heads"
    ),
    "no heads": ({"llama.attention.head_count": "four"}, nothing, "its llama.attention.head_count is four"),
    "a scaled rotary embedding": (
        {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, nothing,
        "its llama.rope.scaling.type, llama.rope.scaling.factor would be lost: transformers has no config for it",
    ),
    "an unknown key": ({"llama.residual_scale": 0.5}, nothing, "its llama.residual_scale would be lost"),
    "a text where a number belongs": ({"llama.context_length": "long"}, nothing, "max_position_embeddings must be"),
    "one of two parts": ({"split.count": 2}, nothing, "is one of 2 parts"),
    "an alignment of nothing": ({"general.alignment": 0}, nothing, "its alignment is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CORRUPT)
def test_what_is_corrupt_or_would_be_lost_is_refused(case, tmp_path):
    pairs, spoil, message = CORRUPT[case]
    path = write(tmp_path / "m.gguf", "llama", pairs=pairs)
    spoil(path)
    with pytest.raises(InputError) as raised:
        open_checkpoint(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_original_config_beside_a_file_is_taken(tmp_path):
    write(tmp_path / "m.gguf", "llama", pairs={"llama.rope.scaling.type": "longrope"})
    write_json(tmp_path / "config.json", {"model_type": "llama", "rope_scaling": {"type": "yarn"}})
    for path in (tmp_path, tmp_path / "m.gguf"):
        found = open_checkpoint(path)
        assert found.config == {"model_type": "llama", "rope_scaling": {"type": "yarn"}}
        assert (found.path, found.config_file) == (tmp_path, "config.json")


def test_the_model_of_a_folder(tmp_path):
    write(tmp_path / "a.gguf", "llama")
    (tmp_path / "mmproj-a.gguf").write_bytes(b"")
    assert open_checkpoint(tmp_path).files == (tmp_path / "a.gguf",)
    write(tmp_path / "b.gguf", "llama")
    with pytest.raises(InputError, match="2 GGUF models") as raised:
        open_checkpoint(tmp_path)
    assert "FOLDER/a.gguf, or org/name:a.gguf" in str(raised.value.hint)


def test_a_model_in_parts(tmp_path):
    whole = write(tmp_path / "whole.gguf", "llama", types=("F32",))
    reader = gguf.GGUFReader(whole)
    (tmp_path / "parts").mkdir()
    for number in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / "parts" / f"m-{number:05d}-of-00002.gguf", "llama")
        for key, field in reader.fields.items() if number == 1 else ():
            if key.startswith(("llama.", "tokenizer.ggml.bos")):
                add(writer, key, field.contents())
        writer.add_uint16("split.count", 2)
        for tensor in reader.tensors[number - 1 :: 2]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    one, two = open_checkpoint(whole), open_checkpoint(tmp_path / "parts")
    assert len(two.files) == 2
    expected, found = values_of(one), values_of(two)
    assert {name: value.tobytes() for name, value in found.items()} == {n: v.tobytes() for n, v in expected.items()}
    two.files[1].unlink()
    with pytest.raises(InputError, match=r"missing part m-00002-of-00002\.gguf"):
        open_checkpoint(tmp_path / "parts")


def test_a_file_on_the_hub(server, tmp_path, monkeypatch):
    repository = tmp_path / "r"
    repository.mkdir()
    monkeypatch.setattr(hub_client, "FIRST_BYTES", 300)
    monkeypatch.setattr(hub_client, "PIECE_BYTES", 500)
    write(
        repository / "a.gguf",
        "llama",
        pairs={"llama.rope.freq_base": 5e5},
        more={"rope_freqs.weight": llama3_factors()},
    )
    (repository / "README.md").write_text("a model")
    server.repositories["org/m"] = repository
    described = open_model("org/m", tmp_path, weights=False)
    local = open_checkpoint(repository)
    assert {n: (i.dtype, i.shape) for n, i in described.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in local.tensors.items()
    }
    assert described.config == local.config
    assert local.config["rope_scaling"] == LLAMA3
    assert len(server.fetched(".gguf")) > 3
    assert all(span for _, span in server.fetched(".gguf"))
    write(repository / "b.gguf", "llama", seed=1)
    with pytest.raises(InputError, match="2 GGUF models"):
        open_model("org/m", tmp_path, weights=False)
    with pytest.raises(InputError, match=r"has no file c\.gguf on the hub"):
        open_model("org/m:c.gguf", tmp_path, weights=False)
    found = open_model("org/m:b.gguf", tmp_path, weights=True)
    assert [path.name for path in found.files] == ["b.gguf"]
    assert not [path for path in tmp_path.rglob("a.gguf") if "snapshots" in str(path)]
    expected, there = values_of(open_checkpoint(repository / "b.gguf")), values_of(found)
    assert all(there[name].tobytes() == value.tobytes() for name, value in expected.items())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.status = 503
    again = open_model(f"org/m@{found.revision}:b.gguf", tmp_path, weights=False)
    assert again.tensors.keys() == found.tensors.keys()


def test_a_file_of_plain_floats_is_not_quantised(tmp_path):
    found = open_checkpoint(write(tmp_path / "m.gguf", "qwen2", types=("BF16",)))
    assert found.quantised is None
    assert {info.dtype for info in found.tensors.values() if info.kind == "stored"} == {"BF16"}
    assert {info.output_dtype for info in found.tensors.values()} == {"BF16"}


def test_a_file_is_opened_without_torch(tmp_path):
    write(tmp_path / "m.gguf", "llama")
    code = (
        "import sys; from pathlib import Path; from deltamerge.models.checkpoint import open_checkpoint; "
        f"open_checkpoint(Path({str(tmp_path / 'm.gguf')!r})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_is_asked_for(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", "llama")
    for cached in (gguf_file.package, gguf_file.block_of):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="GGUF files need gguf") as raised:
        open_checkpoint(tmp_path / "m.gguf")
    assert raised.value.hint == "pip install 'deltamerge[gguf]'"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"type": "linear", "factor": 8.0}, {"rope_type": "linear", "factor": 8.0}),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "finetuned": True},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "llama3": ({}, LLAMA3),
}  # fmt: skip


def llama3_factors() -> np.ndarray:
    """By what transformers divides the frequencies of heads of 16 for `LLAMA3`, as llama.cpp stores them."""
    config = transformers.LlamaConfig(
        **MODELS["llama"][1] | {"rope_theta": 5e5, "head_dim": 16}, rope_scaling=dict(LLAMA3)
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    return (5e5 ** -(np.arange(0, 16, 2) / 16) / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize("case", ROPES)
def test_scaled_rotary_embeddings_that_a_config_can_tell(case, tmp_path):
    """The frequencies that transformers computes from the config are those that the file's factors were made of."""
    said, expected = ROPES[case]
    factors = llama3_factors()
    more = {"rope_freqs.weight": factors} if case == "llama3" else {}
    pairs = {f"llama.rope.scaling.{key}": value for key, value in said.items()} | {"llama.rope.freq_base": 5e5}
    write(tmp_path / "m.gguf", "llama", pairs=pairs, more=more)
    assert open_checkpoint(tmp_path / "m.gguf").config["rope_scaling"] == expected
    if more:
        write(tmp_path / "m.gguf", "llama", pairs=pairs, more={"rope_freqs.weight": factors * 1.01})
        with pytest.raises(InputError, match=r"its rope_freqs\.weight would be lost"):
            open_checkpoint(tmp_path / "m.gguf")


def test_keys_without_effect_are_no_loss(tmp_path):
    pairs = {"mamba.attention.head_count": 0, "mamba.feed_forward_length": 0, "mamba.ssm.dt_b_c_rms": False}
    assert open_checkpoint(write(tmp_path / "m.gguf", "mamba", pairs=pairs)).tensors
    with pytest.raises(InputError, match=r"its mamba\.ssm\.dt_b_c_rms would be lost"):
        open_checkpoint(write(tmp_path / "n.gguf", "mamba", pairs={"mamba.ssm.dt_b_c_rms": True}))


def test_a_merge_of_files_writes_their_config(tmp_path):
    for name in ("base", "a"):
        write(tmp_path / f"{name}.gguf", "llama")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base_model: ./base.gguf\nmodels: [{model: ./a.gguf, parameters: {weight: 0.5}}]\n")
    assert any("transformers makes config.json" in note for note in make_plan(recipe).notes)
    out = run(recipe, tmp_path / "out").folder
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
