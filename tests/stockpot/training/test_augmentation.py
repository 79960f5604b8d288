"""Promise: the seed alone decides an augmentation, output has the model's size, and a loader process can have every one of them."""

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.v2.functional import to_pil_image

from stockpot.errors import BadRequest
from stockpot.preparation import Preprocess
from stockpot.training.augmentation import Crop, TimmPolicy, augmentation, seeded

PREPROCESS = Preprocess(size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
IMAGE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 21, 30), np.uint8))
NAMES = ["minimal", "medium", "strong", "stochastic", "rand-m9-n2", "deployments.demo.augment:mild", "deployments.demo.augment:medium"]


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_alone_decides(name):
    augment = augmentation(name, PREPROCESS)
    again = pickle.loads(pickle.dumps(augmentation(name, PREPROCESS)))
    random.seed(1)
    torch.manual_seed(1)
    first = [augment(IMAGE, seed) for seed in range(6)]
    second = [again(IMAGE, seed) for seed in reversed(range(6))][::-1]
    assert all(image.shape == (3, 16, 16) and image.dtype == torch.uint8 for image in first)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert len({image.numpy().tobytes() for image in first}) > 1


def test_none_is_the_evaluation_transform():
    assert augmentation("none", PREPROCESS) is None


@pytest.mark.parametrize(("name", "share"), [("minimal", 0.9), ("medium", 0.08), ("strong", 0.08), ("stochastic", 0.08), ("v0", 0.08)])
def test_the_smallest_crop_is_the_published_one_where_none_is_asked_for(name, share):
    assert augmentation(name, PREPROCESS).smallest == share


@pytest.mark.parametrize("smallest", [None, 0.5])
def test_medium_is_timms_default(smallest):
    """In all but resizing and the shade that fills up, which are the model's, and the smallest crop where one is asked for."""
    asked = {"scale": smallest and (smallest, 1.0), "interpolation": PREPROCESS.interpolation, "mean": PREPROCESS.mean}
    theirs = create_transform(16, is_training=True, normalize=False, **asked)
    medium = augmentation("medium", PREPROCESS, smallest_crop=smallest)
    for seed in range(20):
        with seeded(seed):
            wanted = theirs(to_pil_image(IMAGE))
        assert torch.equal(medium(IMAGE, seed), wanted)


def test_the_smallest_crop_is_obeyed():
    plain = torch.arange(30, dtype=torch.uint8).expand(3, 21, 30) * 8
    whole = augmentation("minimal", PREPROCESS, smallest_crop=1.0)
    spans = [int(image[0].float().amax() - image[0].float().amin()) for image in (whole(plain, seed) for seed in range(20))]
    tiny = augmentation("minimal", PREPROCESS, smallest_crop=0.05)
    cut = [int(image[0].float().amax() - image[0].float().amin()) for image in (tiny(plain, seed) for seed in range(20))]
    assert min(spans) > 150
    assert min(cut) < 100


def ours(height, width, smallest, seed):
    return Crop(PREPROCESS, smallest).box(height, width, random.Random(seed))


def in_timm(height, width, smallest, seed):
    timms = RandomResizedCropAndInterpolation.get_params
    with seeded(seed):
        return TimmPolicy(PREPROCESS, smallest, None)._box(timms, Image.new("L", (width, height)), (smallest, 1.0), (3 / 4, 4 / 3))


@pytest.mark.parametrize("box", [ours, in_timm])
@settings(max_examples=200)
@given(height=st.integers(1, 600), width=st.integers(1, 600), smallest=st.floats(0.01, 1.0), seed=st.integers(0, 2**63))
def test_no_crop_is_below_the_share_or_outside_the_image(box, height, width, smallest, seed):
    top, left, tall, wide = box(height, width, smallest, seed)
    assert tall * wide >= smallest * height * width
    assert 0 <= top <= height - tall
    assert 0 <= left <= width - wide


@pytest.mark.parametrize("name", ["minimal", "rand-m1-n0"])
def test_a_long_image_keeps_its_share_too(name):
    """800 pixels by 8 from black to white: a crop no wider than 4:3 would be of one grey."""
    ramp = torch.linspace(0, 255, 800).to(torch.uint8).expand(3, 8, 800)
    augment = augmentation(name, PREPROCESS, smallest_crop=0.9)
    assert min(int(image.max()) - int(image.min()) for image in (augment(ramp, seed) for seed in range(20))) > 200


def test_a_crop_is_as_wide_as_torchvision_allows_where_the_share_does_not_need_more():
    assert Crop(PREPROCESS, 0.1).box(30, 3000, random.Random(0))[2:] == (30, 300)  # the share needs more than 4:3
    assert Crop(PREPROCESS, 0.9).box(333, 500, random.Random(0))[2:] == (333, 450)
    square = [Crop(PREPROCESS, 0.5).box(100, 100, random.Random(seed)) for seed in range(50)]
    assert all(3 / 4 - 0.02 < wide / tall < 4 / 3 + 0.02 for _, _, tall, wide in square)
    assert len(set(square)) == 50


def test_magnitudes_above_ten_are_real_and_every_operation_is_applied():
    def drawn(name):
        augment = augmentation(name, PREPROCESS, smallest_crop=1.0)
        return torch.stack([augment(IMAGE, seed) for seed in range(40)])

    ten, fifteen = drawn("rand-m10-n2-p1-mmax20"), drawn("rand-m15-n2-p1-mmax20")
    assert (ten != fifteen).flatten(1).any(dim=1).float().mean() > 0.5
    assert torch.equal(drawn("strong"), fifteen)
    untouched = drawn("rand-m10-n0")
    changed = [(drawn(name) != untouched).flatten(1).any(dim=1).float().mean() for name in ("rand-m15-n1-mmax15", "rand-m15-n1-p1-mmax15")]
    assert changed[0] < 0.75 < changed[1]


def test_stochastic_reaches_every_magnitude_of_the_paper():
    policies = [one.policy for one in augmentation("stochastic", PREPROCESS)._levels.values()]
    made = [TimmPolicy(PREPROCESS, 0.08, policy)._transform.transforms[2].ops[0] for policy in policies]
    assert {(op.magnitude, op.prob, op.magnitude_max) for op in made} == {(m, 1.0, 20) for m in range(21)}


def test_stochastic_draws_every_magnitude_and_number_of_operations(monkeypatch):
    asked: list[tuple[str | None, int]] = []
    monkeypatch.setattr(TimmPolicy, "__call__", lambda self, image, seed: asked.append((self.policy, seed)) or image)
    augment = augmentation("stochastic", PREPROCESS)
    for seed in range(2000):
        augment(IMAGE, seed)
    assert {policy for policy, _ in asked} == {f"rand-m{m}-n{n}-p1-mmax20" for m in range(21) for n in range(3)}
    assert len({seed for _, seed in asked}) == 2000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rand-9-n2", "has `9`, which timm's `rand` cannot read"),
        ("rand-m9n2", "has `m9n2`, which timm's `rand` cannot read"),
        ("rand-strong", "has `strong`, which"),
        ("rand-m9-tweighted", "has `tweighted`, which"),
        ("rand-m", "has `m`, which"),
        ("augmix-n2", "has `n2`, which timm's `augmix` cannot read"),
        ("v0-m5", "has `m5`, which timm's `v0` cannot read"),
        ("rand-m15-n2", "has magnitude 15 and timm cuts it down to 10; write `rand-m15-n2-mmax15`"),
        ("rand-m15-mmax12-n2", "cuts it down to 12; write `rand-m15-n2-mmax15`"),
    ],
)
def test_a_string_timm_would_misread_is_refused(name, said):
    with pytest.raises(BadRequest, match=said):
        augmentation(name, PREPROCESS)


@pytest.mark.parametrize("name", ["rand", "rand-m9-mstd0.5-inc1-tweights", "augmix-m5-w4-d2-b1-a0.5", "original-mstd0.5", "v0", "3a"])
def test_what_timm_can_read_is_taken(name):
    assert augmentation(name, PREPROCESS)(IMAGE, 1).shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["rand-m0-n2-p1-mmax20", "rand-m20-n2-p1-mmax20", "rand-m10-n2-p1-inc1", "v0", "augmix-m10", "stochastic"])
def test_every_operation_works_at_every_magnitude_and_posterising_keeps_a_bit(name):
    augment = augmentation(name, PREPROCESS)
    dark = [seed for seed in range(200) if not augment(IMAGE, seed).any()]
    assert dark == []


def test_seeding_leaves_the_global_generators_as_they_were():
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(3)
    random.seed(3)
    with seeded(99):
        torch.rand(5)
        random.random()
    assert (torch.rand(1), random.random()) == expected


@pytest.mark.parametrize("name", ["maximal", "", "no_such_package:augment", "random:no_such", "math:pi"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(BadRequest, match="augmentation"):
        augmentation(name, PREPROCESS)
