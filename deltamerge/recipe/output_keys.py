"""The keys about a run's output: `output`, its quantization, its tokenizer and the built-in chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from deltamerge.recipe.values import Items, Keys, Natural, Pattern, Positive, Reference, Share, Size, Text


@dataclass(frozen=True, slots=True)
class OutputRules:
    """The keys that a kind of output allows in a recipe, and the planning of its tensors.

    form         the file of `outputs` that makes it
    standalone   it loads without its base, so a new vocabulary, quantised weights and parts are allowed
    reusable     other documents may use it as a model
    patches      it stores changes of `base_model`
    adapts       PEFT loads it over `base_model`
    accumulates  it stores the sum of an average in float32, and a later run adds to it
    """

    form: str
    standalone: bool = False
    reusable: bool = False
    patches: bool = False
    adapts: bool = False
    accumulates: bool = False


UNION = "union"  # source of a tokenizer: the tokens of all models
KINDS: Mapping[str, OutputRules] = MappingProxyType(
    {
        "model": OutputRules("checkpoint", standalone=True, reusable=True),
        "delta": OutputRules("delta", patches=True),
        "peft": OutputRules("shira", adapts=True),
        "sum": OutputRules("running_sum", reusable=True, accumulates=True),
    }
)


def _block(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(value) != 2 or not all(1 <= size <= 1 << 20 for size in value):
        raise PydanticCustomError("block", "must be [rows, columns] of at least 1")
    return value


class Quantization(Keys):
    """The form in which weights of linear layers are written."""

    scheme: Literal["fp8", "int8", "int4", "nvfp4", "mxfp4"] = Field(
        description="The number format of the stored weights."
    )
    block: Annotated[Items[int], AfterValidator(_block)] | None = Field(
        None, description="fp8: [rows, columns] that share a scale, as DeepSeek-V3 stores them. Default: [128, 128]."
    )
    strategy: Literal["block", "channel", "group"] | None = Field(
        None,
        description="The unit with one scale: a block (fp8), an output channel (fp8, int8), or a group of columns of "
        "a channel (int4, nvfp4, mxfp4). Default: block for fp8.",
    )
    group: Positive | None = Field(
        None, le=1 << 20, description="int4: columns of a group. Default: of 128, 64 and 32 the largest that fits all."
    )

    @property
    def by(self) -> str:
        """The unit that shares a scale."""
        return self.strategy or {"fp8": "block", "int8": "channel"}.get(self.scheme, "group")


def _shape(value: Any) -> str:
    return "(scheme)" if isinstance(value, dict | Quantization) else "(name)"


Named = Literal["none", "keep", "fp8", "int8", "int4", "nvfp4", "mxfp4"]
Quantized = Annotated[
    Annotated[Named, Tag("(name)")] | Annotated[Quantization, Tag("(scheme)")],
    Discriminator(_shape),
]


def _path(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("path", "must not hold the character NUL")
    return value


class Output(Keys):
    """The folder that a run leaves."""

    kind: Literal["model", "delta", "peft", "sum"] = Field(
        "model", description="A checkpoint, a delta artifact, a PEFT adapter, or the running sum of an average."
    )
    path: Annotated[Text, AfterValidator(_path)] | None = Field(
        None, description="Folder, relative to the recipe. Default: <recipe name>-merged."
    )
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
    whole: Literal["keep", "heads", "task_heads", "drop", "refuse"] | None = Field(
        None,
        description="peft with a rank: which changed tensors without factors are stored whole. keep: all "
        "(embeddings, heads, norms, biases). heads: heads, and tensors that the base lacks. task_heads: the same "
        "without a language model's head. drop: nothing. refuse: such a tensor is an error. Default: keep.",
    )
    targets: Items[Pattern] | None = Field(
        None, description="peft with a rank: weights that get factors. Default: of all linear layers but heads."
    )
    dora: bool = Field(False, description="peft with a rank: with the lengths of the weights' rows (DoRA).")
    quantization: Quantized = Field(
        "none",
        description="model: weights are written plain (none), in the form that the template or the base has (keep), or "
        "in the form of a scheme.",
    )
    rounding: Literal["nearest", "inputs"] | None = Field(
        None,
        description="With a quantization: the nearest codes, or the codes that change the outputs of layers least on "
        "the calibration rows. Both measure the surviving part of the merged delta, and with rows the outputs' loss.",
    )
    gguf: Literal["q8_0", "f16", "bf16"] | None = Field(
        None, description="model: a GGUF file for llama.cpp beside the checkpoint, with matrices of this type."
    )

    @property
    def scheme(self) -> Quantization | Literal["none", "keep"]:
        """How weights are written: plain, as stored, or in a scheme with all its defaults."""
        wanted = self.quantization
        if isinstance(wanted, Quantization) or wanted == "none" or wanted == "keep":
            return wanted
        return Quantization.model_validate({"scheme": wanted})

    @property
    def rules(self) -> OutputRules:
        """Return the keys that this kind of output allows in a recipe."""
        return KINDS[self.kind]

    @property
    def form(self) -> str:
        """The file of `outputs` that makes this output, by its kind and keys."""
        return "lora" if self.lora else "gguf" if self.gguf is not None else self.rules.form

    @property
    def lora(self) -> bool:
        """Whether to make a LoRA, with factors of the deltas."""
        return self.rules.adapts and not (self.rank is self.energy is self.budget is None)

    @property
    def adds(self) -> bool:
        """Whether to make a delta artifact of values to add."""
        return self.rules.patches and (self.semantics == "add" or self.values is not None)


def _token_shape(value: Any) -> str:
    if isinstance(value, dict):
        return "(zero)" if value.get("kind") == "zero" else "(model_token)"
    return "(zero)" if isinstance(value, ZeroToken) else "(model_token)" if isinstance(value, ModelToken) else "(text)"


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
    force: bool = Field(False, description="Also if the models have the token: take the source's row, not a merge.")


class Tokenizer(Keys):
    """The output's tokenizer, in full."""

    source: Text = Field(UNION, description="Whose tokens the output has: base, union, or a model.")
    tokens: dict[str, Token] = Field({}, description="Where single tokens' rows come from; new tokens are appended.")
    transplant: Reference | None = Field(
        None,
        description="Instead of a source: the model whose tokenizer the output gets, matched by tokens' text.",
    )
    method: Literal["omp", "common", "mean"] = Field(
        "omp",
        description="transplant: the row of a token that the models lack. omp, common: a sum of rows of tokens that "
        "both have, found by orthogonal matching pursuit among the rows of that model, or by its nearest. mean: the "
        "mean row.",
    )
    k: Positive = Field(64, le=4096, description="transplant: rows of a sum.")
    pad_to_multiple_of: Positive | None = Field(
        None, description="Rows of the mean row are added until the number of rows is a multiple of this."
    )


# In Jinja, written by us after the formats that the models' makers document.
_TURNS = "{% for message in messages %}"
_END = "{% endfor %}"
_SYSTEM_FIRST = (
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
)

BUILT_IN = {
    "chatml": _TURNS
    + "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{{ bos_token }}"
    + _TURNS
    + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    + " + message['content'] | trim + '<|eot_id|>' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "mistral": _SYSTEM_FIRST
    + "{{ bos_token }}"
    + _TURNS
    + "{% if message['role'] == 'user' %}"
    + "{{ '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + message['content'] + ' [/INST]' }}"
    + "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}"
    + _END,
    "alpaca": _SYSTEM_FIRST
    + "{% if system %}{{ system + '\\n\\n' }}{% endif %}"
    + _TURNS
    + "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}"
    + "{% else %}{{ '### Response:\\n' + message['content'] | trim + eos_token + '\\n\\n' }}{% endif %}"
    + _END
    + "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
    "gemma": _SYSTEM_FIRST
    + "{{ bos_token }}"
    + _TURNS
    + "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n'"
    + " + (system + '\\n\\n' if loop.first and system else '') + message['content'] | trim + '<end_of_turn>\\n' }}"
    + _END
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
}


def is_literal(text: str) -> bool:
    """Return whether a recipe's `chat_template` is Jinja text and not a name."""
    return "{" in text
