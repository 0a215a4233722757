"""Checkpoints: headers are read first and bytes on demand; names are matched between models."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.io.config_file import read_config
from deltamerge.io.files import (
    input_error,
)
from deltamerge.io.quantised import gguf_error
from deltamerge.io.safetensors_file import Header, read_header
from deltamerge.io.strict_json import read_json
from deltamerge.io.tensor import TensorInfo as TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DELTA = "delta.json"
GGUF = ".gguf"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenizer's vocabulary.

    `ids` maps tokens to ids, in the order of ids; `added` has the tokens that are matched before the model sees the
    text, as tokenizer.json lists them (without the id); `plain` is the number of the model's own tokens.
    """

    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    plain: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's tensors and where they lie, as its headers say.

    reference       what the recipe calls it
    tensors         in transformers' order: files by name, each file in the order of its header
    files           the weight files
    revision        a commit; None for a local folder, as is `hub_id`
    is_delta        the folder is a delta artifact, which has no tensors and no files until it is put over `base`
                    (`delta.over_base`)
    tokens, chat_template   of a model that is yet to be made: what its files will say, where they are not copies
    """

    reference: str
    path: Path
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    config: dict[str, Any]
    revision: str | None = None
    hub_id: str | None = None
    is_delta: bool = False
    base: Checkpoint | None = field(default=None, compare=False, repr=False)
    adapter: Adapter | None = None
    tokens: Tokens | None = field(default=None, compare=False, repr=False)
    chat_template: str | None = field(default=None, compare=False, repr=False)

    @property
    def base_reference(self) -> str:
        """`reference` without its adapter."""
        return self.reference if self.adapter is None else self.reference.removesuffix(f"+{self.adapter.reference}")

    @property
    def sources(self) -> tuple[Checkpoint | Adapter, ...]:
        """The model's folder, and its adapter's."""
        return (self,) if self.adapter is None else (self, self.adapter)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter, as its config and header say."""

    reference: str
    path: Path
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]
    config: dict[str, Any]
    revision: str | None = None
    hub_id: str | None = None


def open_checkpoint(
    path: Path, *, reference: str | None = None, revision: str | None = None, hub_id: str | None = None
) -> Checkpoint:
    """The checkpoint in the folder `path`, from its config, index and headers; no weight is read.

    It is `model.safetensors`, else an index and its shards, else a delta artifact, else the only other
    `.safetensors` file.
    InputError: no such folder, no (valid) config.json, no safetensors weights, an adapter, a shard that is
    missing or does not hold what the index says, or a header at fault.
    """
    reference = reference or str(path)
    with errors.context(reference):
        if not path.is_dir():
            if path.suffix == GGUF and path.exists():
                raise gguf_error(path.name)
            raise InputError("is a file, not a model's folder" if path.exists() else "no such folder")
        try:
            names = os.listdir(path)
        except OSError as error:
            raise input_error(error) from error
        if is_delta(names):
            return Checkpoint(reference, path, {}, (), read_config(path), revision, hub_id, is_delta=True)
        source = weight_source(names)
        config = read_config(path)
        weight_map = read_index(path / INDEX) if source == INDEX else None
        shards = [source] if weight_map is None else shards_of(weight_map, names)
        tensors = join({shard: read_header(path / shard) for shard in shards}, weight_map)
        files = tuple(path / shard for shard in shards)
        return Checkpoint(reference, path, tensors, files, config, revision, hub_id)


def is_delta(names: Collection[str]) -> bool:
    """Whether a model's file names are those of a delta artifact."""
    return DELTA in names and SINGLE not in names and INDEX not in names


def weight_source(names: Collection[str]) -> str:
    """The single weight file or the index among a model's file names, chosen as transformers does."""
    if SINGLE in names:
        return SINGLE
    if INDEX in names:
        return INDEX
    if "adapter_config.json" in names:
        raise adapter_error()
    if not names:
        raise InputError("the folder is empty")
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if len(weights) == 1:
        return weights[0]
    if weights:
        hint = f"download {INDEX} too, or keep one file"
        raise InputError(f"{len(weights)} .safetensors files but no {INDEX}", hint=hint)
    if quantised := sorted(name for name in names if name.endswith(GGUF)):
        raise gguf_error(quantised[0])
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        raise InputError(
            f"only PyTorch pickle files ({pickles[0]}); deltamerge reads safetensors and never unpickles",
            hint="if you trust it, convert it: python -c \"import transformers as t; m = 'MODEL'; "
            "getattr(t, t.AutoConfig.from_pretrained(m).architectures[0]).from_pretrained(m)"
            ".save_pretrained('OUT')\" or https://huggingface.co/spaces/safetensors/convert",
        )
    raise InputError("no safetensors weights", hint=f"a model's folder has {SINGLE}, or {INDEX} and its shards")


def adapter_error() -> InputError:
    """The error for a reference that names an adapter without its base."""
    return InputError("is an adapter, not a model", hint="name its base before it: base+adapter")


def read_index(path: Path) -> dict[str, str]:
    """A shard index: tensor name -> shard. InputError: no valid index, or a shard that is no plain file name."""
    index = read_json(path)
    with errors.context(path.name):
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError("has no weight_map")
        for shard in {str(shard): shard for shard in weight_map.values()}.values():
            if not isinstance(shard, str) or not _is_plain(shard):
                hint = "shards lie beside their index, under plain names"
                raise InputError(f"shard {str(shard)[:80]!r} is not a plain .safetensors file name", hint=hint)
        return weight_map


def shards_of(weight_map: Mapping[str, str], names: Collection[str]) -> list[str]:
    """The shards of an index, in order. InputError: one is not among `names`, the files of the folder."""
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if shard not in names]:
        many = f", {len(missing)} of {len(shards)} shards are missing" if len(missing) > 1 else ""
        raise InputError(f"missing shard {missing[0]}{many}", hint="download it, or the whole model again")
    return shards


def _is_plain(name: str) -> bool:
    plain = name.isprintable() and "/" not in name and "\\" not in name and len(name) < 256
    return plain and name.endswith(".safetensors") and not name.startswith(".")


def join(headers: Mapping[str, Header], weight_map: Mapping[str, str] | None) -> dict[str, TensorInfo]:
    """The tensors of all shards, in order. InputError: a shard does not hold exactly what the index (`weight_map`)
    says."""
    tensors: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if weight_map is not None and weight_map.get(name) != shard:
                listed = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise InputError(f"{shard} holds {name}, the index {listed}", hint="download the model again")
            tensors[name] = info
    for name in weight_map or ():
        if name not in tensors:
            shard = "" if weight_map is None else weight_map[name]
            raise InputError(f"{name} is missing in {shard}, where the index lists it", hint="download the model again")
    if not tensors:
        raise InputError("has no tensors")
    return tensors
