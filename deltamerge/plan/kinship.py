"""Whether the models of a merge were trained from one another, told by a sample of their weights and by their files.

A fine-tune's weights are near its base's: ‖Δ‖/‖W‖ is far below 1. Two models that were trained apart are unrelated:
‖Δ‖/‖W‖ is √2 if their norms agree, and the cosine of their weights 0. One tensor proves nothing (a new head, or one
that began at zero), so the median of several decides.

Weights do not show which of two related models is the base, because Δ and −Δ are alike. Only cards and configs, a task
head or a chat template tell, and they may be missing. A wrong base of the same family also looks like the right base:
two checkpoints of one training are near each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from deltamerge.errors import InputError
from deltamerge.files.strict_json import read_json
from deltamerge.formats.components import front_matter
from deltamerge.plan.inputs import Input, Inputs, ties
from deltamerge.tensors.dtypes import ITEMSIZE, PLAIN, bits_type
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.names import LM_HEAD, TASK_HEAD, TOKEN_EMBEDDING
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.views import floats

SAMPLED = 12  # number of compared tensors
PLACES, RUN = 4, 1024  # runs per tensor, and elements of a run
LEAST = 256  # least elements of a compared tensor: the cosine of unrelated weights is then within 0.2 of zero
RELATED = 0.5  # the least cosine of related models; below it the change is larger than the weights
NOTHING = 0.1
HEADLESS = re.compile(r"(Model|ForMaskedLM|ForPreTraining|ForCausalLM|LMHeadModel)$")


@dataclass(frozen=True, slots=True)
class Kin:
    """The relation of two models' weights: the medians of ‖Δ‖/‖W‖ and of the cosine over `count` tensors."""

    relative: float
    cosine: float
    count: int


def unrelated(inputs: Inputs) -> Iterator[str]:
    """Yield a message for every model whose weights have little in common with the base's (without a base: with the
    first's).

    Reads some thousand elements of a few tensors, always the same.
    """
    seen = set()
    with Reader() as reader:
        for group in inputs.groups:
            first, *others = group.all
            for other in others:
                pair = first.checkpoint.reference, other.checkpoint.reference
                if pair in seen:
                    continue
                seen.add(pair)
                kin = measured(first, other, reader)
                if kin is not None and kin.cosine < RELATED:
                    yield _unrelated(first, other, kin, is_base=group.base is not None)


def measured(first: Input, other: Input, reader: Reader) -> Kin | None:
    """Return the relation of two models' weights; None if too little can be compared, or for an adapter or delta."""
    made = any(model.checkpoint.base is not None for model in (first, other))
    if made or any((twin := first.get(n)) is not None and twin.is_same(t) for n, t in other.tensors.items()):
        return None
    found = [kin for pair in _sample(first, other) if (kin := _of_tensor(*pair, reader)) is not None]
    if not found:
        return None
    return Kin(median(relative for relative, _ in found), median(cosine for _, cosine in found), len(found))


def swapped(inputs: Inputs) -> Iterator[str]:
    """Yield a message for every merged model that, by the files, is the base of its base. No weight is read."""
    pairs = [(group.base, tune) for group in inputs.groups if group.base is not None for tune in group.tunes]
    by_name = {(base.checkpoint.reference, tune.checkpoint.reference): (base, tune) for base, tune in pairs}
    for base, tune in by_name.values():
        if (
            _has_files(base)
            and _has_files(tune)
            and not _comes_from(tune, base)
            and (why := _why_swapped(base, tune)) is not None
        ):
            yield f"{base.name} and {tune.name} look swapped, {why}; base_model is what the others were trained from"


def seem_equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Tell whether two tensors of a model seem equal, by a few runs of each.

    Tensors that cannot be read yet count as equal.
    """
    if one.is_same(other) or one.kind != "stored" or other.kind != "stored":
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    count = one.nbytes // ITEMSIZE[one.dtype]
    buffers = np.empty((2, min(RUN, count)), bits_type(one.dtype))
    with Reader() as reader, suppress(InputError):
        for start in {(count - buffers.shape[1]) * i // (PLACES - 1) for i in range(PLACES)}:
            for tensor, buffer in zip((one, other), buffers, strict=True):
                reader.read_into(tensor, start, buffer)
            if not np.array_equal(*buffers):
                return False
    return True


def heads_apart(inputs: Inputs) -> Iterator[str]:
    """Yield a message for every model that has a head of its own against its config, unless all models have one."""
    own = [m for m in inputs.all if LM_HEAD in m.tensors and ties(m.checkpoint.config, default=False)]
    apart = [m.name for m in own if not any(seem_equal(m.tensors[LM_HEAD], twin) for twin in _embeddings(m))]
    if len(inputs.tunes) < 2 or inputs.untied or len(apart) == len(inputs.all):
        return
    for name in apart:
        yield (
            f"{name}: {LM_HEAD} differs from the embedding, but config.json ties them, and the merge follows it; "
            "if that head was trained, write tie_word_embeddings: false there"
        )


def _embeddings(model: Input) -> Iterator[TensorInfo]:
    return (tensor for name, tensor in model.tensors.items() if TOKEN_EMBEDDING.search(name))


def strangers(models: Sequence[Input]) -> str | None:
    """Return a message that models have different architectures, by their configs. None: they agree, or do not tell."""
    kinds: dict[str, str] = {}
    for model in models:
        config = model.checkpoint.config
        if (kind := config.get("model_type") or config.get("_class_name")) is not None:
            names = config.get("architectures")
            shown = f" ({names[0]})" if isinstance(names, list) and names else ""
            kinds.setdefault(str(kind), f"{model.name} is {kind}{shown}")
    if len(kinds) < 2:
        return None
    return f"{', '.join(list(kinds.values())[:4])}: models of different architectures cannot be merged"


def _unrelated(first: Input, other: Input, kin: Kin, *, is_base: bool) -> str:
    what = "nothing" if kin.cosine < NOTHING else "little"
    asked = f"is {first.name} its base?" if is_base else "were they trained from one model?"
    return (
        f"{other.name} shares {what} with {first.name}: ‖Δ‖/‖W‖ is {kin.relative:.2f} and the cosine "
        f"{kin.cosine:.2f}, in the median of {kin.count} weights; {asked}"
    )


def _sample(first: Input, other: Input) -> list[tuple[TensorInfo, TensorInfo]]:
    """Return pairs of the larger matrices, spread evenly through the model."""
    pairs = []
    for name, tensor in other.tensors.items():
        twin = first.get(name)
        if twin is None or twin.shape != tensor.shape or len(tensor.shape) < 2 or math.prod(tensor.shape) < LEAST:
            continue
        if {tensor.dtype, twin.dtype} <= PLAIN:
            pairs.append((twin, tensor))
    if not pairs:
        return []
    middle = median(math.prod(twin.shape) for twin, _ in pairs)
    large = [pair for pair in pairs if math.prod(pair[0].shape) >= middle]
    return [large[i * len(large) // min(SAMPLED, len(large))] for i in range(min(SAMPLED, len(large)))]


def _of_tensor(first: TensorInfo, other: TensorInfo, reader: Reader) -> tuple[float, float] | None:
    """Return ‖Δ‖/‖W‖ and the cosine of the sampled elements. None: one model's are all zero, or some are not finite."""
    size = math.prod(first.shape)
    count = min(RUN, size // PLACES)
    starts = [i * (size - count) // (PLACES - 1) for i in range(PLACES)]
    found = ([floats(reader, info, start, count) for start in starts] for info in (first, other))
    with np.errstate(invalid="ignore"):  # a signalling NaN
        x, y = (np.concatenate(parts).astype(np.float64) for parts in found)
    if not (np.isfinite(x).all() and np.isfinite(y).all() and x.any() and y.any()):
        return None
    norm = float(np.linalg.norm(x))
    return float(np.linalg.norm(y - x)) / norm, float(x @ y) / (norm * float(np.linalg.norm(y)))


def _has_files(model: Input) -> bool:
    """Tell whether a model's card and config are its own, and not from the base of an adapter or a delta."""
    checkpoint = model.checkpoint
    return bool(checkpoint.files) and checkpoint.adapter is None and checkpoint.base is None


def _comes_from(tune: Input, base: Input) -> bool:
    """Tell whether a model's card or config says that it was trained from the other."""
    names = _names(base) - _names(tune)
    return bool(names & _origins(tune))


def _why_swapped(base: Input, tune: Input) -> str | None:
    if _comes_from(base, tune):
        return f"as {base.name} says that it was made of {tune.name}"
    heads = [base.stored[name] for name in base.tensors if name not in tune.tensors and re.search(TASK_HEAD, name)]
    names = tune.checkpoint.config.get("architectures")
    classes = base.checkpoint.config.get("architectures")
    is_headless = isinstance(names, list) and bool(names) and HEADLESS.search(str(names[0])) is not None
    has_head = isinstance(classes, list) and bool(classes) and HEADLESS.search(str(classes[0])) is None
    if heads and is_headless and has_head:
        return f"as {base.name} has a task head ({heads[0]}) that {tune.name} lacks"
    if _chats(base) and _tokenizer_config(tune.checkpoint.path) and not _chats(tune):
        return f"as {base.name} has a chat template and {tune.name} none"
    return None


def _names(model: Input) -> set[str]:
    """Return the names by which other models may refer to a model, in lower case, and their last parts."""
    checkpoint = model.checkpoint
    known = {checkpoint.hub_id or "", checkpoint.reference.partition("@")[0], model.name, checkpoint.path.name}
    known = {name.rstrip("/").lower() for name in known}
    return {part for name in known for part in (name, name.rpartition("/")[2]) if part and not part.startswith(".")}


def _origins(model: Input) -> set[str]:
    """Return the models that a model's card and config name as its origin: whole ids and their last parts."""
    said = front_matter(model.checkpoint.path / "README.md").get("base_model")
    listed = said if isinstance(said, list) else [said]
    stated = [*listed, model.checkpoint.config.get("_name_or_path")]
    names = {text.rstrip("/").lower() for text in stated if isinstance(text, str)}
    return names | {name.rpartition("/")[2] for name in names}


def _chats(model: Input) -> bool:
    folder = model.checkpoint.path
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool(_tokenizer_config(folder).get("chat_template"))


def _tokenizer_config(folder: Path) -> dict[str, object]:
    with suppress(InputError):
        return read_json(folder / "tokenizer_config.json")
    return {}
