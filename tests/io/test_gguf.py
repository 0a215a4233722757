"""GGUF files: names, values and config are those of transformers' own loader; what it cannot tell is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from gguf_files import MODELS, write

from deltamerge.io.checkpoint import Checkpoint, open_checkpoint
from deltamerge.io.dtypes import ITEMSIZE, bits_type, widen
from deltamerge.io.gguf.names import ARCHITECTURES
from deltamerge.io.reader import Reader

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
            for low, high in zip(cuts, cuts[1:], strict=False):
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
