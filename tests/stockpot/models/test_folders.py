"""Promise: a stored model comes back computing what it computed, or not at all."""

import json
from pathlib import Path

import pytest
import torch

from stockpot.checkpoints import load_weights, save_weights
from stockpot.digests import canonical, file_digest
from stockpot.errors import ModelError
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.folders import fingerprint, read_model, write_model
from stockpot.preparation import Preprocess

ARCH = {"embed_dim": 16, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}}
PREPROCESS = Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(params=["open_clip", "timm"])
def model(request) -> Classifier:
    torch.manual_seed(7)
    arch, size = (ARCH, 16) if request.param == "open_clip" else ({"name": "test_efficientnet"}, 64)
    preprocess = PREPROCESS.model_copy(update={"size": size})
    return build(ModelConfig(kind=request.param, arch=arch, preprocess=preprocess, classes=("ant", "bee")))


def test_a_stored_model_comes_back(model, tmp_path):
    sha256 = write_model(tmp_path, model.train())
    assert sha256 == file_digest(tmp_path / "model.safetensors")
    assert model.training
    back = read_model(tmp_path)
    assert back.config == model.config
    assert fingerprint(back) == fingerprint(model)


def test_the_same_weights_with_another_activation_are_refused(tmp_path):
    for seed in range(3):
        torch.manual_seed(seed)
        model = build(ModelConfig(kind="open_clip", arch=ARCH, preprocess=PREPROCESS, classes=("ant", "bee")))
        torch.nn.init.zeros_(model.head.bias)  # as a zero-shot head is
        write_model(tmp_path, model)
        quick = model.config.model_copy(update={"arch": {**ARCH, "quick_gelu": True}})
        (tmp_path / "model.json").write_bytes(canonical(quick))
        with pytest.raises(ModelError, match=r"The reloaded model is another one: .* Its config \(activation, architecture\)"):
            read_model(tmp_path)


def _forget(folder: Path) -> None:
    (folder / "fingerprint.json").unlink()


def _other_probes(folder: Path) -> None:
    stored = json.loads((folder / "fingerprint.json").read_text())
    (folder / "fingerprint.json").write_text(json.dumps(stored | {"inputs": "0" * 64}))


def _not_a_number(folder: Path) -> None:
    state = load_weights(folder / "model.safetensors")
    save_weights(folder / "model.safetensors", state | {"head.bias": torch.full_like(state["head.bias"], torch.nan)})


def _slightly_off(folder: Path) -> None:
    state = load_weights(folder / "model.safetensors")
    save_weights(folder / "model.safetensors", state | {"head.bias": state["head.bias"] + 0.01})


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_forget, "has no fingerprint.json"),
        (_other_probes, "belong to probe inputs 000000000000"),
        (_not_a_number, "differ from the stored ones by nan"),
        (_slightly_off, "is another one"),
    ],
)
def test_what_cannot_be_checked_or_differs_is_refused(model, harm, told, tmp_path):
    write_model(tmp_path, model)
    harm(tmp_path)
    with pytest.raises(ModelError, match=told):
        read_model(tmp_path)
