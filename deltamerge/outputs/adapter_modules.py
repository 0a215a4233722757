"""The modules of the model that an adapter is for: which an adapter can adapt, and how the rest is stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from deltamerge.errors import InputError
from deltamerge.formats.peft.parts import PREFIX
from deltamerge.tensors.tensor import TensorInfo

if TYPE_CHECKING:
    from deltamerge.calibrate.model.loading import ShapedTensor


class ChangedTensor(NamedTuple):
    """A tensor of the merged model that is not the base's: its name in the model, what was written, the base's."""

    name: str
    result: TensorInfo
    base: TensorInfo | None
    changed: int

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


class Modules:
    """What transformers makes of the output's config, without weights: which modules there are.

    stored    the name in the model of each tensor -> its name in the files
    linear    the modules that are torch.nn.Linear
    turned    those that are transformers' Conv1D, whose weight is (in, out)
    convolved convolutions that are not in groups
    heads     those of them that are outside the base model
    """

    def __init__(self, model: Any, architecture: str, stored: dict[str, str]) -> None:
        from torch import nn

        from deltamerge.calibrate.model.loading import aliases
        from deltamerge.calibrate.model.skeleton import is_transposed

        self.architecture, self.stored = architecture, stored
        self.names = [name for name, _ in model.named_modules()]
        self.linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.turned = {name for name, module in model.named_modules() if is_transposed(module)}
        convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        some = ((name, module) for name, module in model.named_modules() if isinstance(module, convolutions))
        self.convolved = {name for name, module in some if module.groups == 1}
        attention = {n for n, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
        self.linear -= {f"{name}.out_proj" for name in attention}  # read as a weight, so that no adapter would be seen
        inside = "" if model.base_model is model else f"{model.base_model_prefix}."
        adaptable = self.linear | self.turned | self.convolved
        self.heads = {name for name in adaptable if not name.startswith(inside)}
        self.leaves = {name for name, module in model.named_modules() if not list(module.children())}
        self.tied = set(aliases(model))

    @classmethod
    def of(cls, config: dict[str, Any], tensors: Mapping[str, ShapedTensor], *, parts: bool = False) -> Modules:
        """Those of a config that is stored as these tensors; with `parts` some may be parts of one of the model's.

        InputError: transformers knows no such model, or has other tensors.
        """
        from transformers import AutoConfig

        from deltamerge.calibrate.model.loading import Loading, checkpoint_names
        from deltamerge.calibrate.model.skeleton import skeleton

        try:
            made = AutoConfig.for_model(**config)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"transformers cannot read the output's config: {str(error).splitlines()[0]}") from None
        model = skeleton(made, None)
        names = Loading(model, tensors).checkpoint_name if parts else checkpoint_names(model, list(tensors))
        return cls(model, type(model).__name__, names)

    def share_out(
        self, rest: Iterable[ChangedTensor], targets: list[str], results: Mapping[str, TensorInfo]
    ) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
        """Tensors stored whole: of modules for `modules_to_save`, and those that are loaded into the base itself.

        `results` are all tensors by their names in the files. The latter are biases of adapted layers, tied weights,
        parameters beside submodules, and modules that PEFT, which matches the end of a name, could not tell apart.
        """
        saved: dict[str, TensorInfo] = {}
        loose: dict[str, TensorInfo] = {}
        for entry in rest:
            module = entry.module
            alone = [name for name in self.names if name.endswith(module)] == [module]
            hides = any(re.match(rf"(^|.*\.){module}($|\..*)", target) for target in targets)
            if module in targets:
                loose[f"{PREFIX}{module}.base_layer.{entry.name.rpartition('.')[2]}"] = entry.result
            elif entry.name in self.tied or module not in self.leaves or not alone or hides:
                loose[PREFIX + entry.name] = entry.result
            else:
                own = [name for name in self.stored if name.rpartition(".")[0] == module]
                saved |= {PREFIX + name: results[self.stored[name]] for name in own}
        return saved, loose
