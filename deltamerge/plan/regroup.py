"""Models that store experts in different ways, in the way of the output: fused, one by one, or transposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from deltamerge.models.matching import Names, match
from deltamerge.tensors import experts
from deltamerge.tensors.names import numbers_as_stars
from deltamerge.tensors.tensor import TensorInfo

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class ExpertForm:
    """How a model stores its experts: the shapes of the fused tensors of a container, which of them are stored one by
    one, and their layout. Containers are canonical names with a star for every number: all layers are alike."""

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    apart: frozenset[str]
    layout: experts.Layout | None


def shared_names(models: Sequence[Tensors], labels: Sequence[str]) -> tuple[list[dict[str, TensorInfo]], list[Names]]:
    """The tensors of every model, experts fused if any model has fused ones, and their canonical names."""
    mixed = experts.differ(models)
    tensors = [experts.fold(model) if mixed else dict(model) for model in models]
    return tensors, match([{name: info.shape for name, info in model.items()} for model in tensors], labels)


def form_of(tensors: Tensors, stored: Tensors) -> ExpertForm:
    """The form of a model: its tensors by canonical names, and as its files have them."""
    apart: set[str] = set()
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for container, own in experts.by_container(tensors).items():
        place = numbers_as_stars(container)
        shapes.setdefault(place, {key: info.shape for key, info in own.items()})
        if any(experts.is_joined(info.tensor) for info in own.values()):
            apart.add(place)
    return ExpertForm(shapes, frozenset(apart), experts.layout_of(stored))


def regrouped(
    tensors: Tensors, stored: Mapping[str, str], form: ExpertForm
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """A model's tensors and their names in its files, by canonical names, in another model's form."""
    result: dict[str, TensorInfo] = {}
    names: dict[str, str] = {}
    found = experts.by_container(tensors)
    swapped = {
        container
        for container, own in found.items()
        if experts.is_turned(
            {key: info.shape for key, info in own.items()}, form.shapes.get(numbers_as_stars(container), {})
        )
    }
    for name, info in tensors.items():
        container, _, key = name.rpartition(".")
        if container not in found or key not in found[container]:
            result[name], names[name] = info, stored[name]
            continue
        if container in swapped:
            info = experts.turned(info)
        own = (form.layout or {}).get(key) if numbers_as_stars(container) in form.apart else None
        if own is None or info.shape[1] % len(own):
            result[name], names[name] = info, stored[name]
            continue
        place = stored[name].rpartition(".")[0]
        for rest, part in experts.unfold(info, own).items():
            result[f"{container}.{rest}"] = replace(part, name=f"{place}.{rest}")
            names[f"{container}.{rest}"] = f"{place}.{rest}"
    return result, names


def in_order(names: Mapping[str, str], tensors: Tensors) -> dict[str, str]:
    """Canonical names in the order in which the model's files have them."""
    order = {name: i for i, name in enumerate(tensors)}
    return dict(sorted(names.items(), key=lambda item: order.get(item[1], len(order))))
