"""Weights on disk: safetensors, never pickle. The same weights give the same bytes, so a file's sha256 is an identity.

Two things safetensors leaves open are settled here. Its metadata is written in random order when it has several keys (0.8.0), so ours
is one key holding canonical JSON. It refuses tensors that share memory, so a tied tensor is stored once and tied again on loading.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stockpot.digests import canonical, file_digest
from stockpot.errors import ModelError

_KEY = "stockpot"


def save_weights(path: Path, state: dict[str, Tensor]) -> str:
    """Write a state dict, on any device, to `path`, atomically. Returns the sha256 of the file."""
    owner: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    unique: dict[str, Tensor] = {}
    for name in sorted(state):
        tensor = state[name].detach()
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        first = owner.setdefault(identity, name) if tensor.numel() else name
        if first == name:
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            unique[name] = (tensor if whole else tensor.clone()).to("cpu").contiguous()  # a part of another tensor is stored by itself
        else:
            tied[name] = first
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # `metadata` is always empty: without it every file, and its sha256, would be another than before.
    save_file(unique, partial, metadata={_KEY: canonical({"metadata": {}, "tied": tied}).decode()})
    partial.replace(path)
    return file_digest(path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file, ours or any other, on the CPU. Tied names share one tensor.

    Raises `ModelError` when the file is no whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            header = file.metadata() or {}
    except (SafetensorError, FileNotFoundError) as error:
        raise ModelError(f"`{path.name}` is not readable as safetensors ({error}); store the weights again.") from error
    for name, first in json.loads(header.get(_KEY, '{"tied": {}}'))["tied"].items():
        state[name] = state[first]
    return state


def first_non_finite(state: dict[str, Tensor]) -> str | None:
    """The name of the first floating tensor that holds a NaN or an infinity, None when all are numbers."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None
