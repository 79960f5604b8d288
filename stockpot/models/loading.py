"""Weights into models: files of other programs (safetensors, or torch's own format read without running any of it), and the exact fit.

A torch file is a pickle, and a pickle is a program. torch reads ours with `weights_only=True`, which refuses everything but tensors and
plain containers; what it refuses is refused here too, never retried.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from stockpot import storage
from stockpot.checkpoints import load_weights
from stockpot.errors import ModelError

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training programs keep the weights, beside epoch, optimiser and the like."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put weights into a model. Raises `ModelError` naming the first key that differs, and both shapes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise ModelError(
                f"The weights do not fit the architecture: `{name}` is {found.get(name, 'missing')} in the weights and "
                f"{wanted.get(name, 'unknown')} in the model. Name the architecture the weights were trained with."
            )
    model.load_state_dict(state)


def fetch_state(uri: str) -> dict[str, Tensor]:
    """The state dict in a file of any program, by address, on the CPU and without its wrappers. Raises `ModelError`."""
    with TemporaryDirectory(prefix="stockpot-weights-") as folder:
        path = Path(folder) / uri.rsplit("/", 1)[-1]
        storage.download(uri, path)
        return unwrapped(_torch_file(path) if _is_pickle(path) else load_weights(path), uri)


def unwrapped(content: Any, name: str) -> dict[str, Tensor]:
    """The state dict inside what a training program saved. Raises `ModelError` where there is none."""
    while isinstance(content, Mapping) and (inner := [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]):
        content = content[inner[0]]
    if not isinstance(content, Mapping) or not content:
        raise ModelError(
            f"`{name}` holds no state dict but a value of type {type(content).__name__}; save names and tensors, `model.state_dict()`."
        )
    odd = next((key for key, value in content.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ModelError(
            f"`{name}` holds a value of type {type(content[odd]).__name__} under `{odd}`, needed is a tensor under every name: save "
            f"`model.state_dict()` alone, or under one of {', '.join(WRAPPERS)}."
        )
    state = dict(content)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _is_pickle(path: Path) -> bool:
    """Whether torch wrote the file: a zip archive, or the pickle of before 2020. A safetensors file starts with its header's length."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:9] != b"{")


def _torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        call = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"`{call[1]}`" if call else "more than tensors"
        raise ModelError(
            f"`{path.name}` asks for {found} to be run or built while it is read, so it was not read; needed are tensors alone: save the "
            "state dict as safetensors where the file can be trusted."
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"`{path.name}` is damaged, or a TorchScript program; save its state dict as safetensors.") from error
