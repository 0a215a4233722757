"""The keys of `study`: how the candidates of a sweep or a search are judged, and how a search proposes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from deltamerge.recipe.values import Items, Keys, Positive, Text

Measure: TypeAlias = Literal[
    "agreement", "same_answers", "metric", "accuracy", "matthews_correlation", "f1", "accuracy_f1", "pearson_spearman",
    "exact_match", "loss",
]  # fmt: skip


class Command(Keys):
    """A program that is given a merged folder and prints JSON."""

    run: Text | Items[Text] = Field(
        description="The program and its arguments, of which {folder} is the merged model; no shell reads them."
    )
    value: Text = Field("score", description="Where the number is in the last JSON it prints: results.gsm8k.acc.")
    direction: Literal["maximize", "minimize"] = Field("maximize", description="Whether more is better.")
    timeout: Positive = Field(3600, le=10**7, description="Seconds after which it is ended, and the trial has failed.")


class Goal(Keys):
    """What candidates are judged by."""

    measure: Measure | None = Field(
        None,
        description="agreement: distance of outputs from each fine-tune's own, without labels, as a share of the "
        "base's; same_answers: how often its answers are the fine-tune's; metric: calibration.metric of each "
        "fine-tune; or a metric.",
    )
    over: Literal["mean", "minimum"] = Field("mean", description="How the fine-tunes' values become one; the worst.")
    weights: dict[Text, Annotated[float, Field(ge=0)]] = Field({}, description="Of the mean, by the models' names.")
    of: Text | None = Field(None, description="One fine-tune alone, by its name.")
    command: Command | None = Field(None, description="Instead of a measure: what a program says of the folder.")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return {"measure": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _one(self) -> Goal:
        if self.command is not None and self.model_fields_set != {"command"}:
            raise PydanticCustomError("goal", "command stands alone")
        if self.of is not None and self.model_fields_set & {"over", "weights"}:
            raise PydanticCustomError("goal", "of is one model: leave over and weights out")
        if self.over == "minimum" and self.weights:
            raise PydanticCustomError("goal", "weights are of the mean, not of the minimum")
        return self

    @property
    def by(self) -> str:
        """The measure."""
        return self.measure or "agreement"

    @property
    def name(self) -> str:
        """The name in tables and in a study."""
        if self.command is not None:
            return self.command.value
        by = "distance" if self.by == "agreement" else self.by
        return f"{by} of {self.of}" if self.of else f"{self.over} {by}"


def _shape(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(list)"
    return "(objective)" if isinstance(value, str) else "(value)"


class Study(Keys):
    """How a sweep or a search is done."""

    objective: Annotated[
        Annotated[Measure, Tag("(objective)")]
        | Annotated[Goal, Tag("(value)")]
        | Annotated[Annotated[Items[Goal], Field(min_length=1, max_length=4)], Tag("(list)")],
        Discriminator(_shape),
    ] = Field("agreement", description="A measure, {measure, over, weights}, {command}, or a list: a Pareto front.")
    test: Text | dict[Text, Text] | None = Field(
        None,
        description="Rows that a sweep scores on and that decide a search: a file, or one by each model's name. "
        "Default: rows of the calibration data that are not searched on.",
    )
    sampler: Literal["gp", "tpe", "cmaes", "nsga2", "random"] | None = Field(
        None,
        description="Of Optuna. Default: tpe; nsga2 for several objectives.",
    )
    pruner: Literal["none", "median", "halving"] = Field(
        "none", description="Which trials end after a quarter of the rows."
    )
    trials: Positive = Field(64, le=100_000, description="Candidates that are tried.")
    together: Positive = Field(4, le=64, description="Candidates in one walk through the blocks.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="Of the sampler.")

    @property
    def goals(self) -> tuple[Goal, ...]:
        """The objectives."""
        if isinstance(self.objective, tuple):
            return self.objective
        if isinstance(self.objective, Goal):
            return (self.objective,)
        return (Goal.model_validate({"measure": self.objective}),)
