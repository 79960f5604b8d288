"""Every noun a person may write down: the request and its parts. Fields carry their unit, range and reason; they become
the form on the Prefect page. Frozen and closed: an unknown field is refused, a default is part of the identity.

Endpoints and secrets are not here: they come from the standard environment names (`PREFECT_API_URL`,
`MLFLOW_TRACKING_URI`, `AWS_ENDPOINT_URL`, ...). Nothing else is a setting.
"""

from stockpot.config.data import DataSpec, PinnedData, PinnedSnapshot
from stockpot.config.fan_out import FanOutSpec, StopSpec
from stockpot.config.init import TEXT_PREFIX, BaseSpec, Init, InitSpec
from stockpot.config.pinned import Sweep, Trial, sweep_id
from stockpot.config.release import GateSpec, ReleaseSpec
from stockpot.config.request import RetrainRequest
from stockpot.config.soup import MixingSpec, Recipe, SoupSpec
from stockpot.config.sweep import SweepSpec

__all__ = [
    "TEXT_PREFIX",
    "BaseSpec",
    "DataSpec",
    "FanOutSpec",
    "GateSpec",
    "Init",
    "InitSpec",
    "MixingSpec",
    "PinnedData",
    "PinnedSnapshot",
    "Recipe",
    "ReleaseSpec",
    "RetrainRequest",
    "SoupSpec",
    "StopSpec",
    "Sweep",
    "SweepSpec",
    "Trial",
    "sweep_id",
]
