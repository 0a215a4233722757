"""The recipe: strict, frozen models of every key, read from YAML with all problems at once, and their JSON schema."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

from deltamerge.errors import Problem
from deltamerge.methods.registry import MERGE, MOE, NO_EFFECT, NO_EFFECT_KEYS, MergeMethod, Param
from deltamerge.recipe import open_schema
from deltamerge.recipe.moe_keys import Expert as Expert
from deltamerge.recipe.moe_keys import GateMode
from deltamerge.recipe.output_keys import KINDS, OutputRules, Quantization, Quantized
from deltamerge.recipe.parts import Section, written
from deltamerge.recipe.prune_keys import CalibratedQ as CalibratedQ
from deltamerge.recipe.prune_keys import Keys
from deltamerge.recipe.prune_keys import Protect as Protect
from deltamerge.recipe.prune_keys import Prune as Prune
from deltamerge.recipe.series import Schedule, Series
from deltamerge.recipe.study_keys import Study
from deltamerge.recipe.types import Columns, Dtype, LayerRange, Natural, Pattern, Positive, Reference, Share, Size, Text
from deltamerge.recipe.types import parse_size as parse_size
from deltamerge.recipe.values import Items, Value
from deltamerge.recipe.yaml_source import Loc, YamlSource

Parameters = TypeAliasType("Parameters", dict[str, Value])


def _token_shape(value: Any) -> str:
    if isinstance(value, dict):
        return "(zero)" if value.get("kind") == "zero" else "(model_token)"
    return "(zero)" if isinstance(value, ZeroToken) else "(model_token)" if isinstance(value, ModelToken) else "(text)"


class Model(Keys):
    """One input of the merge."""

    model: Reference = Field(
        description="A path, a hub id, id@revision; + a LoRA adapter after any of them. A path with * ? [] is "
        "a series: all folders that match, by their numbers."
    )
    name: Text | None = Field(None, description="Its name in masks and reports. Default: `model` as written.")
    parameters: Parameters = Field({}, description="Parameters of the merge method for this model.")
    prune: Prune | None = Field(None, description="Pruning of this model's delta; these keys win.")
    calibration: Calibration | None = Field(None, description="This model's own rows; its keys win over the recipe's.")
    window: Positive | None = Field(None, description="Of a series (run/step-*): its last models alone.")
    schedule: Schedule | None = Field(None, description="Of a series: the weights of an average. Default: constant.")
    decay: float | None = Field(None, gt=0, lt=1, description="ema: the factor of the average so far.")


def short_form(schema: dict[str, Any]) -> None:
    """Add to the schema of `models` that one may stand without its list, and by its reference alone."""
    items = schema["items"]
    schema["items"] = {"anyOf": [items, {"type": "string", "minLength": 1}]}
    one = {key: schema.pop(key) for key in ("items", "type")}
    schema["anyOf"] = [one, items, {"type": "string", "minLength": 1}]


class SliceSource(Model):
    """Layers of one model."""

    layer_range: LayerRange = Field(description="[first, end) of its layers.")


class Slice(Keys):
    """Layers of the output, merged from the same number of layers of each source."""

    sources: Items[SliceSource] = Field(description="The layers that are merged.")
    base_model: Reference | None = Field(None, description="The base of this slice.")
    parameters: Parameters = Field({}, description="Parameters for this slice.")
    residual_weight: float | None = Field(None, description="mergekit's; no effect.")


class Module(Keys):
    """One module (a tower) of the output: `models` or `slices`."""

    models: Items[Model] = Field((), description="Whole models to merge.")
    slices: Items[Slice] = Field((), description="Layers to stack.")
    parameters: Parameters = Field({}, description="Parameters for this module.")


class Calibration(Keys):
    """The data on which q is searched and activations are measured."""

    data: Text = Field(
        "",
        description=".jsonl, .csv, .txt or a folder of pictures relative to the recipe, or a hub data set, org/name or "
        "org/name@revision. A model's own, where it has one.",
    )
    config: Text | None = Field(None, description="Of a hub data set: which of its configurations.")
    split: Text | None = Field(None, description="Of a hub data set: which part is read, from its start; train.")
    text: Columns = Field("text", description="Of the text; two of pairs. Or rows have `prompt` and `completion`.")
    label: Text = Field("label", description="Field of the label, for the validation objective.")
    task: Literal["text-classification", "text-generation", "image-classification", "causal-lm"] | None = Field(
        None, description="What the model does."
    )
    metric: (
        Literal[
            "accuracy", "matthews_correlation", "f1", "accuracy_f1", "pearson_spearman", "exact_match", "loss"
        ]
        | None
    ) = Field(None, description="What the validation objective makes best.")  # fmt: skip
    answer: Pattern | None = Field(
        None, description="exact_match: pattern of the answer in a text (its first group). Default: the whole text."
    )
    new_tokens: Positive = Field(64, le=100_000, description="exact_match: tokens generated for an answer, at most.")
    sequences: Positive = Field(50, le=100_000, description="How many sequences are used.")
    length: Positive = Field(128, le=1_000_000, description="Tokens a sequence.")
    seeds: Positive = Field(4, le=64, description="Mask seeds averaged by output_change.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of forward passes' matrix products; auto: bfloat16 for large models where it is fast."
    )
    per: Literal["model", "merge"] = Field("model", description="Calibrate each fine-tune, or the merged model.")
    coefficients: Literal["model", "layer", "row"] | None = Field(
        None,
        description="per: merge: instead of one lambda a factor of every model's delta, for all its tensors, for each, "
        "or for each output row, fitted to the fine-tunes' outputs on their own rows, which need no labels.",
    )


class ModelToken(Keys):
    """The embedding of a token of some model."""

    kind: Literal["model_token"]
    model: Text = Field(description="A model reference.")
    token: str | None = Field(None, description="The token, or")
    token_id: Natural | None = Field(None, description="its id.")

    @model_validator(mode="after")
    def _one(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise PydanticCustomError("token", "needs either token or token_id")
        return self


class ZeroToken(Keys):
    """A row of zeros."""

    kind: Literal["zero"]


class Token(Keys):
    """Where the embedding of one token comes from."""

    source: (
        Annotated[
            Annotated[Text, Tag("(text)")]
            | Annotated[ModelToken, Tag("(model_token)")]
            | Annotated[ZeroToken, Tag("(zero)")],
            Discriminator(_token_shape),
        ]
        | None
    ) = Field(None, description="A model reference, a token of a model, or zeros.")
    force: bool = Field(False, description="Also in models that have the token: the row is the source's, not a merge.")


class Tokenizer(Keys):
    """The output's tokenizer, in full."""

    source: Text = Field("union", description="Whose tokens the output has: base, union, or a model.")
    tokens: dict[str, Token] = Field({}, description="Where single tokens' rows come from; new tokens are appended.")
    transplant: Reference | None = Field(
        None, description="Instead of a source: the model whose tokenizer the output is put on, by what tokens say."
    )
    method: Literal["omp", "common", "mean"] = Field(
        "omp",
        description="transplant: what the row of a token is that the models lack: a sum of rows of tokens that both "
        "have, found by orthogonal matching pursuit among the rows of that model (omp) or by its nearest (common), "
        "or the mean row.",
    )
    k: Positive = Field(64, le=4096, description="transplant: rows of a sum.")
    pad_to_multiple_of: Positive | None = Field(
        None, description="Rows of the mean row are added until the number of rows is a multiple of this."
    )


class Output(Keys):
    """The folder that a run leaves."""

    kind: Literal["model", "delta", "peft", "sum"] = Field(
        "model", description="A checkpoint, a delta artifact, a PEFT adapter, or the running sum of an average."
    )
    path: Text | None = Field(None, description="Folder, relative to the recipe. Default: <recipe name>-merged.")
    shard_size: Size = Field(5 * 10**9, description="Largest file of weights.")
    semantics: Literal["replace", "add"] | None = Field(
        None, description="delta: final values (the default), or values to add to the base, which `values` implies."
    )
    values: Literal["float32", "bfloat16", "int8", "sign"] | None = Field(
        None,
        description="delta: how values to add are stored. Default: bfloat16. peft with a rank: how the factors are, "
        "float32 or bfloat16. Default: the output's dtype.",
    )
    steps: bool | None = Field(
        None,
        description="delta: whether final values of bfloat16 and float16 may be stored as steps from the base's, the "
        "fewest bytes, which only a reader that has the base can tell. Default: true.",
    )
    rank: Positive | None = Field(None, le=1 << 20, description="peft: a LoRA of this rank, or at most of it.")
    energy: Share | None = Field(
        None, description="peft: a LoRA of as many ranks as keep this share of each delta; 1: all of it."
    )
    budget: Size | None = Field(
        None, description="peft: a LoRA of this many bytes, each layer with the rank that pays."
    )
    whole: Literal["keep", "heads", "drop", "refuse"] | None = Field(
        None,
        description="peft with a rank: what changed and has no factors (embeddings, heads, norms, biases) is stored "
        "whole; heads and what the base lacks alone are; nothing is; or it is an error. Default: keep.",
    )
    targets: Items[Pattern] | None = Field(
        None, description="peft with a rank: weights that get factors. Default: of all linear layers but heads."
    )
    dora: bool = Field(False, description="peft with a rank: with the lengths of the weights' rows (DoRA).")
    quantization: Quantized = Field(
        "none",
        description="model: weights are written plain (none), in the form that the template or the base has (keep), or "
        "in that of a scheme.",
    )
    gguf: Literal["q8_0", "f16", "bf16"] | None = Field(
        None, description="model: a GGUF file for llama.cpp beside the checkpoint, with matrices of this type."
    )

    @property
    def scheme(self) -> Quantization | Literal["none", "keep"]:
        """How weights are written: plain, as they were, or in a scheme with all its defaults."""
        wanted = self.quantization
        if isinstance(wanted, Quantization) or wanted == "none" or wanted == "keep":
            return wanted
        return Quantization.model_validate({"scheme": wanted})

    @property
    def rules(self) -> OutputRules:
        """What a recipe may ask of this kind of output."""
        return KINDS[self.kind]

    @property
    def form(self) -> str:
        """The file of `outputs` that makes it: of its kind, or of what the keys ask for."""
        return "lora" if self.lora else "gguf" if self.gguf is not None else self.rules.form

    @property
    def lora(self) -> bool:
        """Whether a LoRA is asked for, whose factors are made from the deltas."""
        return self.rules.adapts and not (self.rank is self.energy is self.budget is None)

    @property
    def adds(self) -> bool:
        """Whether a delta artifact is asked for that holds values to add."""
        return self.rules.patches and (self.semantics == "add" or self.values is not None)


class Recipe(Keys):
    """What is merged, how deltas are pruned before, and what is written."""

    name: Text | None = Field(None, description="A name for this recipe.")
    base_model: Reference | None = Field(None, description="What the models were fine-tuned from.")
    merge_method: Text | None = Field(
        None, description="How the models meet. Default with one fine-tune: task_arithmetic.",
        json_schema_extra=lambda key: key.update(enum=[*MERGE, MOE.name, None]),
    )  # fmt: skip
    models: Items[Model] = Field((), description="The models to merge.")
    slices: Items[Slice] = Field((), description="Instead of models: layers to stack.")
    modules: dict[str, Module] = Field({}, description="Instead of models: one entry per module of the model.")
    experts: Items[Expert] = Field((), description="Instead of models: dense models to make a mixture of.")
    shared_experts: Items[Expert] = Field((), description="moe: experts that every token goes through.")
    gate_mode: GateMode = Field("hidden", description="moe: what the routers are made of.")
    experts_per_token: Positive = Field(2, le=10_000, description="moe: experts that a token goes through.")
    architecture: Text | None = Field(
        None,
        description="moe: mixtral, qwen, qwen3, deepseek, deepseek_v3. Default: the first of the others that fits.",
    )
    parameters: Parameters = Field({}, description="Parameters of the merge method, for every model.")
    prune: Prune | None = Field(None, description="Pruning of every model's delta; a model's own keys win.")
    calibration: Calibration | None = Field(None, description="Data for calibrated q, wanda and protect.")
    dtype: Dtype | None = Field(None, description="Of the output; arithmetic is float32.")
    out_dtype: Dtype | None = Field(None, description="Of the output; wins over dtype.")
    template: Text | None = Field(None, description="The model whose tensors and files the output has.")
    config: dict[str, Any] = Field(
        {},
        description="Keys of the output's config.json in which the models differ: a model's name, whose value is "
        "written, or a value.",
    )
    tokenizer_source: Reference | None = Field(
        None, description="Whose tokens the output has: base, union, or a model."
    )
    tokenizer: Tokenizer | None = Field(
        None, description="Instead of tokenizer_source, with token sources; a text is the source alone."
    )
    chat_template: Text | None = Field(None, description="auto, a model, a built-in name, or a Jinja template.")
    pickles: bool = Field(
        False,
        description="Read torch's own files (pytorch_model.bin) where a model has no safetensors; nothing is run.",
    )
    seed: Natural = Field(0, description="Of the random masks.")
    mergekit: bool = Field(
        False, description="Read it as mergekit does: its defaults where ours differ; unknown parameters are ignored."
    )
    output: Output = Field(Output.model_validate({}), description="What is written, and where.")
    study: Study | None = Field(None, description="How `sweep` and `search` judge candidates; a run passes over it.")

    _source: YamlSource = PrivateAttr()
    _parts: tuple[Section, ...] = PrivateAttr(())
    _series: tuple[Series, ...] = PrivateAttr(())

    @model_validator(mode="before")
    @classmethod
    def _drop_flags(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in NO_EFFECT_KEYS}

    @property
    def source(self) -> YamlSource:
        return self._source

    @property
    def parts(self) -> tuple[Section, ...]:
        """What the output is put together from; `models` has the models of all parts, in this order."""
        return self._parts

    @property
    def series(self) -> tuple[Series, ...]:
        """What patterns and ranges among the models stand for."""
        return self._series

    @cached_property
    def part_of(self) -> tuple[Section, ...]:
        """The part that each model belongs to."""
        return tuple(part for part in self._parts for _ in part.members)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The name of every model."""
        return tuple(map(model_name, self.models))

    @cached_property
    def fine_tunes(self) -> tuple[int, ...]:
        """Indices of the models that are not the base itself."""
        return tuple(i for i in range(len(self.models)) if not self.is_base(i))

    def is_base(self, index: int) -> bool:
        """Whether a model is the base of its own part (mergekit lets it be listed)."""
        return not self.is_moe and self.models[index].model == self.part_of[index].base

    @property
    def is_moe(self) -> bool:
        """Whether dense models become the experts of a mixture."""
        return bool(self.experts) or self.merge_method == MOE.name

    @cached_property
    def method_name(self) -> str | None:
        """The merge method, or its default where there is one."""
        if self.is_moe:
            return self.merge_method or MOE.name
        return self.merge_method or ("task_arithmetic" if len(self.fine_tunes) == 1 else None)

    @cached_property
    def method(self) -> MergeMethod:
        """The registered merge method of a recipe that `load` has accepted."""
        return MOE if self.is_moe else MERGE[self.method_name or ""]

    def calibration_of(self, index: int) -> Calibration | None:
        """The calibration rows of a model: its own keys before the recipe's."""
        own, whole = self.models[index].calibration, self.calibration
        if own is None or whole is None:
            return own or whole
        return whole.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})

    @property
    def tokenizer_of(self) -> str | None:
        """Whose tokenizer the output has: base, union, a model, or None where the recipe leaves it to the template."""
        return self.tokenizer_source if self.tokenizer is None else self.tokenizer.source

    @property
    def transplant(self) -> str | None:
        """The model whose tokenizer the output is put on, whatever tokens the models have."""
        return None if self.tokenizer is None else self.tokenizer.transplant

    def problem(self, loc: Loc, message: str, hint: str | None = None, *, key: bool = False) -> Problem:
        """A fault found later at the value (or the `key`) of the recipe that `loc` names."""
        return self._source.problem(written(self._parts, loc), message, hint, key=key)


def model_name(model: Model) -> str:
    """The name that masks and reports know a model by: its `name`, else the reference as written."""
    return model.name or model.model


def schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors: draft 7, which they all know."""
    generated = Recipe.model_json_schema()
    known: dict[str, tuple[Param, list[str]]] = {}
    for method in MERGE.values():
        for name, param in method.parameters.items():
            known.setdefault(name, (param, []))[1].append(method.name)
    value = {"$ref": "#/$defs/Value"}
    generated["$defs"]["Parameters"] = {
        "title": "Parameters",
        "type": "object",
        "properties": {
            **{name: {"allOf": [value], "description": f"{param.summary} ({', '.join(methods)})"}
               for name, (param, methods) in known.items()},
            **{name: {"allOf": [value], "description": param.summary} for name, param in NO_EFFECT.items()},
        },
        "additionalProperties": False,
    }  # fmt: skip
    open_schema.allow(generated)
    for holder in (generated, generated["$defs"]["Module"]):
        short_form(holder["properties"]["models"])
    generated["properties"]["tokenizer"]["anyOf"].insert(0, {"type": "string", "minLength": 1})
    return {"$schema": "http://json-schema.org/draft-07/schema#", **generated, "title": "deltamerge recipe"}
