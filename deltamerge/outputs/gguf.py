"""A merged model as a GGUF file beside its checkpoint, for the architectures whose conversion is known here.

Names come from the `gguf` package's map. The converter's other steps are here (llama.cpp's convert_hf_to_gguf.py: rows
of q and k in its order of rotary pairs, frequencies of Llama 3's long contexts). Anything unknown is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.gguf.config import llama3_factors
from deltamerge.formats.gguf.file import FILE_TYPES, NEEDED, GgufTensor, Rows, package, type_of, write
from deltamerge.models.checkpoint import decoded, open_checkpoint
from deltamerge.models.gguf_tokenizer import GgufVocabulary, vocabulary
from deltamerge.outputs.checkpoint import CheckpointOutput
from deltamerge.plan.planner import Plan
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.views import in_memory

if TYPE_CHECKING:
    import gguf

PLAIN = "leave output.gguf out, and convert the result with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True, slots=True)
class WrittenArchitecture:
    """How an architecture of transformers is written.

    name       llama.cpp's name of it
    permuted   whether rows of q and k are put in llama.cpp's order
    """

    name: str
    permuted: bool = False


ARCHITECTURES: Mapping[str, WrittenArchitecture] = {
    "llama": WrittenArchitecture("llama", permuted=True),
    "mistral": WrittenArchitecture("llama", permuted=True),
    "qwen2": WrittenArchitecture("qwen2"),
    "qwen3": WrittenArchitecture("qwen3"),
}
COUNTS = ("num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "num_attention_heads")
# The settings that each kind of rotary positions needs.
ROPES: Mapping[str, tuple[str, ...]] = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": (
        "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


class GgufOutput(CheckpointOutput):
    """A checkpoint with a GGUF file for llama.cpp beside it."""

    def check(self, plan: Plan) -> None:
        """Raise InputError: llama.cpp knows no such architecture, tensor or tokenizer."""
        check(plan)

    def remarks(self, plan: Plan) -> tuple[str, ...]:
        """Return the line of the GGUF file, and a note on weights that could not be quantised as asked."""
        return (*(note for note in plan.notes if note.startswith(f"{file_name(plan)}: ")), *plan.left_plain)

    def add(self, plan: Plan, folder: Path) -> tuple[str, ...]:
        """Write the GGUF file of the finished checkpoint. Return a note on it."""
        return (write_gguf(plan, folder),)


OUTPUT = GgufOutput()


def file_name(plan: Plan) -> str:
    """Return the name of the GGUF file of an output."""
    return f"model-{plan.recipe.output.gguf}.gguf"


def check(plan: Plan) -> None:
    """Raise InputError if the model's architecture, one of its tensors, or its tokenizer cannot be written."""
    package(NEEDED)
    config = plan.config
    name = plan.inputs.template.name
    architecture = _architecture(config, name)
    _check_numbers(config, COUNTS, name)
    _check_numbers({**config, **_rope(config, name)}, ("rms_norm_eps", "rope_theta"), name)
    for output in plan.outputs:
        _renamed(architecture, config, output.name, name)
    source = (plan.inputs.vocabulary or plan.inputs.template).checkpoint
    if source.hub_id is None or plan.options.whole:  # of the hub only headers may be there
        vocabulary(source.path, 0)


def write_gguf(plan: Plan, folder: Path) -> str:
    """Write the GGUF file of the finished checkpoint in `folder`, and return a note about it."""
    wanted = plan.recipe.output.gguf
    assert wanted is not None
    checkpoint = decoded(open_checkpoint(folder))
    config = checkpoint.config
    architecture = _architecture(config, folder.name)
    rows = next(info.shape[0] for name, info in checkpoint.tensors.items() if name.endswith("embed_tokens.weight"))
    words = vocabulary(folder, rows)
    tensors = []
    if (frequencies := _frequencies(config, folder)) is not None:
        tensors.append(GgufTensor("rope_freqs.weight", frequencies, "F32"))
    for name, info in checkpoint.tensors.items():
        renamed = _renamed(architecture, config, name, folder.name)
        order = _order(name, config, info.shape[0]) if architecture.permuted else None
        tensors.append(GgufTensor(renamed, info, type_of(renamed, info.shape, wanted), order))
    path = folder / file_name(plan)
    with Reader() as reader:
        write(
            path,
            architecture.name,
            lambda header: _describe(header, config, words, wanted, folder, rows, plan),
            tensors,
            reader,
        )
    return f"{path.name}: {len(tensors)} tensors for llama.cpp, {path.stat().st_size:,} bytes"


def _architecture(config: Mapping[str, Any], name: str) -> WrittenArchitecture:
    found = ARCHITECTURES.get(str(config.get("model_type")))
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise InputError(
            f"{name}: {str(config.get('model_type'))[:40]} is not written as GGUF, only {known}", hint=PLAIN
        )
    if config.get("num_experts") or config.get("num_local_experts"):
        raise InputError(f"{name}: experts are not written as GGUF", hint=PLAIN)
    return found


def _rope(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of rotary positions, as transformers 4 or 5 states them.

    InputError: some are not known.
    """
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(said, Mapping) or any(isinstance(value, Mapping) for value in said.values()):
        raise InputError(f"{name}: rotary positions that differ by layer are not written as GGUF", hint=PLAIN)
    kind = str(said.get("rope_type") or said.get("type") or "default")
    if kind not in ROPES:
        raise InputError(f"{name}: rope_type {kind[:40]} is not written as GGUF", hint=PLAIN)
    theta = said.get("rope_theta") or config.get("rope_theta") or 10000.0
    found = {**said, "rope_type": kind, "rope_theta": theta}
    _check_numbers(found, ROPES[kind], name)
    return found


def _check_numbers(config: Mapping[str, Any], keys: Iterable[str], name: str) -> None:
    """Raise InputError if a config lacks one of `keys`, or a value is no number above 0."""
    for key in keys:
        value = config.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise InputError(f"{name}: config.json has no {key} that is a number, which GGUF files state", hint=PLAIN)


def _renamed(architecture: WrittenArchitecture, config: Mapping[str, Any], name: str, model: str) -> str:
    """Return a tensor's name in the file."""
    library = package(NEEDED)
    arch = next(key for key, value in library.MODEL_ARCH_NAMES.items() if value == architecture.name)
    names = library.get_tensor_name_map(arch, int(config.get("num_hidden_layers") or 0))
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise InputError(f"{model}: {name} has no name in GGUF files of {architecture.name}", hint=PLAIN)
    return str(found)


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the number of query heads, of key heads, and the width of a head."""
    queries = int(config["num_attention_heads"])
    keys = int(config.get("num_key_value_heads") or queries)
    return queries, keys, int(config.get("head_dim") or config["hidden_size"] // queries)


def _order(name: str, config: Mapping[str, Any], rows: int) -> Rows | None:
    """Return the order of llama.cpp's rows of q and k: the two halves of a head, which rotate in pairs, interleaved."""
    queries, keys, _ = _heads(config)
    module = name.rpartition(".")[0]
    heads = queries if module.endswith("q_proj") else keys if module.endswith("k_proj") else 0
    if not heads:
        return None
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _frequencies(config: Mapping[str, Any], folder: Path) -> TensorInfo | None:
    """Return the divisors of rotary frequencies in Llama 3, else None."""
    rope = _rope(config, folder.name)
    if rope["rope_type"] != "llama3":
        return None
    size = _heads(config)[2]
    factors = llama3_factors(rope, size, rope["rope_theta"])
    return in_memory("rope_freqs", "F32", (size // 2,), memoryview(factors.astype("<f4").tobytes()), folder)


def _describe(
    header: gguf.GGUFWriter,
    config: Mapping[str, Any],
    words: GgufVocabulary,
    wanted: str,
    folder: Path,
    rows: int,
    plan: Plan,
) -> None:
    """Add the metadata, by llama.cpp's keys."""
    rope = _rope(config, folder.name)
    queries, keys, size = _heads(config)
    header.add_type("model")
    header.add_name(plan.recipe.name or plan.inputs.template.name.rpartition("/")[2])
    header.add_block_count(int(config["num_hidden_layers"]))
    header.add_context_length(int(config["max_position_embeddings"]))
    header.add_embedding_length(int(config["hidden_size"]))
    header.add_feed_forward_length(int(config["intermediate_size"]))
    header.add_head_count(queries)
    header.add_head_count_kv(keys)
    header.add_rope_freq_base(float(rope["rope_theta"]))
    header.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    if "head_dim" in config:
        header.add_key_length(size)
        header.add_value_length(size)
    if ARCHITECTURES[str(config["model_type"])].permuted:
        header.add_vocab_size(rows)
        header.add_rope_dimension_count(size)
    if rope["rope_type"] == "linear":
        header.add_string(f"{header.arch}.rope.scaling.type", "linear")
        header.add_rope_scaling_factor(float(rope["factor"]))
    header.add_file_type(FILE_TYPES[wanted])
    header.add_quantization_version(2)
    words.add_to(header)
    special = package(NEEDED).SpecialVocab(folder, load_merges=words.kind == "gpt2", n_vocab=rows)
    special.add_to_gguf(header, quiet=True)
    if "bos" not in special.add_special_token:  # llama.cpp would guess by the kind of vocabulary
        header.add_add_bos_token(False)
