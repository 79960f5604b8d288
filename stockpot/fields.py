"""What every noun is made of: closed records, and the few forms of a value that several of them share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
ADDRESS = r"^s3://[^\s/][^\s]*$|^file://[^\s]+$|^/[^\s]*$"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Uri = Annotated[str, Field(pattern=ADDRESS)]
Metric = Literal["accuracy", "macro_f1", "mcc"]
METRICS: dict[Metric, str] = {"accuracy": "accuracy", "macro_f1": "macro F1", "mcc": "Matthews correlation"}
"""What ingredients may be ranked by, and how a table calls it."""


class Closed(BaseModel):
    """Frozen, and no field but the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
