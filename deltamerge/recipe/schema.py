"""The recipe: strict, frozen models of every key, read from YAML with all problems at once, and their JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, PrivateAttr, Tag, create_model, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

from deltamerge.errors import Problem
from deltamerge.methods.registry import MERGE, MOE, NO_EFFECT, NO_EFFECT_KEYS, PRUNE, MergeMethod, Param
from deltamerge.recipe import open_values
from deltamerge.recipe.output_keys import Output, Tokenizer
from deltamerge.recipe.series import Schedule, Series
from deltamerge.recipe.values import (
    Bounds,
    Columns,
    Dtype,
    Items,
    Keys,
    LayerRange,
    Natural,
    Pattern,
    Positive,
    Reference,
    Size,
    Text,
    Value,
    leaves,
    show,
)  # fmt: skip
from deltamerge.recipe.yaml_source import Loc, YamlSource

Parameters = TypeAliasType("Parameters", dict[str, Value])
Objective: TypeAlias = Literal["output_change", "validation", "layer_mse"]
MERGED = "merged"  # the merged model, beside the names of models
_FRACTION: dict[str, Any] = {"exclusiveMinimum": 0, "maximum": 1}
GateMode = Literal["hidden", "hidden_avg", "hidden_last", "mlp_input", "cheap_embed", "random", "uniform_random"]
_WITHOUT_EFFECT = NO_EFFECT_KEYS | NO_EFFECT.keys()
DRAWN = frozenset({"random", "uniform_random"})  # gate modes without prompts


def _q_shape(value: Any) -> str:
    if isinstance(value, CalibratedQ) or (isinstance(value, dict) and "value" not in value):
        return "(search)"
    return "(objective)" if isinstance(value, str) else "(value)"


class CalibratedQ(Keys):
    """A q that is searched on calibration data, for the weights of linear layers that the rows reach.

    1-D tensors and embeddings have q = 1. All other tensors have the same q as without calibration.
    """

    objective: Objective = Field(description="The measure that the search optimises.")
    scope: Literal["global", "layer", "row"] = Field("global", description="One q for all, per layer, or per row.")
    search: Literal["auto", "grid", "gradient"] = Field("auto", description="How q is searched.")
    bounds: Bounds | None = Field(None, description="[low, high] of q.")

    @property
    def scope_or_default(self) -> str:
        """The scope. By default layer_mse, which is solved layer by layer, has scope layer."""
        return "layer" if self.objective == "layer_mse" and "scope" not in self.model_fields_set else self.scope

    @property
    def limits(self) -> tuple[float, float] | None:
        return None if self.bounds is None else (self.bounds[0], self.bounds[1])


class Protect(Keys):
    """Input columns of linear weights whose delta stays whole and unscaled; a density counts the others."""

    massive_activations: Positive | None = Field(
        None, description="The k input features of largest mean |activation| in each layer."
    )
    columns: dict[Pattern, Items[Natural]] | None = Field(
        None, description="Pattern on tensor names -> numbers of columns (the last dimension)."
    )


class Prune(Keys):
    """Which entries of a delta stay, and their divisor."""

    method: Text | None = Field(
        None, description="The choice of entries. Default: none, or the method that merge_method implies.",
        json_schema_extra=lambda key: key.update(enum=[*PRUNE, None]),
    )  # fmt: skip
    density: Value | None = Field(None, description="Fraction kept, in (0, 1].", json_schema_extra=_FRACTION)
    sampling: Literal["uniform", "magnitude"] | None = Field(
        None, description="dare only: keep with equal probability, or in proportion to abs(delta)."
    )
    q: (
        Annotated[
            Annotated[Value, Tag("(value)")]
            | Annotated[Objective, Tag("(objective)")]
            | Annotated[CalibratedQ, Tag("(search)")],
            Discriminator(_q_shape),
        ]
        | None
    ) = Field(
        None,
        description="Kept entries are divided by q: a number in (0, 1], or calibrated. "
        "Default: density for random methods, 1 for importance methods.",
        json_schema_extra=_FRACTION,
    )
    rescale: Literal["l1", "l2", "linf"] | None = Field(
        None, description="Instead of q: mergekit's matching of this norm, per tensor."
    )
    include: Items[Pattern] | None = Field(
        None, description="Prune only tensors whose name one of these finds (re.search). Default: all."
    )
    exclude: Items[Pattern] | None = Field(
        None,
        description="Do not prune tensors whose name one of these finds. "
        "Default: the task head; with budget a classifier's alone.",
    )
    protect: Protect | None = Field(None, description="Columns that stay whole and unscaled.")
    group: Literal["tensor", "row", "model"] | None = Field(
        None, description="Importance methods: entries compete within a tensor, a row, or all tensors."
    )
    a: Value | None = Field(None, description="structured: fraction of input columns.", json_schema_extra=_FRACTION)
    b: Value | None = Field(
        None, description="structured: fraction kept inside the drawn columns.", json_schema_extra=_FRACTION
    )
    epsilon: Value | None = Field(None, description="della: half the spread of the keep probabilities.")
    gamma: Value | None = Field(None, description="breadcrumbs: fraction of the largest entries dropped.")
    budget: Size | None = Field(None, description="Size of the delta artifact, instead of a density.")
    bytes: Size | None = Field(None, description="budget: size of the delta artifact.")
    length: float | None = Field(
        None,
        ge=0,
        le=1,
        description="budget: how much of its delta's length a tensor gets back. Default: the part that rounding takes.",
    )
    ratio: float | None = Field(None, gt=1, le=1e9, description="budget: how many times smaller than the checkpoint.")

    @property
    def calibrated_q(self) -> CalibratedQ | None:
        """How q is searched. None: it is a number or a default."""
        if isinstance(self.q, str):
            return CalibratedQ.model_validate({"objective": self.q})
        return self.q if isinstance(self.q, CalibratedQ) else None

    @property
    def number_q(self) -> Value | None:
        """q, if given as a number."""
        return None if isinstance(self.q, str | CalibratedQ) else self.q


# Adds the keys of other packages' methods. The class keeps its name, which the schema shows.
_OTHERS: dict[str, Any] = {
    name: (Value | None, Field(None, description=f"{method.name}: {param.summary}."))
    for method in PRUNE.others().values()
    for name, param in method.parameters.items()
    if name not in Prune.model_fields
}
if _OTHERS and not TYPE_CHECKING:
    Prune = create_model("Prune", __base__=Prune, __doc__=Prune.__doc__, __module__=__name__, **_OTHERS)


class Model(Keys):
    """One input of the merge."""

    model: Reference = Field(
        description="A path, a hub id, id@revision; + a LoRA adapter after any of them. A path with * ? [] is "
        "a series: all folders that match, by their numbers."
    )
    name: Text | None = Field(None, description="Its name in masks and reports. Default: `model` as written.")
    parameters: Parameters = Field({}, description="Parameters of the merge method for this model.")
    prune: Prune | None = Field(None, description="Pruning of this model's delta; these keys win.")
    calibration: Calibration | None = Field(
        None,
        description="This model's own rows; its keys win over the recipe's. The base, if it is listed: "
        "texts whose answers fitted coefficients keep.",
    )
    window: Positive | None = Field(None, description="Of a series (run/step-*): take only its last models.")
    schedule: Schedule | None = Field(None, description="Of a series: the weights of an average. Default: constant.")
    decay: float | None = Field(None, gt=0, lt=1, description="ema: factor of the average so far.")


def short_form(schema: dict[str, Any]) -> None:
    """Allow in the schema of `models` a single model without a list, and a model given by its reference alone."""
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
    """The rows on which q is searched and activations are measured."""

    data: Text = Field(
        "",
        description=".jsonl, .csv, .txt, .parquet or a folder of pictures relative to the recipe, or a hub data "
        "set, org/name or org/name@revision. A model's own data wins.",
    )
    config: Text | None = Field(None, description="Of a hub data set: its configuration.")
    split: Text | None = Field(
        None, description="Of a hub data set: the split to read, from its start. Default: train."
    )
    text: Columns = Field(
        "text", description="Field of the text; two for pairs. Or rows have `prompt` and `completion`, or `messages`."
    )
    label: Text = Field("label", description="Field of the label, for the validation objective.")
    task: Literal["text-classification", "text-generation", "image-classification", "causal-lm"] | None = Field(
        None, description="The task of the model."
    )
    metric: (
        Literal[
            "accuracy", "matthews_correlation", "f1", "accuracy_f1", "pearson_spearman", "exact_match", "loss"
        ]
        | None
    ) = Field(None, description="The measure that the validation objective optimises.")  # fmt: skip
    answer: Pattern | None = Field(
        None, description="exact_match: pattern of the answer in a text (its first group). Default: the whole text."
    )
    new_tokens: Positive = Field(64, le=100_000, description="exact_match: most tokens generated for an answer.")
    sequences: Positive = Field(50, le=100_000, description="Number of sequences to use.")
    length: Positive = Field(128, le=1_000_000, description="Tokens a sequence.")
    seeds: Positive = Field(4, le=64, description="Mask seeds averaged by output_change.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Dtype of products in forward passes. auto: bfloat16 for large models where it is fast.",
    )
    per: Literal["model", "merge"] = Field("model", description="Calibrate each fine-tune, or the merged model.")
    coefficients: Literal["model", "layer", "row"] | None = Field(
        None,
        description="per: merge: instead of one lambda a factor of every model's delta, for all its tensors, for each, "
        "or for each output row, fitted to the fine-tunes' outputs on their own rows, which need no labels.",
    )
    weight: float | None = Field(
        None, gt=0, le=1000, description="Of the base, where it is listed with rows: how much they count beside a "
        "model's where coefficients are fitted. Default: 0.05.",
    )  # fmt: skip


class Expert(Keys):
    """A dense model whose MLPs are one expert of every layer."""

    model: Reference | None = Field(None, description="A path, a hub id, id@revision; + a LoRA adapter.")
    source_model: Reference | None = Field(None, description="mergekit's name of `model`.")
    name: Text | None = Field(None, description="Its name in reports. Default: `model` as written.")
    positive_prompts: Items[Text] = Field((), description="Texts that shall go to this expert.")
    negative_prompts: Items[Text] = Field((), description="Texts that shall not go to it.")
    noise_scale: float | None = Field(
        None, ge=0, le=1e6, description="Standard deviation of normal noise on its weights, from the seed."
    )
    residual_scale: float | None = Field(None, ge=-1e6, le=1e6, description="Factor of its down projections.")

    @model_validator(mode="after")
    def _one(self) -> Expert:
        if (self.model is None) == (self.source_model is None):
            raise PydanticCustomError("expert", "needs either model or source_model")
        return self

    @property
    def reference(self) -> str:
        """The model, as written."""
        return self.model or self.source_model or ""

    @property
    def prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The positive and the negative prompts."""
        return self.positive_prompts, self.negative_prompts


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the output that one set of models makes: a slice's layers, a module, or everything.

    loc       its place in the recipe, () for the recipe itself
    module    its module; None without `modules`
    members   its models, as indices of `recipe.models`
    places    the members' places in the recipe
    ranges    for each member the layers [first, end) that it contributes; None: all tensors under their own names
    base      the base of its deltas, as written
    levels    parameters of the slice, the module and the recipe, the most specific first (mergekit's precedence)
    """

    loc: Loc
    module: str | None
    members: tuple[int, ...]
    places: tuple[Loc, ...]
    ranges: tuple[tuple[int, int], ...] | None
    base: str | None
    levels: tuple[Mapping[str, Value], ...]

    @property
    def is_slice(self) -> bool:
        """Whether this is an item of `slices`."""
        return self.loc[-2:-1] == ("slices",)

    @property
    def layers(self) -> int:
        """The number of output layers that a slice makes."""
        assert self.ranges is not None
        return self.ranges[0][1] - self.ranges[0][0]


class Recipe(Keys):
    """The models to merge, the pruning of their deltas, and the output."""

    name: Text | None = Field(None, description="A name for this recipe.")
    base_model: Reference | None = Field(None, description="The model that the others were fine-tuned from.")
    merge_method: Text | None = Field(
        None, description="The merge method. Default with one fine-tune: task_arithmetic.",
        json_schema_extra=lambda key: key.update(enum=[*MERGE, MOE.name, None]),
    )  # fmt: skip
    models: Items[Model] = Field((), description="The models to merge.")
    slices: Items[Slice] = Field((), description="Instead of models: layers to stack.")
    modules: dict[str, Module] = Field({}, description="Instead of models: one entry per module of the model.")
    experts: Items[Expert] = Field((), description="Instead of models: dense models that become experts of a mixture.")
    shared_experts: Items[Expert] = Field((), description="moe: experts that process every token.")
    gate_mode: GateMode = Field("hidden", description="moe: how the routers are made.")
    experts_per_token: Positive = Field(2, le=10_000, description="moe: number of experts that process a token.")
    architecture: Text | None = Field(
        None,
        description="moe: mixtral, qwen, qwen3, deepseek, deepseek_v3. Default: the first of the others that fits.",
    )
    parameters: Parameters = Field({}, description="Parameters of the merge method, for every model.")
    prune: Prune | None = Field(None, description="Pruning of every model's delta; a model's own keys win.")
    balance: Literal["norm"] | None = Field(
        None, description="norm: scale the deltas of each tensor to their mean length, before weights and method."
    )
    calibration: Calibration | None = Field(None, description="Data for calibrated q, wanda and protect.")
    dtype: Dtype | None = Field(None, description="Dtype of the output; arithmetic is float32.")
    out_dtype: Dtype | None = Field(None, description="Dtype of the output; wins over dtype.")
    template: Text | None = Field(None, description="The model whose tensor names and files the output gets.")
    config: dict[str, Any] = Field(
        {},
        description="Keys to write into the output's config.json. Each is a value, or the name of a model whose value "
        "is taken.",
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
    seed: Natural = Field(0, description="Seed of the random masks.")
    mergekit: bool = Field(
        False, description="Read it as mergekit does: its defaults where ours differ; unknown parameters are ignored."
    )
    output: Output = Field(Output.model_validate({}), description="The kind of output and its form.")
    study: Study | None = Field(None, description="How `sweep` and `search` judge candidates; a run passes over it.")

    _source: YamlSource = PrivateAttr()
    _parts: tuple[Section, ...] = PrivateAttr(())
    _series: tuple[Series, ...] = PrivateAttr(())

    @model_validator(mode="before")
    @classmethod
    def _drop_flags(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        dropped = {*_WITHOUT_EFFECT, *_stray(data)}
        return {key: value for key, value in data.items() if key not in dropped}

    @property
    def source(self) -> YamlSource:
        return self._source

    @property
    def stray_parameters(self) -> tuple[str, ...]:
        """Parameters of merge methods at the top level of the recipe, where they have no effect."""
        return _stray(self._source.data)

    @property
    def parts(self) -> tuple[Section, ...]:
        """The parts of the output. `models` holds the models of all parts, in this order."""
        return self._parts

    @property
    def series(self) -> tuple[Series, ...]:
        """The series that patterns and ranges among the models stand for."""
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
        """Return whether a model is the base of its own part (mergekit lets it be listed)."""
        return not self.is_moe and self.models[index].model == self.part_of[index].base

    @cached_property
    def kept(self) -> int | None:
        """The index of the base, where it is listed with rows: fitted coefficients keep what it answers there."""
        listed = (i for i, one in enumerate(self.models) if one.calibration is not None and self.is_base(i))
        return next(listed, None)

    @property
    def is_moe(self) -> bool:
        """Whether dense models become the experts of a mixture."""
        return bool(self.experts) or self.merge_method == MOE.name

    @cached_property
    def method_name(self) -> str | None:
        """The merge method, or its default. None: there is no default."""
        if self.is_moe:
            return self.merge_method or MOE.name
        return self.merge_method or ("task_arithmetic" if len(self.fine_tunes) == 1 else None)

    @cached_property
    def method(self) -> MergeMethod:
        """The registered merge method of a recipe that `load` has accepted."""
        return MOE if self.is_moe else MERGE[self.method_name or ""]

    def calibration_of(self, index: int) -> Calibration | None:
        """Return the calibration rows of a model: its own keys before the recipe's."""
        own, whole = self.models[index].calibration, self.calibration
        if own is None or whole is None:
            return own or whole
        return whole.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})

    @property
    def tokenizer_of(self) -> str | None:
        """The source of the output's tokenizer: base, union or a model. None: the recipe leaves it to the template."""
        return self.tokenizer_source if self.tokenizer is None else self.tokenizer.source

    @property
    def transplant(self) -> str | None:
        """The model whose tokenizer the output gets, whatever tokens the models have."""
        return None if self.tokenizer is None else self.tokenizer.transplant

    def place(self, loc: Loc) -> Loc:
        """Return the place of `loc` in the text, where models of slices and modules are not at models[i]."""
        if loc[:1] != ("models",) or len(loc) == 1 or not self._parts:
            return loc
        places = [place for part in self._parts for place in part.places]
        return (*places[int(loc[1])], *loc[2:])

    def problem(self, loc: Loc, message: str, hint: str | None = None, *, key: bool = False) -> Problem:
        """Return a problem, found after loading, at the recipe's value (or its `key`) at `loc`."""
        return self._source.problem(self.place(loc), message, hint, key=key)

    def out_of_range(self, loc: Loc, param: Param, value: Value) -> Iterator[Problem]:
        """Yield a fault for each number of a parameter that is outside its range."""
        if param.scalar and not isinstance(value, bool | int | float):
            yield self.problem(loc, f"must be {param.wanted()}, the same for every tensor, got {show(value)}")
            return
        for inner, scalar in leaves(value):
            in_gradient = bool(inner) and inner[-1] != "value"
            # mergekit reads 0 and 1 as booleans; in a gradient they would be ambiguous
            if not param.accepts(scalar) or (param.kind == "bool" and in_gradient and not isinstance(scalar, bool)):
                share = param.high == 1 and isinstance(scalar, int | float) and 5 <= scalar <= 100
                hint = f"{scalar:g} % is {scalar / 100:g}" if share else None
                yield self.problem((*loc, *inner), f"must be {param.wanted()}, got {show(scalar)}", hint)


@cache
def merge_params() -> Mapping[str, tuple[Param, tuple[str, ...]]]:
    """Return the parameters of all merge methods, each with its methods. Imports all methods."""
    known: dict[str, tuple[Param, tuple[str, ...]]] = {}
    for method in MERGE.values():
        for name, param in method.parameters.items():
            first, methods = known.get(name, (param, ()))
            known[name] = first, (*methods, method.name)
    return known


def _stray(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys at the top level of a recipe that are parameters of merge methods."""
    unknown = [key for key in data if key not in Recipe.model_fields and key not in _WITHOUT_EFFECT]
    return tuple(key for key in unknown if key in merge_params())


def model_name(model: Model) -> str:
    """Return a model's name in masks and reports: its `name`, or the reference as written."""
    return model.name or model.model


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors. It is draft 7, which all editors know."""
    generated = Recipe.model_json_schema()
    value = {"$ref": "#/$defs/Value"}
    generated["$defs"]["Parameters"] = {
        "title": "Parameters",
        "type": "object",
        "properties": {
            **{name: {"allOf": [value], "description": f"{param.summary} ({', '.join(methods)})"}
               for name, (param, methods) in merge_params().items()},
            **{name: {"allOf": [value], "description": param.summary} for name, param in NO_EFFECT.items()},
        },
        "additionalProperties": False,
    }  # fmt: skip
    open_values.allow(generated)
    for holder in (generated, generated["$defs"]["Module"]):
        short_form(holder["properties"]["models"])
    generated["properties"]["tokenizer"]["anyOf"].insert(0, {"type": "string", "minLength": 1})
    return {"$schema": "http://json-schema.org/draft-07/schema#", **generated, "title": "deltamerge recipe"}


Measure: TypeAlias = Literal[
    "agreement", "same_answers", "metric", "accuracy", "matthews_correlation", "f1", "accuracy_f1", "pearson_spearman",
    "exact_match", "loss",
]  # fmt: skip


class Command(Keys):
    """A program that is given a merged folder and prints JSON."""

    run: Text | Items[Text] = Field(
        description="The program and its arguments. {folder} stands for the merged model. No shell is used."
    )
    value: Text = Field("score", description="Place of the number in the last JSON it prints: results.gsm8k.acc.")
    direction: Literal["maximize", "minimize"] = Field("maximize", description="Whether more is better.")
    timeout: Positive = Field(3600, le=10**7, description="Seconds until it is stopped and the trial fails.")


class LmEval(Keys):
    """Tasks of lm-evaluation-harness, on a merged folder."""

    tasks: Items[Text] = Field(min_length=1, description="Names of tasks or groups. Their mean counts.")
    metric: Text = Field("acc", description="The figure of each task: acc, acc_norm, exact_match, word_perplexity.")
    direction: Literal["maximize", "minimize"] = Field("maximize", description="Whether more is better.")
    few_shot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Examples before a question. Default: the task's own."
    )
    limit: Positive | None = Field(None, description="Number of questions of each task, from the first. Default: all.")
    batch: Positive = Field(8, description="Questions in a batch.")
    folder: Text | None = Field(None, description="A folder of tasks of your own, beside the recipe.")


class Goal(Keys):
    """The objective that judges candidates."""

    measure: Measure | None = Field(
        None,
        description="agreement: distance of outputs from each fine-tune's own, without labels, as a share of the "
        "base's; same_answers: how often its answers are the fine-tune's; metric: calibration.metric of each "
        "fine-tune; or a metric.",
    )
    over: Literal["mean", "minimum"] = Field("mean", description="The mean of the fine-tunes' values, or the worst.")
    weights: dict[Text, Annotated[float, Field(ge=0)]] = Field({}, description="Weights of the mean, by model name.")
    of: Text | None = Field(None, description="Judge only this fine-tune, by its name.")
    command: Command | None = Field(None, description="Instead of a measure: a program that judges the merged folder.")

    lm_eval: LmEval | None = Field(
        None, description="Instead of a measure: tasks of lm-eval (extra lm-eval), a list of names or more keys."
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("lm_eval"), list | tuple):
            return {**data, "lm_eval": {"tasks": data["lm_eval"]}}
        return {"measure": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _one(self) -> Goal:
        for alone in ("command", "lm_eval"):
            if getattr(self, alone) is not None and self.model_fields_set != {alone}:
                raise PydanticCustomError("goal", f"{alone} stands alone")
        if self.of is not None and self.model_fields_set & {"over", "weights"}:
            raise PydanticCustomError("goal", "of names one model: leave over and weights out")
        if self.over == "minimum" and self.weights:
            raise PydanticCustomError("goal", "weights belong to the mean, not to the minimum")
        return self

    @property
    def of_folder(self) -> Command | LmEval | None:
        """The judge of a merged folder. None: candidates are judged in memory."""
        return self.command or self.lm_eval

    @property
    def by(self) -> str:
        """The measure."""
        return self.measure or "agreement"

    @property
    def name(self) -> str:
        """The objective's name in tables and in a study."""
        if self.command is not None:
            return self.command.value
        if self.lm_eval is not None:
            return f"{self.lm_eval.metric} of {', '.join(self.lm_eval.tasks)}"
        by = "distance" if self.by == "agreement" else self.by
        return f"{by} of {self.of}" if self.of else f"{self.over} {by}"


def _shape(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(list)"
    return "(objective)" if isinstance(value, str) else "(value)"


class Study(Keys):
    """Settings of a sweep or a search."""

    objective: Annotated[
        Annotated[Measure, Tag("(objective)")]
        | Annotated[Goal, Tag("(value)")]
        | Annotated[Annotated[Items[Goal], Field(min_length=1, max_length=4)], Tag("(list)")],
        Discriminator(_shape),
    ] = Field(
        "agreement", description="A measure, {measure, over, weights}, {command}, {lm_eval}, or a list: a Pareto front."
    )
    test: Text | dict[Text, Text] | None = Field(
        None,
        description="Rows that a sweep scores on and that decide a search: a file, or one by each model's name. "
        "Default: rows of the calibration data that are not searched on.",
    )
    sampler: Literal["gp", "tpe", "cmaes", "nsga2", "random"] | None = Field(
        None,
        description="Sampler of Optuna. Default: tpe; nsga2 for several objectives.",
    )
    pruner: Literal["none", "median", "halving"] = Field(
        "none", description="Which trials stop after a quarter of the rows."
    )
    trials: Positive = Field(64, le=100_000, description="Number of candidates to try.")
    together: Positive = Field(4, le=64, description="Candidates in one pass through the blocks.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Of the sampler.")

    @property
    def goals(self) -> tuple[Goal, ...]:
        """The objectives."""
        if isinstance(self.objective, tuple):
            return self.objective
        if isinstance(self.objective, Goal):
            return (self.objective,)
        return (Goal.model_validate({"measure": self.objective}),)
