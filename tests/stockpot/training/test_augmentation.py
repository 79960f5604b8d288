"""Promise: the seed alone decides an augmentation, output has the model's size, and a loader process can have every one of them."""

import pickle
import random

import numpy as np
import pytest
import torch

from stockpot.errors import BadRequest
from stockpot.preparation import Preprocess
from stockpot.training.augmentation import augmentation, seeded

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


def test_the_smallest_crop_is_obeyed():
    plain = torch.arange(30, dtype=torch.uint8).expand(3, 21, 30) * 8
    whole = augmentation("minimal", PREPROCESS, smallest_crop=1.0)
    spans = [int(image[0].float().amax() - image[0].float().amin()) for image in (whole(plain, seed) for seed in range(20))]
    tiny = augmentation("minimal", PREPROCESS, smallest_crop=0.05)
    cut = [int(image[0].float().amax() - image[0].float().amin()) for image in (tiny(plain, seed) for seed in range(20))]
    assert min(spans) > 150
    assert min(cut) < 100


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
