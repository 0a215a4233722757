"""PEFT adapters as outputs: their common part, and an adapter whose own A and B are pruned.

The modules of the adapted model decide which weights can be adapted, and how the others are stored.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deltamerge.errors import InputError
from deltamerge.formats.components import Component
from deltamerge.formats.peft.adapter import CONFIG, PREFIX
from deltamerge.formats.safetensors import Layout, plan_layout
from deltamerge.outputs.assets import Files, as_json, edit_tokenizer, tokenizer_files
from deltamerge.outputs.checkpoint import CheckpointOutput
from deltamerge.outputs.output import RunOutput, Weights
from deltamerge.plan.inputs import Inputs, refuse_adapter
from deltamerge.plan.output_config import BESIDE
from deltamerge.plan.planner import Plan, Stored
from deltamerge.recipe.output_keys import Output
from deltamerge.tensors.tensor import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltamerge.calibrate.model.loading import ShapedTensor

ADAPTER = Component(stem="adapter_model")


class AdapterOutput(CheckpointOutput):
    """A folder that `PeftModel.from_pretrained` loads over the base."""

    hashes_as_read = False

    def refuse(self, inputs: Inputs) -> None:
        """Raise InputError: PEFT does not load adapters on such a model."""
        refuse_adapter(inputs.template.name, inputs.template.checkpoint)

    def files(self, plan: Plan) -> Files:
        """Return the tokenizer's files, and the keys in which the base's config would have to differ."""
        files: Files = dict(tokenizer_files(plan))
        edit_tokenizer(files, plan.vocabulary, plan.chat_template)
        if plan.settled.beside:
            files[BESIDE] = as_json(dict(plan.settled.beside), ascii=True)
        return files

    def nbytes(self, plan: Plan, written: Mapping[str, Any]) -> int:
        """Return the bytes of the weight files."""
        return RunOutput.nbytes(self, plan, written)

    def name(self, plan: Plan) -> str:
        """Return the output in a few words."""
        return "an adapter"

    def remarks(self, plan: Plan) -> tuple[str, ...]:
        """Return all notes: they describe the adapter."""
        return plan.notes

    def load_line(self, plan: Plan, folder: Path) -> str:
        """Return the line that puts it on its base."""
        return f'PeftModel.from_pretrained(base, "{folder}")'

    def front_matter(self, plan: Plan) -> dict[str, object]:
        """Return the base, and the library that loads the adapter."""
        base = plan.inputs.base
        if base is None:
            return super().front_matter(plan)
        models = [name for name in [base.checkpoint.hub_id] if name]
        return {"base_model": models, "base_model_relation": "adapter", "library_name": "peft"}


class PrunedAdapterOutput(AdapterOutput):
    """The adapter that is the recipe's only model, with its own weights pruned; its config stays."""

    def layout(self, tensors: Sequence[Stored], wanted: Output, inputs: Inputs, weights: Mapping[str, str]) -> Layout:
        """Return the single file of an adapter."""
        return plan_layout(tensors, None, (ADAPTER,))

    def notes(self, wanted: Output, *, weighed: bool) -> Iterator[str]:
        """Yield that nothing is factored."""
        yield "written as a LoRA adapter: the deltas are the adapter's own A and B"

    def finish(self, plan: Plan, folder: Path, weights: Weights, files: Files) -> tuple[Weights, tuple[str, ...]]:
        """Copy the adapter's config."""
        assert plan.pruned_adapter is not None
        shutil.copyfile(plan.pruned_adapter.path / CONFIG, folder / CONFIG)
        return weights, ()


OUTPUT = PrunedAdapterOutput()


class ChangedTensor(NamedTuple):
    """A tensor of the merged model that differs from the base: its name in the model, its tensor, the base's tensor."""

    name: str
    result: TensorInfo
    base: TensorInfo | None
    changed: int

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


class ModelModules:
    """The modules that transformers builds from the output's config, without weights.

    stored    the name in the model of each tensor -> its name in the files
    linear    the modules that are torch.nn.Linear
    turned    the modules that are transformers' Conv1D, whose weight is (in, out)
    convolved convolutions that are not in groups
    heads     modules of these that are outside the base model
    """

    def __init__(self, model: Any, architecture: str, stored: dict[str, str]) -> None:
        from torch import nn

        from deltamerge.calibrate.model.loading import aliases, is_transposed

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
    def of(cls, config: dict[str, Any], tensors: Mapping[str, ShapedTensor], *, parts: bool = False) -> ModelModules:
        """Return the modules of a config that is stored as these tensors.

        `parts`: some may be parts of a tensor of the model. InputError: transformers knows no such model, or has other
        tensors.
        """
        from transformers import AutoConfig

        from deltamerge.calibrate.model.loading import Loading, checkpoint_names, skeleton

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
        """Return tensors that are stored whole: for modules in `modules_to_save`, and for loading into the base.

        `results` are all tensors by their names in the files. Biases of adapted layers, tied weights, parameters beside
        submodules, and modules that PEFT could not tell apart by the end of a name are loaded into the base.
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
