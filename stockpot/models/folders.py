"""A model on disk: a folder of weights (`model.safetensors`), config (`model.json`) and fingerprint (`fingerprint.json`).

The fingerprint is what the model said about fixed inputs when it was stored. Weights and config can both be whole and still compute
something else, under another version of a library or with an activation put right by hand: then the reloaded model's logits differ, and
it is refused instead of being averaged, judged or served.
"""

# C classes, P probe inputs

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from stockpot.checkpoints import load_weights, save_weights
from stockpot.digests import canonical
from stockpot.errors import ModelError
from stockpot.fields import Closed
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.loading import load_state
from stockpot.preparation import Preparation, Tokens

FILES = ("model.safetensors", "model.json", "fingerprint.json")
PROBES = 2
TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest stored one. Measured on random towers up to ViT-B/32: other threads and float64
change at most 4e-7 of it, QuickGELU in place of GELU 1e-3 to 8e-3."""


class Fingerprint(Closed):
    """What a model says about the probe inputs, on the CPU in float32."""

    inputs: str = Field(description="sha256 of the probe inputs' bytes.")
    logits: tuple[tuple[float | None, ...], ...] = Field(description="One row of class logits for every probe input; None: no number.")


def write_model(folder: Path, model: Classifier) -> str:
    """Store the model; returns the sha256 of its weights."""
    sha256 = save_weights(folder / "model.safetensors", model.state_dict())
    (folder / "model.json").write_bytes(canonical(model.config))
    (folder / "fingerprint.json").write_bytes(canonical(fingerprint(model)))
    return sha256


def read_model(folder: Path) -> Classifier:
    """The stored model, on the CPU. Raises `ModelError` when its weights do not fit, or it does not say what it said when it was stored."""
    model = build(ModelConfig.model_validate_json((folder / "model.json").read_bytes()))
    load_state(model, load_weights(folder / "model.safetensors"))
    check_fingerprint(model, folder)
    return model


def fingerprint(model: Classifier) -> Fingerprint:
    """The model's own, whatever its device and mode, which stay as they are."""
    probes_P = probes(model.config.preprocess)
    rows = _logits(model, probes_P).tolist()
    logits = tuple(tuple(value if math.isfinite(value) else None for value in row) for row in rows)
    return Fingerprint(inputs=_digest(probes_P), logits=logits)


def check_fingerprint(model: Classifier, folder: Path) -> None:
    """Raises `ModelError` unless the model says what the one stored in the folder said."""
    file = folder / "fingerprint.json"
    if not file.exists():
        raise ModelError("The stored model has no fingerprint.json, so nobody can tell whether it computes what it did; store it again.")
    try:
        stored, found = Fingerprint.model_validate_json(file.read_bytes()), fingerprint(model)
    except ValidationError as error:
        raise ModelError("The stored model's fingerprint.json cannot be read, so nobody can tell what it computed; restore it.") from error
    if stored.inputs != found.inputs:
        raise ModelError(
            f"The stored logits belong to probe inputs {stored.inputs[:12]}, this version of Stockpot makes {found.inputs[:12]}; store the "
            "model again with this version."
        )
    before_PC, now_PC = (
        torch.tensor([[math.nan if value is None else value for value in row] for row in one.logits]) for one in (stored, found)
    )
    apart = float((before_PC - now_PC).abs().max() / before_PC.abs().max().clamp(min=1e-12))
    if not apart <= TOLERANCE:  # a NaN is no agreement
        raise ModelError(
            f"The reloaded model is another one: its logits differ from the stored ones by {apart:.1e} of the largest, {TOLERANCE:.0e} is "
            "allowed. Its config (activation, architecture) or a library changed since; use those it was stored with."
        )


def probes(preparation: Preparation) -> Tensor:
    """The same noise on every machine as a model's input: pictures between -1 and 1, float32 (P, 3, S, S), or tokens, int32 (P, L), the
    last one filled up from its middle on."""
    noise = np.random.default_rng(2203)
    if isinstance(preparation, Tokens):
        tokens_PL = noise.integers(0, preparation.vocabulary, (PROBES, preparation.length), np.int32)
        tokens_PL[-1, (preparation.length + 1) // 2 :] = preparation.padding
        return torch.from_numpy(tokens_PL)
    return torch.from_numpy(noise.integers(0, 256, (PROBES, *preparation.shape), np.uint8)).float() / 127.5 - 1


def _digest(probes_P: Tensor) -> str:
    return hashlib.sha256(probes_P.numpy().tobytes()).hexdigest()


@torch.inference_mode()
def _logits(model: Classifier, probes_P: Tensor) -> Tensor:
    device, training = next(model.parameters()).device, model.training
    logits_PC: Tensor = model.cpu().eval()(probes_P)
    model.to(device).train(training)
    return logits_PC
