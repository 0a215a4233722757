"""Whether transformers builds, from the config of a stack, the layers that are stacked.

A config says by counts, lists, periods and boundaries which layer is which, and its class may read more into it (that
the last layer is of another kind, that a head has a weight for each layer). Only the class knows: it is built without
weights, at home and for the stack, and compared. A model that transformers has no class for is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deltamerge.errors import InputError
from deltamerge.formats.quantised.detect import without_keys
from deltamerge.plan.inputs import Input
from deltamerge.plan.layer_config import which_layers
from deltamerge.plan.planner import Plan
from deltamerge.plan.stack import Stack

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The tensors of a model as transformers builds it, by name, and the first component of names that a file may
    lack."""

    shapes: Shapes
    prefix: str

    def container(self, stored: str, count: int) -> str | None:
        """Return the container of `count` numbered layers that a file calls `stored`; None: none, or several."""
        numbers: dict[str, set[int]] = {}
        for name in self.shapes:
            parts = name.split(".")
            for i, part in enumerate(parts):
                if part.isdigit():
                    numbers.setdefault(".".join(parts[:i]), set()).add(int(part))
        whole = [c for c, found in numbers.items() if found == set(range(count))]
        if stored in whole:
            return stored
        inside = [c for c in whole if c.endswith(f".{stored}") or stored.endswith(f".{c}")]
        inside = inside or [c for c in whole if c.split(".")[-1] == stored.split(".")[-1]] or whole
        return inside[0] if len(inside) == 1 else None

    def layer(self, container: str, number: int) -> Shapes:
        """Return the tensors of a layer, by their names inside it."""
        start = f"{container}.{number}."
        return {n.removeprefix(start): shape for n, shape in self.shapes.items() if n.startswith(start)}


def check_layers_built(planned: Plan) -> None:
    """Raise InputError: transformers would build other layers than are stacked, or cannot read the config."""
    template = planned.inputs.template
    home = _at_home(template) if planned.stacks else None
    if home is None:
        return
    made = _built(planned.config)
    assert made is not None
    models: dict[int, ModelShapes | None] = {id(template): home}
    containers = []
    for stack in planned.stacks:
        container = home.container(stack.prefix, stack.old)
        if container is not None:
            containers.append(container)
            for fault in _faults(stack, container, made, template, models):
                raise InputError(fault, hint=which_layers(planned.config))
    if len(containers) == len(planned.stacks):
        _check_outside(planned, home, made, containers)


def _faults(
    stack: Stack, container: str, made: ModelShapes, template: Input, models: dict[int, ModelShapes | None]
) -> Iterator[str]:
    """Yield the faults of a stack's layers, in words."""
    for number, layer in enumerate(stack.layers):
        owner = stack.owner(layer, template)
        own = models.setdefault(id(owner), None) or _at_home(owner)
        models[id(owner)] = own
        at_home = own.layer(container, layer.source(owner)) if own is not None else {}
        differ = sorted(at_home.items() ^ made.layer(container, number).items()) if at_home else ()
        if differ:
            place = f"layer {layer.source(owner)} of {owner.name} would be layer {number} of {stack.prefix}"
            yield f"{place}, which transformers builds otherwise from config.json ({differ[0][0]} differs)"
    if made.layer(container, len(stack.layers)):
        yield f"{stack.prefix} has {len(stack.layers)} layers, and transformers builds more of them from config.json"


def _check_outside(planned: Plan, home: ModelShapes, made: ModelShapes, containers: list[str]) -> None:
    """Raise InputError: a tensor outside the stacked layers is built otherwise than it is stored."""
    template, shapes = planned.inputs.template, {output.name: output.shape for output in planned.outputs}
    within = tuple(f"{container}." for container in containers)
    old, new = ({n: s for n, s in b.shapes.items() if not n.startswith(within)} for b in (home, made))
    changed = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    for name in changed:
        bare, start = name.removeprefix(f"{home.prefix}."), f"{home.prefix}." if home.prefix else ""
        stored = next((shapes[n] for n in (name, bare, start + bare) if n in shapes), None)
        if name not in new or stored != new[name]:
            message = f"{template.name}: {name} would have to follow the number of layers"
            raise InputError(message, hint="merge whole models with `models`")


def _at_home(model: Input) -> ModelShapes | None:
    """Return a model as it is; None: transformers has no class for it, or cannot build it from its config alone."""
    try:
        return _built(model.checkpoint.config)
    except InputError:
        return None


def _built(config: Mapping[str, Any]) -> ModelShapes | None:
    """Return the model that transformers builds from a config; None: it has no class. InputError: it cannot."""
    kind = config.get("model_type")
    if not config.get("architectures") or not isinstance(kind, str):
        return None
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from deltamerge.calibrate.model.skeleton import skeleton
    from deltamerge.calibrate.model.transformers_code import running

    if kind not in CONFIG_MAPPING:
        return None
    with running("transformers does not read the config.json of the stack"):
        model = skeleton(CONFIG_MAPPING[kind].from_dict(without_keys(config)), None)
    return ModelShapes({n: tuple(t.shape) for n, t in model.state_dict().items()}, model.base_model_prefix)
