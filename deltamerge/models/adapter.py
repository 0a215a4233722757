"""PEFT's adapters on a base, read as if merged: only headers and configs are opened, weights are computed when read.

The format is PEFT's: `adapter_config.json` and `adapter_model.safetensors`; `adapter_parts` knows its tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import input_error
from deltamerge.files.strict_json import read_json
from deltamerge.formats.peft.adapter import (
    BY_PEFT,
    CONFIG,
    Adapter,
    Parts,
    checked_config,
    parameters_of,
    parts,
    tokens_of,
    with_rows,
)
from deltamerge.formats.peft.lora import (
    expected,
    fits,
    is_lora,
    is_low_rank,
    is_residual,
    stored_transposed,
    with_bias,
    with_experts,
    with_loha,
    with_lokr,
    with_lora,
)
from deltamerge.formats.weight_files import ALLOW, read_weights
from deltamerge.models.checkpoint import Checkpoint, decoded
from deltamerge.models.matching import Shape, match_one
from deltamerge.tensors import experts
from deltamerge.tensors.dtypes import PLAIN
from deltamerge.tensors.names import EMBEDDING, LM_HEAD, TOKEN_EMBEDDING, block_name, is_conv1d
from deltamerge.tensors.tensor import Tensor, TensorInfo, viewed
from deltamerge.tensors.views import cast

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MOST_PARAMETERS = 6  # factors of one module; shapes tell which parameter each belongs to
Tensors = dict[str, TensorInfo]


def open_adapter(
    path: Path, *, reference: str, revision: str | None = None, hub_id: str | None = None, pickles: bool = False
) -> Adapter:
    """Return the adapter in the folder `path`.

    InputError: no such folder, not an adapter that can be read, pickled (unless `pickles` are allowed), or unsupported
    settings.
    """
    with errors.context(reference):
        if not path.is_dir():
            raise InputError("is a file, not an adapter's folder" if path.exists() else "no such folder")
        try:
            names = os.listdir(path)
        except OSError as error:
            raise input_error(error) from error
        file = check_files(names, pickles=pickles)
        config = checked_config(read_json(path / CONFIG))
        tensors = read_weights(path / file).tensors
        return Adapter(reference, path, tensors, (path / file, path / CONFIG), config, revision, hub_id)


def check_files(names: Collection[str], *, pickles: bool = False) -> str:
    """Return the weight file of an adapter's folder with files of these `names`.

    InputError: it is none, or only pickled.
    """
    if CONFIG not in names:
        raise InputError(
            f"has no {CONFIG}: not a PEFT adapter", hint="after + stands the folder or hub id of an adapter"
        )
    if WEIGHTS not in names and PICKLED in names:
        if pickles:
            return PICKLED
        raise InputError(
            f"only {PICKLED}, a PyTorch pickle; deltamerge reads safetensors and never unpickles", hint=ALLOW
        )
    if WEIGHTS not in names:
        raise InputError(f"has no {WEIGHTS}", hint="save the adapter with peft's save_pretrained()")
    return WEIGHTS


def expand(base: Checkpoint, adapter: Adapter, reference: str) -> Checkpoint:
    """`base` with `adapter` merged into it, tensor by tensor.

    Names are the base's, or the adapted model's if it has a head that the base lacks. A quantised base is decoded.
    InputError: it cannot be decoded, or a tensor of the adapter has no place in the base, or another shape.
    """
    with errors.context(base.reference):
        base = decoded(base)
    with errors.context(adapter.reference):
        found = parts(adapter)
        names = _in_form(base.tensors, found)
        targets = _targets(found, adapter.config, names)
        wanted = dict(_wanted(found, targets))
        touched = {*wanted, *found.whole} - {f"{module}.weight" for module in found.rows}
        tied = _tied(base, adapter, names)
        untied = bool(tied) and _untie(tied, adapter, names, touched)
        added, places = _places(names, wanted, found)
        tensors: Tensors = {}
        for name, info in names.items():
            full = name if untied and name == LM_HEAD else added + name
            tensors[full] = replace(info, name=full)
        usual = next((info.output_dtype for info in tensors.values() if info.dtype in PLAIN), "F32")
        whole = {places.get(name, name): (name, info) for name, info in found.whole.items()}
        if tied:
            whole = _shared(whole, added + tied, adapter.config)
            if not untied:
                whole.pop(LM_HEAD, None)
        for kept, (name, info) in whole.items():
            old = tensors.get(kept)
            if old is None and f"{name.rpartition('.')[0]}.weight" not in (*found.whole, *wanted):
                raise InputError(f"the base has no {name}", hint="is this the base that the adapter was trained on?")
            if old is not None and old.shape != info.shape:
                message = f"{name} has the shape {list(info.shape)}, in the base {list(old.shape)}"
                raise InputError(message, hint="give the base added tokens first: resize_token_embeddings()")
            tensors[kept] = _cast(info, kept, usual if old is None else old.output_dtype)
        _update(tensors, places, found, targets, adapter.config, base.config)
        if untied and added + tied not in whole:
            _leave_residual(tensors, added + tied, names[tied])
        _replace_rows(tensors, places, found, adapter.config, tied=LM_HEAD not in base.tensors)
        untied |= base.config.get("tie_word_embeddings") is True and LM_HEAD in touched & names.keys()
        config = _config(base.config, adapter, {n: i.shape for n, i in found.whole.items() if n not in names}, untied)
        tensors = _in_own_form(tensors, base.tensors, added)
    files = (*base.files, *adapter.files)
    return replace(base, reference=reference, tensors=tensors, files=files, config=config, adapter=adapter)


def _in_form(tensors: Tensors, found: Parts) -> Tensors:
    """Return the base's tensors, with experts fused or taken apart where the adapter was trained on the other."""
    apart, fused = experts.containers(tensors)
    one_by_one = experts.layout_of(f"{module}.weight" for module in found.modules)
    if apart and not fused and any(root.endswith("experts") for root in found.nested()):
        return experts.fold(tensors)
    if fused and not apart and (layout := one_by_one) is not None:
        return {n: replace(i, name=n) for n, i in _apart(tensors, layout)}
    return dict(tensors)


def _apart(tensors: Tensors, layout: experts.Layout) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the tensors with fused experts as views of one expert's part each."""
    found = experts.by_container(tensors)
    for name, info in tensors.items():
        container, _, key = name.rpartition(".")
        own = layout.get(key) if key in found.get(container, {}) else None
        if own is None:
            yield name, info
            continue
        pair = (found[container].get(which) for which in ("gate_up_proj", "down_proj"))
        if stored_transposed(*pair):
            info = experts.turned(info)
        yield from ((f"{container}.{rest}", part) for rest, part in experts.unfold(info, own).items())


def _in_own_form(tensors: Tensors, stored: Tensors, added: str) -> Tensors:
    """Return the updated tensors as the base stores its experts."""
    own_apart, own_fused = experts.containers(stored)
    apart, fused = experts.containers(tensors)
    if own_apart and fused and not own_fused and (layout := experts.layout_of(stored)) is not None:
        parts = {name: replace(info, name=name) for name, info in _apart(tensors, layout)}
    elif own_fused and apart and not own_apart:
        parts = {n: _as_stored(i, stored.get(n.removeprefix(added))) for n, i in experts.fold(tensors).items()}
    else:
        return tensors
    order = {added + name: i for i, name in enumerate(stored)}
    return dict(sorted(parts.items(), key=lambda item: order.get(item[0], len(order))))


def _as_stored(info: TensorInfo, old: TensorInfo | None) -> TensorInfo:
    """Fused experts in the orientation of the base's, or the base's own where nothing changed them."""
    if old is None or not experts.is_joined(info.tensor):
        return info
    own = old.tensor
    if all(experts.is_turned_stack(part.whole) or _is_inside(part, own) for part in info.tensor.inputs):
        return replace(old, name=info.name)
    return replace(experts.turned(info), name=info.name) if info.shape != old.shape else info


def _is_inside(part: Tensor, whole: Tensor) -> bool:
    """Tell whether a tensor is a part of another tensor that the adapter does not change."""
    return part.whole is whole.whole or (part.kind == whole.kind == "stored" and part.path == whole.path)


def _targets(found: Parts, config: Mapping[str, Any], names: Tensors) -> dict[str, list[str]]:
    """Return the parameters of each adapted module that can have factors.

    These are the `target_parameters` that the module has in the base, or its weight. InputError: there are fewer
    parameters than factors.
    """
    ends = {tuple(name.split(".")[-2:]) for name in names}
    result = {}
    for root, levels in found.nested().items():
        named = [p for p in parameters_of(config, root) if (root.rpartition(".")[2], p) in ends]
        result[root] = named if named and (len(levels) > 1 or named != ["weight"]) else ["weight"]
        if len(levels) > len(result[root]):
            message = f"{root}: has factors for {len(levels)} parameters, target_parameters names {len(named)}"
            raise InputError(message, hint="the config and the weights are not of one adapter")
    places = [f".{root}.{target}" for root, named in result.items() for target in named]
    for target in config.get("target_parameters") or ():
        if not any(place.endswith(f".{target}") for place in places):
            message = f"target_parameters names {target}, which the adapter has no factors for"
            raise InputError(message, hint="the config and the weights are not of one adapter")
    return result


def _wanted(found: Parts, targets: Mapping[str, list[str]]) -> Iterator[tuple[str, Shape]]:
    """Yield the names, in the adapted model, of the weights that the adapter changes, and their shapes where known."""
    for root, levels in found.nested().items():
        if targets[root] == ["weight"]:
            with errors.context(root):
                yield f"{root}.weight", expected(levels[0])
                if "B.bias" in levels[0]:
                    yield f"{root}.bias", levels[0]["B.bias"].shape
        else:
            yield from ((f"{root}.{target}", None) for target in targets[root])
    yield from ((f"{module}.weight", None) for module in found.rows)


def _places(names: Tensors, wanted: Mapping[str, Shape], found: Parts) -> tuple[str, dict[str, str]]:
    """Return the prefix for the base's names, and the base's name of each tensor that the adapter changes.

    A base saved as BertModel has `encoder.…` where an adapted BertForSequenceClassification has `bert.encoder.…`, or
    the other way round. All other differences are matched as between two models.
    """
    asked = [*wanted, *found.whole]
    first = next(iter(wanted or found.whole), "").partition(".")[0] + "."
    heads = dict.fromkeys(name.partition(".")[0] + "." for name in names)
    choices = [("", ""), (first, ""), *(("", head) for head in heads)]
    main = list(wanted) or asked
    added, taken = max(choices, key=lambda c: sum((c[1] + w).removeprefix(c[0]) in names for w in main))
    places = {name: taken + name for name in asked if (taken + name).removeprefix(added) in names}
    if len(places) < len(asked):
        shapes = {**{name: info.shape for name, info in found.whole.items()}, **wanted}
        known = {name: info.shape for name, info in names.items()}
        matched = match_one(shapes, known, "the adapter", "the base").canonical
        better = {name: place for name in asked if (place := _inside(matched[name], names)) is not None}
        if len(better) > len(places):
            return "", better
    return added, places


def _inside(name: str, names: Tensors) -> str | None:
    """Return a name in the base. Experts are matched within their layer, in whatever module they are."""
    if name in names or name.split(".")[-2:-1] != ["experts"]:
        return name if name in names else None
    end, block = "." + ".".join(name.split(".")[-2:]), block_name(name)
    found = [other for other in names if other.endswith(end) and block_name(other) == block]
    return found[0] if len(found) == 1 else None


def _update(
    tensors: Tensors,
    places: Mapping[str, str],
    found: Parts,
    targets: Mapping[str, list[str]],
    config: Mapping[str, Any],
    base: Mapping[str, Any],
) -> None:
    """Put the update of every adapted module on its weight; `base` is the base's config."""
    nested = found.nested()
    turned = _turned(nested, tensors, places, config, base)
    for root, levels in nested.items():
        with errors.context(root):
            if targets[root] != ["weight"]:
                _update_experts(root, targets[root], levels, tensors, places, config)
                continue
            info = _place(f"{root}.weight", tensors, places)
            key = f"{root}.weight" if "weight" in parameters_of(config, root) else root
            # PEFT loads a stored base layer last; the initial B A is already subtracted from it.
            own = {**config, "init_lora_weights": True} if f"{root}.weight" in found.whole else config
            tensors[info.name] = _updated(info, levels[0], key, own, turned=root in turned)
            if "B.bias" in levels[0]:
                bias = tensors.get(places.get(f"{root}.bias", ""))
                shifted = with_bias(bias, levels[0], root, config)
                tensors[shifted.name] = shifted


def _updated(
    info: TensorInfo, factors: Mapping[str, TensorInfo], key: str, config: Mapping[str, Any], *, turned: bool
) -> TensorInfo:
    """Return a weight with its update.

    key      the module, as patterns match it
    turned   whether the weight is stored (in, out)
    InputError: shapes that do not fit, or a weight that is no plain float.
    """
    if info.dtype not in PLAIN:
        raise InputError(f"the base's weight is {info.dtype}", hint="adapters are merged into unquantised weights")
    if is_lora(factors):
        return with_lora(info, factors, key, config, turned)
    return (with_loha if config.get("peft_type") == "LOHA" else with_lokr)(info, factors, key, config)


def _update_experts(
    root: str,
    targets: list[str],
    levels: list[dict[str, TensorInfo]],
    tensors: Tensors,
    places: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Put the updates of a module's parameters on the parameters that they fit, the innermost wrapper's first.

    PEFT wraps parameters in the order of the module, the gate first.
    """
    if len(targets) > MOST_PARAMETERS:
        raise InputError(f"target_parameters names {len(targets)} parameters of it", hint=BY_PEFT)
    infos = {target: _place(f"{root}.{target}", tensors, places) for target in sorted(targets, reverse=True)}
    matching = next(
        (
            order
            for order in permutations(sorted(infos, key=lambda target: "gate" not in target), len(levels))
            if all(fits(infos[t], factors) for t, factors in zip(order, levels, strict=True))
        ),
        None,
    )
    if matching is None:
        raise InputError(f"its factors do not fit {', '.join(infos)}", hint="is this the base that it was trained on?")
    stem = infos[matching[0]].name.rpartition(".")[0]
    turned = stored_transposed(tensors.get(f"{stem}.gate_up_proj"), tensors.get(f"{stem}.down_proj"))
    for target, factors in zip(matching, levels, strict=True):
        info = infos[target]
        tensors[info.name] = with_experts(info, factors, f"{root}.{target}", config, turned)


def _replace_rows(
    tensors: Tensors, places: Mapping[str, str], found: Parts, config: Mapping[str, Any], *, tied: bool
) -> None:
    """Put the rows of trainable tokens into embeddings; a head that is tied to one has them too."""
    for module, values in found.rows.items():
        name = f"{module}.weight"
        if tied and len(found.rows) > 1 and name not in places and name.endswith(LM_HEAD):
            continue
        with errors.context(module):
            info = _place(name, tensors, places)
            tensors[info.name] = with_rows(info, module, values, config)


def _place(name: str, tensors: Tensors, places: Mapping[str, str]) -> TensorInfo:
    found = tensors.get(places.get(name, ""))
    if found is None:
        raise InputError(f"the base has no {name}", hint="is this the base that the adapter was trained on?")
    return found


def _turned(
    nested: Mapping[str, list[dict[str, TensorInfo]]],
    tensors: Tensors,
    places: Mapping[str, str],
    config: Mapping[str, Any],
    base: Mapping[str, Any],
) -> set[str]:
    """Return the modules that store their weight as (in, out). Model type and name tell the class Conv1D.

    For models that transformers does not have, shapes tell. A square weight there is stored like others of its name, or
    beside it, whose biases give the number of outputs. InputError: nothing tells it, and `fan_in_fan_out` contradicts
    shapes.
    """
    found, square, shapes = set(), [], set()
    for root, levels in nested.items():
        info, shape = tensors.get(places.get(f"{root}.weight", "")), expected(levels[0])
        if info is None or shape is None or len(shape) != 2 or "weight" in parameters_of(config, root):
            continue  # PEFT reads a parameter of any class as (out, in)
        if is_conv1d(info.name, base):
            found.add(root)
        elif shape[0] == shape[1]:
            square.append((root, info.name))
        else:
            shapes.add(info.shape == shape[::-1])
    said = _by_biases(tensors) if square else {}
    shapes.add(bool(config.get("fan_in_fan_out")))
    for root, name in square:
        module = name.removesuffix(".weight")
        told = said.get(module.rpartition(".")[2]) or said.get(f"{module.rpartition('.')[0]}.") or shapes
        if len(told) > 1:
            message = f"{root}: nothing tells whether its square weight is stored (in, out) or (out, in)"
            raise InputError(message, hint=BY_PEFT)
        if told == {True}:
            found.add(root)
    return found


def _by_biases(tensors: Tensors) -> dict[str, set[bool]]:
    """Tell whether weights are stored (in, out), by the lengths of biases, for weights that are not square.

    Keys are the last part of a module's name, and the part before it (with its dot).
    """
    found: dict[str, set[bool]] = {}
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        bias = tensors.get(f"{module}.bias")
        if module == name or bias is None or len(info.shape) != 2 or info.shape[0] == info.shape[1]:
            continue
        parent, _, last = module.rpartition(".")
        if EMBEDDING.search(name) is None and bias.shape in (info.shape[:1], info.shape[1:]):
            for key in (last, f"{parent}."):
                found.setdefault(key, set()).add(bias.shape == info.shape[1:])
    return found


def _shared(
    whole: dict[str, tuple[str, TensorInfo]], embedding: str, config: Mapping[str, Any]
) -> dict[str, tuple[str, TensorInfo]]:
    """Return the whole tensors by their names, including tensors that PEFT loads into the weight that `embedding`
    shares.

    Both names then get the tensor. A module of `modules_to_save` has its own copy.
    """
    ends = config.get("modules_to_save") or ()
    saved = {name for name in (embedding, LM_HEAD) if any(f".{end}." in f".{name}" for end in ends)}
    loaded = [whole[name] for name in (embedding, LM_HEAD) if name in whole and name not in saved]
    return whole | {name: loaded[-1] for name in (embedding, LM_HEAD) if loaded and name not in saved}


def _leave_residual(tensors: Tensors, embedding: str, old: TensorInfo) -> None:
    """Give an embedding its residual, if A and B of the head start with a part of their shared weight.

    InputError: the embedding has factors of its own.
    """
    head = tensors[LM_HEAD]
    if not is_low_rank(head.tensor) or not is_residual(head.tensor.inputs[0]):
        return
    if tensors[embedding].tensor is not old.tensor:
        message = "changes an embedding that is tied to a head, and takes a part of both out of the base"
        raise InputError(message, hint=BY_PEFT)
    tensors[embedding] = replace(head, name=embedding, tensor=head.tensor.inputs[0])


def _cast(info: TensorInfo, name: str, dtype: str) -> TensorInfo:
    """Return a whole tensor in the base's dtype, as PEFT loads it into the base's module."""
    if info.dtype != dtype and dtype not in PLAIN:
        raise InputError(f"{name}: the base's weight is {dtype}, the adapter's {info.dtype}")
    if info.dtype == dtype:
        return replace(info, name=name)
    return replace(info, name=name, tensor=viewed(cast, [info], info.shape, dtype))


def _tied(base: Checkpoint, adapter: Adapter, names: Tensors) -> str:
    """Return the embedding that the base's head shares its weight with; the first of several; "" where there is
    none."""
    architecture = str((base.config.get("architectures") or ["?"])[0])
    generates = re.search("ForCausalLM|LMHead", architecture) or adapter.config.get("task_type") == "CAUSAL_LM"
    if not generates or LM_HEAD in names or base.config.get("tie_word_embeddings") is False:
        return ""
    found = [name for name in names if TOKEN_EMBEDDING.search(name)]
    return found[0] if found else ""


def _untie(embedding: str, adapter: Adapter, names: Tensors, touched: set[str]) -> bool:
    """Give `names` a head of its own if the adapter changes the head, or the embedding that it is tied to.

    This is what PEFT's forward pass computes; PEFT's merge changes both tensors. Returns whether the result is untied.
    InputError: it shares the weight of several embeddings, or PEFT ties the factors too.
    """
    found = [name for name in names if TOKEN_EMBEDDING.search(name)]
    ends = {name.rpartition(".")[0].rpartition(".")[2] for name in found}
    if LM_HEAD not in touched and not any(name.split(".")[-2] in ends for name in touched if name.endswith(".weight")):
        return False
    if len(found) != 1 or adapter.config.get("ensure_weight_tying"):
        message = "changes an embedding that is tied to the head"
        raise InputError(message, hint=BY_PEFT)
    if tokens_of(adapter.config):
        raise InputError("changes rows of tokens and a head that shares them with the embedding", hint=BY_PEFT)
    names[LM_HEAD] = names[embedding]
    return True


def _config(
    config: dict[str, Any], adapter: Adapter, added: Mapping[str, tuple[int, ...]], untied: bool
) -> dict[str, Any]:
    """Return the base's config, changed where the adapter brings a classifier or unties the head."""
    changed: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    task = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
    heads = [shape[0] for name, shape in added.items() if len(shape) == 2 and name.endswith("weight")]
    suffix = task.get(str(adapter.config.get("task_type")))
    if suffix and heads:
        old = str((config.get("architectures") or [""])[0])
        stem = re.match(r"(\w+?)(Model|For\w+|LMHeadModel)$", old)
        if stem:
            changed["architectures"] = [stem[1] + suffix]
        if heads[-1] != len(config.get("id2label") or (0, 1)):
            labels = {str(i): f"LABEL_{i}" for i in range(heads[-1])}
            changed |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    return config | changed
