"""A backbone of the user's own, by import path: `package.module:name`, a torch module, or what gives one when called without
arguments.

The module takes (B, 3, S, S) normalised float images and gives (B, D) features. Its package must be installed wherever the model is built:
where inits are prepared, where trials run, and where the version is served.
"""

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from stockpot.config import BaseSpec
from stockpot.errors import ModelError
from stockpot.models.loading import fetch_state, load_state
from stockpot.preparation import Preprocess


def tower(arch: dict[str, Any]) -> tuple[nn.Module, int]:
    """The backbone, as its package makes it, and its number of features."""
    return _made(arch["name"]), int(arch["features"])


def describe(base: BaseSpec) -> tuple[dict[str, Any], Preprocess]:
    """Its name and number of features, found by showing it one black image, and how its images are prepared, which only the user knows."""
    if base.preprocess is None:
        raise ModelError(
            f"Nothing says how images are prepared for the backbone `{base.arch}`; write it as `preprocess` of the base: size, mean, std."
        )
    with torch.inference_mode():
        answer = _made(base.arch).eval()(torch.zeros(1, 3, base.preprocess.size, base.preprocess.size))
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != 1:
        found = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ModelError(f"The backbone `{base.arch}` gives {found} for one image, needed are features [1, D]; pool or flatten them.")
    return {"name": base.arch, "features": answer.shape[1]}, base.preprocess


def load(base: BaseSpec, arch: dict[str, Any]) -> tuple[dict[str, Tensor], None]:
    """Its weights: as its package made them, or those at the address. There is no text tower."""
    body = _made(arch["name"])
    if base.weights is not None:
        load_state(body, fetch_state(base.weights))
    return body.state_dict(), None


def _made(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a name that begins with a dot
        raise ModelError(
            f"There is no backbone `{name}` ({error}): write `package.module:name` of a package installed here and where trials run."
        ) from error
    body = copy.deepcopy(make) if isinstance(make, nn.Module) else make() if callable(make) else make  # a module is callable too
    if not isinstance(body, nn.Module):
        raise ModelError(f"The backbone `{name}` gives a {type(body).__name__}, needed is a torch module: name a function that makes one.")
    return body
