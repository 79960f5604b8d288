"""Promise: a kept text tower still knows classes nobody trained on, a frozen head stays where it is, and what cannot work is told first."""

import json

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from stockpot.checkpoints import load_weights
from stockpot.config import BaseSpec, DataSpec, InitSpec, RetrainRequest
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.snapshots import open_snapshot
from stockpot.errors import ModelError, SnapshotBroken
from stockpot.models.bases import load_base
from stockpot.models.folders import write_model
from stockpot.models.loading import load_state
from stockpot.settings import TrialSettings
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.weights import open_weights
from stockpot.training.course import fine_tune
from stockpot.training.inits import load, prepare
from stockpot.training.rehearsal import require_same_classes
from tests.tiny_sweep import png

ARCH = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
}
SETTINGS = TrialSettings(batch_size=20, max_steps=4, epochs=1, learning_rate=1e-2, weight_decay=0.5)


@pytest.fixture
def base(tmp_path) -> BaseSpec:
    (tmp_path / "config.json").write_text(json.dumps(ARCH))
    return BaseSpec(arch=str(tmp_path / "config.json"))


def trained(init, snapshot, **settings):
    model = load(init)
    fine_tune(model, SETTINGS.model_copy(update=settings), snapshot)
    return model


def test_a_soup_with_its_text_tower_is_asked_about_new_classes(base, ground, node, tmp_path):
    keep, snapshot = base.model_copy(update={"text_tower": "keep"}), open_snapshot(ground.data.snapshot)
    init = prepare(keep, InitSpec(head="zero_shot"), ground.data.snapshot, f"{tmp_path}/store")
    for seed in (0, 1):
        write_model(tmp_path / str(seed), trained(init, snapshot, seed=seed, ema_decays=(0.5,)))
    files = [open_weights(tmp_path / str(seed) / "model.safetensors") for seed in (0, 1)]
    soup = load(init)
    load_state(soup, average(files))
    asked = soup.for_classes(("lion", "tiger", "bear", "wolf"), ("a photo of a {}.", "a {}")).eval()
    images = torch.randn(5, 3, 16, 16)
    text = load_base(base).text
    with torch.inference_mode():
        seen = functional.normalize(soup.eval().body(images), dim=-1)
        wanted = seen @ text.zero_shot_head(("lion", "tiger", "bear", "wolf"), ("a photo of a {}.", "a {}")).T
        assert torch.allclose(asked(images), wanted, atol=1e-4)
        assert not torch.allclose(seen, functional.normalize(load(init).eval().body(images), dim=-1), atol=1e-3)  # it was trained
    one = load_weights(files[0].path)
    assert all(torch.equal(one[name], tensor) for name, tensor in load(init).state_dict().items() if name.startswith("text."))


def test_a_dropped_text_tower_is_not_stored_and_cannot_be_asked(base, ground, node, tmp_path):
    model = load(prepare(base, InitSpec(), ground.data.snapshot, f"{tmp_path}/store"))
    assert not any(name.startswith("text.") for name in model.state_dict())
    with pytest.raises(ModelError, match="has no text tower to read class names with"):
        model.for_classes(("lion",), ("a {}",))


@pytest.mark.parametrize(
    "settings", [{}, {"sam_rho": 0.05}, {"optimiser": "sgd", "ema_decays": (0.9,)}], ids=["adamw", "sam", "sgd and ema"]
)
def test_a_frozen_head_stays_and_the_body_moves(base, ground, node, tmp_path, settings):
    spec = InitSpec(head="zero_shot", freeze_head=True)
    init = prepare(base, spec, ground.data.snapshot, f"{tmp_path}/store")
    before, after = load(init).state_dict(), trained(init, open_snapshot(ground.data.snapshot), **settings).state_dict()
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert torch.equal(before["head.bias"], after["head.bias"])
    assert not torch.equal(before["body.conv1.weight"], after["body.conv1.weight"])


def test_bodies_of_two_datasets_with_frozen_heads_start_equal(base, ground, node, tmp_path):
    animals = publish(
        f"{tmp_path}/animals", "animals", ("lion", "bear"), GivenSamples([Sample(f"a{n}", png(n, n % 2), n % 2) for n in range(12)]),
        splits="train",
    )  # fmt: skip
    spec = InitSpec(head="zero_shot", freeze_head=True)
    colours, beasts = (
        load(prepare(base, spec, one, f"{tmp_path}/store")).state_dict() for one in (ground.data.snapshot, animals)
    )  # fmt: skip
    assert colours["head.weight"].shape != beasts["head.weight"].shape
    assert all(torch.equal(tensor, beasts[name]) for name, tensor in colours.items() if name.startswith("body."))


def request_of(ground, **parts) -> RetrainRequest:
    given = {"base": BaseSpec(arch="timm:test_vit"), **parts}
    return RetrainRequest(model="m", store=ground.folder, data=DataSpec(snapshot=ground.data.snapshot.uri), **given)


def test_a_test_snapshot_of_other_classes_is_refused_before_a_gpu_is_taken(ground, node, tmp_path):
    other = publish(f"{tmp_path}/two", "two", ("red", "green"), GivenSamples([Sample(f"t{n}", png(n, n % 2), n % 2) for n in range(8)]),
                    splits="test")  # fmt: skip
    require_same_classes(ground.data)
    for data in ({"test": other}, {"shifts": {"two": other}}):
        with pytest.raises(SnapshotBroken, match=r"has 2 classes \(red, green\), the model has 3 \(red, green, blue\)"):
            require_same_classes(ground.data.model_copy(update=data))


@pytest.mark.parametrize("arch", ["timm:test_vit", "their_package:small"])
def test_a_text_tower_that_cannot_be_there_is_refused_in_the_request(ground, arch):
    with pytest.raises(ValidationError, match="has no text tower for a zero_shot head; ask for the head linear_probe or random"):
        request_of(ground, base=BaseSpec(arch=arch), init=InitSpec(head="zero_shot"))
    with pytest.raises(ValidationError, match="has no text tower to keep"):
        request_of(ground, base=BaseSpec(arch=arch, text_tower="keep"))
