"""Promise: a timm tower comes by name with timm's own preprocessing and weights, and one with BatchNorm trains, soups and serves."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from stockpot.checkpoints import load_weights, save_weights
from stockpot.config import BaseSpec, InitSpec
from stockpot.data.images import eval_transform
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.errors import ModelError
from stockpot.evaluation import logits, normalise
from stockpot.ledger import served_model
from stockpot.models.bases import load_base
from stockpot.models.classifier import build
from stockpot.models.folders import write_model
from stockpot.models.loading import load_state
from stockpot.settings import TrialSettings
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.weights import open_weights
from stockpot.training.course import fine_tune
from stockpot.training.inits import fetch, prepare
from tests.tiny_sweep import png

CLASSES = ("ant", "bee", "cat")
PUBLISHED = "test_vit.r160_in1k"


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext", "test_coatnet"])
def test_weights_of_a_whole_model_leave_their_classifier_behind(name, tmp_path):
    torch.manual_seed(1)
    whole = timm.create_model(name, num_classes=7).eval()
    torch.save({"model": whole.state_dict()}, tmp_path / "whole.pth")
    base = load_base(BaseSpec(arch=f"timm:{name}", weights=str(tmp_path / "whole.pth")))
    model = build(base.config(CLASSES)).eval()
    load_state(model, {**base.state(model.config), "head.weight": torch.randn_like(model.head.weight), "head.bias": torch.ones(3)})
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        wanted = whole.forward_head(whole.forward_features(images), pre_logits=True)
        assert torch.allclose(model.features(images), wanted, atol=1e-6)
        assert torch.allclose(model(images), model.head(wanted), atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_efficientnet",
        "vit_base_patch16_clip_224.openai",
        "convnext_base.clip_laion2b_augreg",
        "vit_base_patch32_224.augreg_in21k",
        "coatnet_rmlp_2_rw_224.sw_in12k",
    ],
)
def test_images_are_prepared_as_timm_does(name):
    from stockpot.models.timm_towers import describe

    _, preprocess = describe(BaseSpec(arch=f"timm:{name}"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (190, 300, 3), np.uint8))
    with torch.device("meta"):
        config = resolve_model_data_config(timm.create_model(name))
    theirs = create_transform(**config, is_training=False)(picture)
    ours = eval_transform(torch.from_numpy(np.array(picture)).permute(2, 0, 1), preprocess)
    assert torch.allclose(normalise(ours[None], preprocess)[0], theirs, atol=2.5 / 255 / min(preprocess.std))


def test_published_weights_are_loaded_by_tag(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    spec = BaseSpec(arch="timm:test_vit", weights="r160_in1k")
    with pytest.raises(ModelError, match=r"The weights of `timm:test_vit\.r160_in1k` cannot be fetched .* give their address"):
        load_base(spec)
    torch.manual_seed(2)
    whole = timm.create_model("test_vit")
    commit = tmp_path / f"models--timm--{PUBLISHED}" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    save_file(whole.state_dict(), commit / "model.safetensors")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("0" * 40)
    assert torch.equal(load_base(spec).tower["patch_embed.proj.weight"], whole.patch_embed.proj.weight)


def test_random_weights_come_from_the_seed():
    one, same, other = (load_base(BaseSpec(arch="timm:test_efficientnet"), seed=seed).tower for seed in (1, 1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["conv_stem.weight"], other["conv_stem.weight"])


@pytest.mark.parametrize(
    ("arch", "weights", "told"),
    [
        ("timm:vit_bas_patch16_224", None, r"timm has no architecture `vit_bas_patch16_224`; did you mean .*`vit_base_patch16_224`"),
        ("timm:test_vit", "r160", r"`timm:test_vit` has no weights tagged `r160`; did you mean `r160_in1k`\?"),
        ("timm:test_vit.in22k", None, r"has no weights tagged `in22k`"),
        ("timm:test_vit.r160_in1k", "augreg", r"names the weights `r160_in1k` and `weights` names `augreg`; keep one"),
    ],
)
def test_an_unknown_name_offers_the_nearest(arch, weights, told):
    with pytest.raises(ModelError, match=told):
        load_base(BaseSpec(arch=arch, weights=weights))


def test_weights_of_another_tower_name_the_first_key(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    save_weights(tmp_path / "other.safetensors", state | {"patch_embed.proj.weight": torch.zeros(96, 3, 16, 16)})
    with pytest.raises(
        ModelError, match=r"`patch_embed.proj.weight` is \(96, 3, 16, 16\) in the weights and \(64, 3, 16, 16\) in the model"
    ):
        load_base(BaseSpec(arch="timm:test_vit", weights=str(tmp_path / "other.safetensors")))


def test_a_zero_shot_head_needs_a_text_tower(ground, node, tmp_path):
    with pytest.raises(ModelError, match="`timm:test_vit` has no text tower"):
        prepare(BaseSpec(arch="timm:test_vit"), InitSpec(head="zero_shot"), ground.data.snapshot, f"{tmp_path}/store")


def test_a_tower_with_batchnorm_trains_soups_and_serves(ground, node, tmp_path):
    snapshot = open_snapshot(ground.data.snapshot)
    config, init = fetch(prepare(BaseSpec(arch="timm:test_efficientnet"), InitSpec(), ground.data.snapshot, f"{tmp_path}/store"))
    for seed in (0, 1):
        model = build(config)
        load_state(model, init)
        fine_tune(model, TrialSettings(batch_size=20, max_steps=3, epochs=1, learning_rate=1e-3, seed=seed), snapshot)
        save_weights(tmp_path / f"{seed}.safetensors", model.state_dict())
    files = [open_weights(tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    soup, one, other = average(files), *(load_weights(file.path) for file in files)
    statistics = next(name for name in soup if name.endswith("running_mean"))
    assert not torch.equal(one[statistics], init[statistics])
    assert torch.allclose(soup[statistics], (one[statistics] + other[statistics]) / 2)
    assert int(soup[statistics.replace("running_mean", "num_batches_tracked")]) == 3
    _serve(tmp_path / "soup", config, soup, snapshot)


def _serve(folder: Path, config, soup, snapshot) -> None:
    """The file in the registry answers as the model does."""
    model = build(config)
    load_state(model, soup)
    write_model(folder, model)
    served = served_model.Soup()
    served.load_context(SimpleNamespace(artifacts={"soup": str(folder)}))
    images = pixels(snapshot, "gate", config.preprocess).images[:4]
    assert torch.allclose(served.logits(torch.from_numpy(np.array(images))), logits(model, images, config.preprocess), atol=1e-5)
    answers = served.predict(None, [{"image": png(1, 1)}])
    assert answers[0]["label"] in config.classes
