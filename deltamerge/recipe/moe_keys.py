"""The keys of `experts` and `shared_experts`: dense models whose MLPs are the experts of a mixture."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from deltamerge.recipe.prune_keys import Keys
from deltamerge.recipe.types import Reference, Text
from deltamerge.recipe.values import Items

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "mlp_input", "cheap_embed", "random", "uniform_random"]
DRAWN = frozenset({"random", "uniform_random"})  # gate modes that read no prompts


class Expert(Keys):
    """A dense model whose MLPs are one expert of every layer."""

    model: Reference | None = Field(None, description="A path, a hub id, id@revision; + a LoRA adapter.")
    source_model: Reference | None = Field(None, description="mergekit's name of `model`.")
    name: Text | None = Field(None, description="Its name in reports. Default: `model` as written.")
    positive_prompts: Items[Text] = Field((), description="Texts that are to go to this expert.")
    negative_prompts: Items[Text] = Field((), description="Texts that are not.")
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
        """The positive and the negative ones."""
        return self.positive_prompts, self.negative_prompts
