"""Promise: the demo's base is as weak as it says, its augmentation keeps the digit, and the recorded table is what its seeds add up to."""

import json
import random
from collections import Counter

import pytest
import torch

from deployments.demo import augment, pretraining
from deployments.demo.control import RESULT, SCHEDULES, SEEDS, summary
from deployments.demo.digits import CLASSES
from deployments.demo.pretraining import caption, contrast
from tests.tiny_data import publish_tiny


def test_captions_are_as_noisy_as_stated():
    rng = random.Random(0)
    said = Counter()
    for _ in range(4000):
        text = caption(7, CLASSES, rng)
        said["right" if "seven" in text else "parity" if "odd digit" in text else "wrong"] += 1
    assert said["parity"] / 4000 == pytest.approx(0.50, abs=0.03)
    assert said["wrong"] / 4000 == pytest.approx(0.15 * 0.9, abs=0.03)


def test_a_base_is_found_by_what_decides_it(node, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(pretraining, "train", lambda pinned, seed: trained.append(seed) or torch.nn.Linear(2, 2))
    data = {"pretrain": publish_tiny(f"{tmp_path}/data", splits="train").uri}
    first = pretraining.pretrain(data, f"{tmp_path}/bases", 1)
    assert pretraining.pretrain(data, f"{tmp_path}/bases", 1) == first
    assert trained == [1]
    monkeypatch.setattr(pretraining, "RECIPE", [*pretraining.RECIPE, "another"])
    assert pretraining.pretrain(data, f"{tmp_path}/bases", 1) == first  # the address stays, as requests name it; what lies there is new
    assert trained == [1, 1]
    pretraining.pretrain(data, f"{tmp_path}/bases", 2)
    assert trained == [1, 1, 2]


def test_contrast_is_lowest_where_pairs_agree():
    features = torch.eye(4)
    agreed, crossed = (contrast(features, texts, torch.tensor(14.0)) for texts in (features, features.flip(0)))
    assert agreed < 0.01 < crossed


@pytest.mark.parametrize("move", [augment.mild, augment.medium])
def test_augmentation_moves_a_picture_a_little(move):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    image[:, 2:6, 2:6] = 255
    moved = torch.stack([move(image, seed, 32)[0] for seed in range(20)])
    assert moved.shape == (20, 32, 32)
    assert moved[:, 14:18, 14:18].float().mean() > 200  # the middle stays bright
    assert moved[:, :2, :2].float().mean() < 20  # the corner stays dark
    assert len({one.numpy().tobytes() for one in moved}) == 20


def test_the_recorded_table_is_the_sum_of_its_seeds():
    recorded = json.loads(RESULT.read_text())
    assert sorted(map(int, recorded["seeds"])) == sorted(SEEDS)
    assert recorded == summary(recorded["seeds"])
    assert set(recorded["mean"]) == set(SCHEDULES)
