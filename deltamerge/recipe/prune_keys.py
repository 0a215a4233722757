"""The keys of `prune`, the strict mapping that all keys of a recipe are, and keys of other packages' methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model, model_validator

from deltamerge.methods.registry import PRUNE
from deltamerge.recipe.types import Bounds, Natural, Pattern, Positive, Size, Text
from deltamerge.recipe.values import Items, Value

Objective: TypeAlias = Literal["output_change", "validation", "layer_mse"]
MERGED = "merged"  # what the fine-tunes make together, beside the names of models
_FRACTION: dict[str, Any] = {"exclusiveMinimum": 0, "maximum": 1}


def _q_shape(value: Any) -> str:
    if isinstance(value, CalibratedQ) or (isinstance(value, dict) and "value" not in value):
        return "(search)"
    return "(objective)" if isinstance(value, str) else "(value)"


class Keys(BaseModel):
    """A mapping of known keys; a key without a value counts as not given."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class CalibratedQ(Keys):
    """A q that is searched on calibration data, for the weights of linear layers that the rows reach.

    1-D tensors and embeddings have q = 1, all other tensors the q that they have without calibration.
    """

    objective: Objective = Field(description="What the search makes best.")
    scope: Literal["global", "layer", "row"] = Field("global", description="One q for all, per layer, or per row.")
    search: Literal["auto", "grid", "gradient"] = Field("auto", description="How q is searched.")
    bounds: Bounds | None = Field(None, description="[low, high] of q.")

    @property
    def scope_or_default(self) -> str:
        """The scope; layer_mse, which is solved layer by layer, has no global q unless asked for one."""
        return "layer" if self.objective == "layer_mse" and "scope" not in self.model_fields_set else self.scope

    @property
    def limits(self) -> tuple[float, float] | None:
        return None if self.bounds is None else (self.bounds[0], self.bounds[1])


class Protect(Keys):
    """Input columns of linear weights whose delta stays whole and unscaled; a density counts the others."""

    massive_activations: Positive | None = Field(
        None, description="Of each layer the k input features of largest mean |activation|."
    )
    columns: dict[Pattern, Items[Natural]] | None = Field(
        None, description="Pattern on tensor names -> numbers of columns (the last dimension)."
    )


class Prune(Keys):
    """Which entries of a delta stay, and what they are divided by."""

    method: Text | None = Field(
        None, description="How entries are chosen. Default: none, or what merge_method implies.",
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
        None, description="Leave tensors whose name one of these finds. Default: the task head."
    )
    protect: Protect | None = Field(None, description="Columns that stay whole and unscaled.")
    group: Literal["tensor", "row", "model"] | None = Field(
        None, description="Importance methods: entries compete within a tensor, a row, or all tensors."
    )
    a: Value | None = Field(None, description="structured: fraction of input columns.", json_schema_extra=_FRACTION)
    b: Value | None = Field(
        None, description="structured: fraction kept inside those columns.", json_schema_extra=_FRACTION
    )
    epsilon: Value | None = Field(None, description="della: half the spread of the keep probabilities.")
    gamma: Value | None = Field(None, description="breadcrumbs: fraction of the largest entries dropped.")
    budget: Size | None = Field(None, description="Size of the delta artifact, instead of a density.")

    @property
    def calibrated_q(self) -> CalibratedQ | None:
        """How q is searched, if it is."""
        if isinstance(self.q, str):
            return CalibratedQ.model_validate({"objective": self.q})
        return self.q if isinstance(self.q, CalibratedQ) else None

    @property
    def number_q(self) -> Value | None:
        """q if it is given as a number."""
        return None if isinstance(self.q, str | CalibratedQ) else self.q


# The keys of other packages' methods; the class keeps its name, which the schema shows.
_OTHERS: dict[str, Any] = {
    name: (Value | None, Field(None, description=f"{method.name}: {param.summary}."))
    for method in PRUNE.others().values()
    for name, param in method.parameters.items()
    if name not in Prune.model_fields
}
if _OTHERS and not TYPE_CHECKING:
    Prune = create_model("Prune", __base__=Prune, __doc__=Prune.__doc__, __module__=__name__, **_OTHERS)
