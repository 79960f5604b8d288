"""Promise: one init per (base, spec, snapshot), found again by its key, verified by its hash; the probe's head is an optimum, not a run."""

import json

import open_clip
import pytest
import timm
import torch

from stockpot.checkpoints import save_weights
from stockpot.config import BaseSpec, InitSpec
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.errors import ModelError, ObjectMissing
from stockpot.evaluation import accuracy, logits
from stockpot.models.bases import load_base
from stockpot.models.classifier import build
from stockpot.models.loading import load_state
from stockpot.training.inits import fetch, prepare
from tests.tiny_sweep import CLASSES

ARCH = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
}


@pytest.fixture
def base(tmp_path) -> BaseSpec:
    (tmp_path / "config.json").write_text(json.dumps(ARCH))
    return BaseSpec(arch=str(tmp_path / "config.json"))


def test_preparing_again_finds_the_same_init(base, ground, node, tmp_path):
    spec = InitSpec(templates=("a {} thing.",))
    first = prepare(base, spec, ground.data.snapshot, f"{tmp_path}/store")
    stored = sorted(path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.*"))
    assert prepare(base, spec, ground.data.snapshot, f"{tmp_path}/store") == first
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.*")) == stored
    config, weights = fetch(first)
    assert config.classes == CLASSES
    assert weights["head.weight"].shape == (3, 16)


def test_two_builders_agree_and_other_specs_differ(base, ground, node, tmp_path):
    snapshot = ground.data.snapshot
    heads = [InitSpec(), InitSpec(head="zero_shot"), InitSpec(head="zero_shot", templates=("two {}s", "no {}"))]
    specs = [*heads, InitSpec(head="random", seed=1), InitSpec(head="random", seed=2)]
    here, there = ([prepare(base, spec, snapshot, f"{tmp_path}/{store}").digest for spec in specs] for store in ("here", "there"))
    assert here == there
    assert len(set(here)) == 5


def test_a_zero_shot_head_is_that_of_the_class_names_in_the_templates_asked_for(base, ground, node, tmp_path):
    templates = ("two {}s", "no {}")
    _, weights = fetch(prepare(base, InitSpec(head="zero_shot", templates=templates), ground.data.snapshot, f"{tmp_path}/store"))
    assert torch.equal(weights["head.weight"], load_base(base).text.zero_shot_head(CLASSES, templates))
    assert not weights["head.bias"].any()


def test_without_its_marker_an_init_is_built_again(base, ground, node, tmp_path):
    first = prepare(base, InitSpec(head="zero_shot"), ground.data.snapshot, f"{tmp_path}/store")
    (marker,) = (tmp_path / "store").rglob("init.json")
    marker.unlink()
    assert prepare(base, InitSpec(head="zero_shot"), ground.data.snapshot, f"{tmp_path}/store") == first
    assert marker.exists()


def test_changed_weights_are_refused(base, ground, node, tmp_path):
    init = prepare(base, InitSpec(head="random"), ground.data.snapshot, f"{tmp_path}/store")
    (weights,) = (tmp_path / "store").rglob("model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModelError, match=r"has digest .*, it was built with"):
        fetch(init)


def test_another_activation_under_the_same_weights_is_refused(base, ground, node, tmp_path):
    init = prepare(base, InitSpec(head="random"), ground.data.snapshot, f"{tmp_path}/store")
    (config,) = (tmp_path / "store").rglob("model.json")
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document | {"arch": document["arch"] | {"quick_gelu": True}}))
    with pytest.raises(ModelError, match=r"its weights or its config \(activation included\) were changed"):
        fetch(init)


def test_the_same_weights_under_another_activation_are_another_init(base, ground, node, tmp_path):
    quick = {"model_cfg": ARCH["model_cfg"] | {"quick_gelu": True}}
    (tmp_path / "quick.json").write_text(json.dumps(quick))
    spec, other = InitSpec(head="random"), BaseSpec(arch=str(tmp_path / "quick.json"))
    one, two = (prepare(each, spec, ground.data.snapshot, f"{tmp_path}/store") for each in (base, other))
    assert all(torch.equal(tensor, fetch(two)[1][name]) for name, tensor in fetch(one)[1].items())
    assert one.digest != two.digest


def test_new_weights_at_the_old_address_give_a_new_init(base, ground, node, tmp_path):
    spec = BaseSpec(arch=base.arch, weights=str(tmp_path / "weights.safetensors"))
    inits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        save_weights(tmp_path / "weights.safetensors", open_clip.CLIP(**ARCH["model_cfg"]).state_dict())
        inits.append(prepare(spec, InitSpec(), ground.data.snapshot, f"{tmp_path}/store"))
    assert inits[0].digest == inits[1].digest != inits[2].digest
    with pytest.raises(ObjectMissing, match="nothing is stored there"):
        prepare(BaseSpec(arch=base.arch, weights="/no/such/file"), InitSpec(), ground.data.snapshot, f"{tmp_path}/store")


def test_the_probe_beats_the_head_it_starts_from(base, ground, node, tmp_path):
    snapshot = open_snapshot(ground.data.snapshot)
    train = {}
    for head in ("zero_shot", "linear_probe"):
        config, weights = fetch(prepare(base, InitSpec(head=head), ground.data.snapshot, f"{tmp_path}/store"))
        model = build(config)
        load_state(model, weights)
        split = pixels(snapshot, "train", config.preprocess)
        train[head] = accuracy(logits(model, split.images, config.preprocess), split.labels).value
    assert train["linear_probe"] > train["zero_shot"]


def test_the_probe_of_a_tower_without_text_needs_no_seed(ground, node, tmp_path):
    base, snapshot = BaseSpec(arch="timm:test_vit", weights=str(tmp_path / "tower.safetensors")), ground.data.snapshot
    save_weights(tmp_path / "tower.safetensors", timm.create_model("test_vit").state_dict())
    one, other = (fetch(prepare(base, InitSpec(seed=seed), snapshot, f"{tmp_path}/store"))[1] for seed in (1, 2))
    assert torch.equal(one["head.weight"], other["head.weight"])
