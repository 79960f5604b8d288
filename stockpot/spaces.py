"""How a field of the settings is drawn: one of some values, between two bounds, sometimes, or depending on another field."""

import math
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

from stockpot.fields import Closed, Fraction


class Choice(Closed):
    """One of the values, each as likely."""

    choice: tuple[Any, ...] = Field(min_length=1, description="The values to choose from.")


class Uniform(Closed):
    """A number between two bounds."""

    uniform: tuple[float, float] = Field(description="Lowest and highest value.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.uniform
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"uniform [{low}, {high}] is impossible: the lowest value must come first and both be finite")
        return self


class LogUniform(Closed):
    """A positive number whose logarithm is uniform."""

    log_uniform: tuple[float, float] = Field(description="Lowest and highest value, both above 0.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.log_uniform
        if not (0 < low <= high and math.isfinite(high)):
            raise ValueError(f"log_uniform [{low}, {high}] is impossible: needs 0 < lowest <= highest")
        return self


class IntUniform(Closed):
    """A whole number between two bounds, both included."""

    int_uniform: tuple[int, int] = Field(description="Lowest and highest value.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.int_uniform
        if low > high:
            raise ValueError(f"int_uniform [{low}, {high}] is impossible: the lowest value must come first")
        return self


class Sometimes(Closed):
    """One fixed value with some probability, else a draw."""

    probability: Fraction = Field(description="Chance of the fixed value.")
    value: Any = Field(description="The fixed value, such as 0 for switched off.")
    otherwise: "Distribution" = Field(description="Drawn when the fixed value is not.")


class Depending(Closed):
    """A distribution for each value of another field, such as a range of learning rates for each optimiser."""

    given: str = Field(description="The field that decides: one of the space or the grid, else the sweep's settings have its value.")
    cases: dict[str, "Distribution"] = Field(min_length=1, description="Its values, as text, and what is drawn from for each.")


def _kind(distribution: Any) -> str | None:
    """Which distribution is meant: the one field that none of the others has. In angle brackets, by which an error's place tells it from
    the fields on the way."""
    fields = distribution if isinstance(distribution, dict) else getattr(type(distribution), "model_fields", ())
    kinds = ("choice", "uniform", "log_uniform", "int_uniform", "probability", "given")
    return next((f"<{name}>" for name in kinds if name in fields), None)


Distribution = Annotated[
    Annotated[Choice, Tag("<choice>")]
    | Annotated[Uniform, Tag("<uniform>")]
    | Annotated[LogUniform, Tag("<log_uniform>")]
    | Annotated[IntUniform, Tag("<int_uniform>")]
    | Annotated[Sometimes, Tag("<probability>")]
    | Annotated[Depending, Tag("<given>")],
    Discriminator(
        _kind,
        custom_error_type="no_distribution",
        custom_error_message="no distribution; write choice, uniform, log_uniform, int_uniform, probability or given",
    ),
]


def deciding(*distributions: Distribution) -> list[str]:
    """The fields that these distributions depend on."""
    found: list[str] = []
    for one in distributions:
        if isinstance(one, Sometimes):
            found += deciding(one.otherwise)
        elif isinstance(one, Depending):
            found += [one.given, *deciding(*one.cases.values())]
    return found
