"""The weight files of a folder: which are chosen, the index that lists them, and their headers joined."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.strict_json import read_json
from deltamerge.formats.safetensors import Header, read_header
from deltamerge.tensors.tensor import TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# In the order of choice: transformers' names, then diffusers'.
NAMES = (SINGLE, INDEX, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
PICKLED = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)  # fmt: skip
GGUF, DISTRIBUTED = ".gguf", ".distcp"
SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MOST_PARTS = 10_000
MISTRAL = "consolidated"
ALLOW = "pickles: true in the recipe, or --allow-pickles, reads torch's tables of tensors; nothing in them is run"


def weight_source(names: Collection[str], *, pickles: bool = False) -> str:
    """Return the single weight file or the index among a folder's file names, chosen as transformers and diffusers do.

    Mistral's own file (`consolidated.safetensors`) counts if there is no other. `pickles`: torch's files count if there
    are no safetensors.
    """
    for known in NAMES:
        if known in names:
            return known
    if "adapter_config.json" in names:
        raise adapter_error()
    if not names:
        raise InputError("the folder is empty")
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    indices = sorted(name for name in names if ".safetensors.index." in name and name.endswith(".json"))
    for found in (weights, indices):
        chosen = [name for name in found if not name.startswith(MISTRAL)] or found
        if len(chosen) == 1:
            return chosen[0]
    if weights:
        hint = f"download {INDEX} too, or keep one file"
        raise InputError(f"{len(weights)} .safetensors files but no {INDEX}", hint=hint)
    if (model := the_model(names)) is not None:
        return model
    if pickled := sorted(name for name in names if name.endswith(PICKLES)):
        chosen = [name for name in PICKLED if name in names] or [name for name in pickled if name.endswith(".bin")]
        if pickles and (len(chosen) == 1 or chosen[:1] == [PICKLED[0]]):
            return chosen[0]
        what = "only PyTorch pickle files" if not pickles else f"{len(pickled)} PyTorch pickle files, none of them the"
        what += f" ({pickled[0]})" if not pickles else f" model's ({pickled[0]})"
        raise InputError(f"{what}; deltamerge reads safetensors and never unpickles", hint=ALLOW)
    hint = f"a model's folder has {SINGLE}, or {INDEX} and its shards"
    if "snapshots" in names:
        hint = "a repository in the hub's cache: write its hub id, or the path of a folder in snapshots"
    elif steps := [name for name in names if name.startswith("checkpoint-")]:
        hint = (
            f"the folder of a training run: add one of its checkpoints, as in /{max(steps, key=lambda n: (len(n), n))}"
        )
    raise InputError("no safetensors weights", hint=hint)


def adapter_error() -> InputError:
    """Return the error for a reference that names an adapter without its base."""
    return InputError("is an adapter, not a model", hint="name its base before it: base+adapter")


def is_index(source: str) -> bool:
    """Tell whether the choice of `weight_source` is an index."""
    return source.endswith(".json")


def read_weights(path: Path) -> Header:
    """Return the header of a weight file, of either kind; torch's are read only where they are allowed."""
    if not path.name.endswith(PICKLES):
        return read_header(path)
    from deltamerge.formats.torch_bin import read_torch_header

    return read_torch_header(path)


def is_weights(name: str) -> bool:
    """Tell whether a file holds weights, of any kind that is known."""
    return name.endswith((".safetensors", GGUF, *PICKLES))


def is_distributed(names: Iterable[str | Path]) -> bool:
    """Tell whether a folder's file names, or a model's files, show a distributed checkpoint."""
    texts = [str(name) for name in names]
    found = any(name.endswith(DISTRIBUTED) for name in texts)
    return found and not any(name.endswith(".safetensors") for name in texts)


def parts_of(name: str, names: Collection[str]) -> list[str]:
    """Return the files of the model that begins with the file `name`. InputError: one of them is not among `names`."""
    found = SPLIT.fullmatch(name)
    if found is None:
        return [name]
    count = int(found["count"])
    parts = [f"{found['stem']}-{i:05d}-of-{count:05d}{GGUF}" for i in range(1, min(count, MOST_PARTS) + 1)]
    if missing := [part for part in parts if part not in names]:
        raise InputError(f"missing part {missing[0]}", hint="download it, or the whole model again")
    return parts


def first_parts(names: Collection[str]) -> list[str]:
    """Return the GGUF files among `names` that are models, of one in parts the first; no projectors of pictures."""
    found = sorted(name for name in names if name.endswith(GGUF) and not name.startswith("mmproj"))
    numbers = {name: match["number"] for name in found if (match := SPLIT.fullmatch(name))}
    return [name for name in found if numbers.get(name, "00001") == "00001"]


def the_model(names: Collection[str]) -> str | None:
    """Return the first file of the only GGUF model among a folder's file names. None: there is none.

    InputError: there are several.
    """
    found = first_parts(names)
    if len(found) > 1:
        hint = f"name one: FOLDER/{found[0]}, or org/name:{found[0]} on the hub"
        raise InputError(f"{len(found)} GGUF models", hint=hint)
    return found[0] if found else None


def open_weights(
    folder: Path, names: Collection[str], read: Callable[[Sequence[Path]], Sequence[Header]], *, pickles: bool = False
) -> tuple[str, dict[str, TensorInfo], tuple[Path, ...]]:
    """Return the file that was chosen in a folder of these file names, its tensors in order, and the files that hold
    them."""
    source = weight_source(names, pickles=pickles)
    weight_map = read_index(folder / source) if is_index(source) else None
    shards = [source] if weight_map is None else shards_of(weight_map, names)
    files = tuple(folder / shard for shard in shards)
    return source, join(dict(zip(shards, read(files), strict=True)), weight_map), files


def read_index(path: Path, *, empty: bool = False) -> dict[str, str]:
    """Return a shard index: tensor name -> shard. `empty`: it may be of no tensor.

    InputError: no valid index, or a shard that is no plain file name.
    """
    index = read_json(path)
    suffix = ".bin" if ".bin.index" in path.name else ".safetensors"
    with errors.context(path.name):
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not (weight_map or empty):
            raise InputError("has no weight_map")
        for shard in {str(shard): shard for shard in weight_map.values()}.values():
            if not isinstance(shard, str) or not _is_plain(shard, suffix):
                hint = "shards lie beside their index, under plain names"
                raise InputError(f"shard {str(shard)[:80]!r} is not a plain {suffix} file name", hint=hint)
        return weight_map


def shards_of(weight_map: Mapping[str, str], names: Collection[str]) -> list[str]:
    """Return the shards of an index, in order. InputError: one is not among `names`, the files of the folder."""
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if shard not in names]:
        many = f", {len(missing)} of {len(shards)} shards are missing" if len(missing) > 1 else ""
        raise InputError(f"missing shard {missing[0]}{many}", hint="download it, or the whole model again")
    return shards


def _is_plain(name: str, suffix: str) -> bool:
    plain = name.isprintable() and "/" not in name and "\\" not in name and len(name) < 256
    return plain and name.endswith(suffix) and not name.startswith(".")


def join(headers: Mapping[str, Header], weight_map: Mapping[str, str] | None) -> dict[str, TensorInfo]:
    """Return the tensors of all shards, in order.

    InputError: a shard does not hold exactly what the index (`weight_map`) says.
    """
    tensors: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if weight_map is not None and weight_map.get(name) != shard:
                listed = f"lists it in {weight_map[name]}" if name in weight_map else "does not list it"
                raise InputError(f"{shard} holds {name}, the index {listed}", hint="download the model again")
            tensors[name] = info
    aliases = {name for header in headers.values() for name in header.aliases}
    for name in weight_map or ():
        if name not in tensors and name not in aliases:
            shard = "" if weight_map is None else weight_map[name]
            raise InputError(f"{name} is missing in {shard}, where the index lists it", hint="download the model again")
    if not tensors:
        raise InputError("has no tensors")
    return tensors
