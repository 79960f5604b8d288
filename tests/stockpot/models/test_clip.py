"""Promise: an architecture comes by name or own config, weights come only if they fit, and the config that travels rebuilds the logits."""

import json
from pathlib import Path
from urllib.error import URLError

import open_clip
import pytest
import torch

from stockpot import storage
from stockpot.checkpoints import load_weights, save_weights
from stockpot.config import BaseSpec
from stockpot.errors import ModelError
from stockpot.models import clip
from stockpot.models.bases import load_base
from stockpot.models.classifier import ModelConfig, build
from stockpot.models.loading import load_state
from stockpot.preparation import Preprocess

CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "resize_mode": "squash"},
}
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> BaseSpec:
    """A config and weights on disk, as a user would bring them."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(5)
    save_weights(folder / "weights.safetensors", open_clip.CLIP(**CONFIG["model_cfg"]).state_dict())
    return BaseSpec(arch=str(folder / "config.json"), weights=f"file://{folder}/weights.safetensors")


def test_a_classifier_sees_what_the_base_model_sees(own):
    base = load_base(own)
    whole = open_clip.CLIP(**CONFIG["model_cfg"]).eval()
    whole.load_state_dict(load_weights(Path(own.weights.removeprefix("file://"))))
    model = build(base.config(CLASSES)).eval()
    head = base.text.zero_shot_head(CLASSES, ["a photo of a {}.", "a {}"])
    load_state(model, {**base.state(model.config), "head.weight": head, "head.bias": torch.zeros(3)})
    images = torch.randn(4, 3, 16, 16)
    tokens = open_clip.SimpleTokenizer(context_length=12)
    with torch.inference_mode():
        seen, _, scale = whole(images)
        texts = torch.stack([whole.encode_text(tokens([f"a photo of a {name}.", f"a {name}"]), normalize=True) for name in CLASSES])
        text = torch.nn.functional.normalize(texts.mean(1), dim=-1)
        assert torch.allclose(model(images), scale * seen @ text.T, atol=1e-4)


def test_a_config_and_weights_may_lie_in_an_object_store(own, s3):
    here = {name: Path(uri.removeprefix("file://")) for name, uri in (("arch", own.arch), ("weights", own.weights))}
    there = {name: s3.uri(f"own/{path.name}") for name, path in here.items()}
    for name, path in here.items():
        storage.write_bytes(there[name], path.read_bytes())
    base, same = load_base(BaseSpec(**there)), load_base(own)
    assert (base.arch, base.preprocess) == (same.arch, same.preprocess)
    assert all(torch.equal(tensor, same.tower[name]) for name, tensor in base.tower.items())


def test_the_travelling_config_keeps_the_activation_and_the_preprocessing(own):
    base = load_base(own)
    config = base.config(CLASSES)
    back = ModelConfig.model_validate_json(config.model_dump_json())
    assert back == config
    assert base.preprocess == Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", resize_mode="squash")
    kinds = {type(module).__name__ for module in build(back).modules()}
    assert "QuickGELU" in kinds
    assert "GELU" not in kinds


def test_random_weights_come_from_the_seed(own):
    bare = BaseSpec(arch=own.arch)
    one, same, other = (load_base(bare, seed=seed).tower for seed in (1, 1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])


def test_weights_of_another_shape_name_the_first_key_and_both_shapes(own, tmp_path):
    wider = {**CONFIG, "model_cfg": {**CONFIG["model_cfg"], "embed_dim": 24}}
    (tmp_path / "wider.json").write_text(json.dumps(wider))
    with pytest.raises(ModelError, match=r"`text_projection` is \(16, 16\) in the weights and \(16, 24\) in the model"):
        load_base(BaseSpec(arch=str(tmp_path / "wider.json"), weights=own.weights))


def test_an_unknown_architecture_offers_the_nearest():
    with pytest.raises(ModelError, match=r"no architecture `ViT-B-33`; did you mean .*`ViT-B-32`"):
        load_base(BaseSpec(arch="ViT-B-33"))


def test_an_unknown_tag_offers_the_nearest():
    with pytest.raises(ModelError, match="`ViT-B-32` has no weights tagged `opena`; did you mean `openai`"):
        load_base(BaseSpec(arch="ViT-B-32", weights="opena"))


@pytest.mark.parametrize(
    ("arch", "weights", "quick"),
    [
        ("ViT-B-32", None, False),
        ("ViT-B-32", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32-quickgelu", "laion400m_e32", True),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", True),
    ],
)
def test_the_activation_is_that_of_the_published_weights(arch, weights, quick):
    """By open_clip's own tables: some architectures say it, some tags do."""
    assert clip.describe(BaseSpec(arch=arch, weights=weights))[0]["quick_gelu"] is quick


def test_published_weights_arrive_whole(own, monkeypatch):
    """The hub's file is one of ours; all that is left out is the hub."""
    path = Path(own.weights.removeprefix("file://"))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _tag: str(path))
    tower, text = clip.load(BaseSpec(arch="RN50", weights="openai"), CONFIG["model_cfg"])
    published = load_weights(path)
    assert tower.keys() == {name.removeprefix("visual.") for name in published if name.startswith("visual.")}
    assert all(torch.equal(tensor, published[f"visual.{name}"]) for name, tensor in tower.items())
    assert torch.equal(text.logit_scale, published["logit_scale"])
    assert torch.equal(text.encoder.token_embedding.weight, published["token_embedding.weight"])


def test_weights_that_cannot_be_fetched_are_one_sentence(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise URLError("no way out")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(ModelError, match=r"The weights `openai` of `RN50` cannot be fetched \(.*no way out.*\); give their address"):
        clip.load(BaseSpec(arch="RN50", weights="openai"), CONFIG["model_cfg"])


BROKEN = [
    "{",
    "[]",
    '{"vision_cfg": {}}',
    '{"model_cfg": {"embed_dim": 8}}',
    '{"model_cfg": {"vision_cfg": {}}, "preprocess_cfg": []}',
    '{"model_cfg": {"vision_cfg": {"image_size": -1}}}',
    '{"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "colour": 1}}',
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_config_is_one_sentence(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_base(BaseSpec(arch=str(tmp_path / "config.json")))


@pytest.mark.parametrize(
    ("tower", "pool"), [("test_vit", ""), ("test_efficientnet", "avg")], ids=["transformer", "convolutions with BatchNorm"]
)
def test_a_config_may_name_a_timm_tower(tower, pool, tmp_path):
    vision = {"timm_model_name": tower, "image_size": 160, "timm_pool": pool, "timm_proj": "linear"}
    config = {"model_cfg": {**CONFIG["model_cfg"], "vision_cfg": vision}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    whole = open_clip.CustomTextCLIP(**config["model_cfg"]).eval()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in whole.state_dict().items()}, "epoch": 3}, tmp_path / "whole.pt")
    base = load_base(BaseSpec(arch=str(tmp_path / "config.json"), weights=str(tmp_path / "whole.pt")))
    model = build(base.config(CLASSES)).eval()
    head = base.text.zero_shot_head(CLASSES, ["a {}"])
    load_state(model, {**base.state(model.config), "head.weight": head, "head.bias": torch.zeros(3)})
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        assert torch.allclose(model.features(images), whole.encode_image(images, normalize=True), atol=1e-5)
        assert model(images).shape == (2, 3)


def test_the_request_may_say_how_images_are_prepared_but_not_their_size(own):
    given = Preprocess(size=16, mean=(0.1,) * 3, std=(0.2,) * 3)
    assert load_base(own.model_copy(update={"preprocess": given})).preprocess == given
    with pytest.raises(ModelError, match="takes 16 x 16 pixels, `preprocess` says 32; write `size: 16`"):
        load_base(own.model_copy(update={"preprocess": given.model_copy(update={"size": 32})}))
