"""The body of a classifier, which is all but its head: it decides the features, whatever the classes."""

import hashlib

import torch

from stockpot.digests import canonical
from stockpot.models.classifier import Classifier

PREFIX = "body."


def body_digest(model: Classifier) -> str:
    """sha256 of the body's weights and of what they compute: kind and architecture. Neither classes nor preparation are part of it."""
    found = hashlib.sha256(canonical([model.config.kind, model.config.arch]))
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(PREFIX):
            found.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
