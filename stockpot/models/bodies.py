"""The body of a classifier, which is all but its head: it decides the features, whatever the classes."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from stockpot.digests import canonical
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.loading import load_state

PREFIX = "body."


def body_digest(model: Classifier) -> str:
    """sha256 of the body's weights and of what they compute: kind and architecture. Neither classes nor preparation are part of it."""
    found = hashlib.sha256(canonical([model.config.kind, model.config.arch]))
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(PREFIX):
            found.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def under_another_head(model: Classifier, config: ModelConfig, state: Mapping[str, Tensor]) -> Classifier:
    """The model's body, with all else (head, text tower, classes) of the model that config and state are of. Raises `ModelError`."""
    joined = build(config)
    load_state(joined, {**state, **{name: tensor for name, tensor in model.state_dict().items() if name.startswith(PREFIX)}})
    return joined
