"""Promise: a backbone of one's own, named by import path, is built, trained, stored and served like any other, or refused in a sentence."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from stockpot.config import BaseSpec, InitSpec
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.errors import ModelError
from stockpot.evaluation import logits
from stockpot.ledger import packaging, served_model
from stockpot.models.bases import load_base
from stockpot.models.folders import write_model
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.training.course import fine_tune
from stockpot.training.inits import load, prepare

PREPROCESS = Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3, resize_mode="squash")


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """A package of the user's."""
    module = ModuleType("their_package")
    module.small, module.made, module.number, module.text = small, small(), 7, lambda: "no module"
    module.unpooled = lambda: nn.Conv2d(3, 8, 4)
    monkeypatch.setitem(sys.modules, "their_package", module)


def test_a_module_that_is_made_already_is_copied():
    made = sys.modules["their_package"].made
    spec = BaseSpec(arch="their_package:made", preprocess=PREPROCESS)
    tower = load_base(spec).tower
    tower["0.weight"].zero_()
    assert made[0].weight.abs().min() > 0
    assert set(tower) == set(made.state_dict())


@pytest.mark.parametrize("name", ["small", "made"])
def test_it_trains_and_serves(ground, node, tmp_path, name):
    spec, snapshot = BaseSpec(arch=f"their_package:{name}", preprocess=PREPROCESS), open_snapshot(ground.data.snapshot)
    model = load(prepare(spec, InitSpec(), ground.data.snapshot, f"{tmp_path}/store"))
    before = model.body[0].weight.detach().clone()
    fine_tune(model, TrialSettings(batch_size=20, max_steps=3, epochs=1, learning_rate=1e-2), snapshot)
    assert not torch.equal(model.body[0].weight, before)
    write_model(tmp_path / "soup", model)
    served = served_model.Soup()
    served.load_context(SimpleNamespace(artifacts={"soup": str(tmp_path / "soup")}))
    images = pixels(snapshot, "gate", model.config.preprocess).images
    assert torch.allclose(served.logits(torch.from_numpy(np.array(images))), logits(model, images, PREPROCESS), atol=1e-5)


def test_weights_at_an_address_must_fit(tmp_path):
    torch.save(small().state_dict(), tmp_path / "own.pt")
    spec = BaseSpec(arch="their_package:small", preprocess=PREPROCESS, weights=str(tmp_path / "own.pt"))
    assert torch.equal(load_base(spec).tower["0.weight"], torch.load(tmp_path / "own.pt", weights_only=True)["0.weight"])
    torch.save(nn.Conv2d(3, 8, 2).state_dict(), tmp_path / "own.pt")
    with pytest.raises(ModelError, match=r"`0\.weight` is missing in the weights"):
        load_base(spec)


@pytest.mark.parametrize(
    ("arch", "preprocess", "told"),
    [
        ("their_package:small", None, "Nothing says how images are prepared for the backbone `their_package:small`"),
        ("their_package:large", PREPROCESS, "There is no backbone `their_package:large`"),
        ("no_such_package:small", PREPROCESS, "There is no backbone `no_such_package:small`"),
        ("their_package:number", PREPROCESS, "gives a int, needed is a torch module"),
        ("their_package:text", PREPROCESS, "gives a str, needed is a torch module"),
        ("their_package:unpooled", PREPROCESS, r"gives \[1, 8, 13, 13\] for one image, needed are features \[1, D\]"),
    ],
)
def test_what_is_no_backbone_is_one_sentence(arch, preprocess, told):
    with pytest.raises(ModelError, match=told):
        load_base(BaseSpec(arch=arch, preprocess=preprocess))


def test_the_version_pins_the_package_it_comes_from():
    assert not any(line.startswith("filelock") for line in packaging.requirements({"kind": "open_clip", "arch": {}}))
    assert any(
        line.startswith("filelock==") for line in packaging.requirements({"kind": "imported", "arch": {"name": "filelock:FileLock"}})
    )
