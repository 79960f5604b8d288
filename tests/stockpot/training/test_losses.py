"""Promise: mixing keeps its books, losses equal their definitions, and a loss of the user's own is called by name."""

import random

import pytest
import torch
from torch.nn import functional

from stockpot.errors import BadRequest
from stockpot.settings import TrialSettings
from stockpot.training.losses import cross_entropy, loss_function, mix, partners, targets

LABELS = torch.tensor([0, 1, 2, 1])
PARTNERS = partners(LABELS)


def doubled(logits_BC, targets_BC):
    """A loss of the user's own."""
    return 2 * functional.cross_entropy(logits_BC, targets_BC)


def test_nothing_is_mixed_by_default():
    images = torch.rand(4, 3, 8, 8)
    mixed, share = mix(images, TrialSettings(), random.Random(0))
    assert share == 1.0
    assert mixed is images


def test_mixup_is_a_weighted_mean_with_the_partners():
    images = torch.rand(4, 3, 8, 8)
    mixed, share = mix(images, TrialSettings(mixup=0.5), random.Random(1))
    assert 0 < share < 1
    assert torch.allclose(mixed, share * images + (1 - share) * partners(images))


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_reports_the_exact_share_of_pixels_kept(seed):
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 9, 7)
    mixed, share = mix(images, TrialSettings(cutmix=1.0), random.Random(seed))
    for number in range(4):
        assert (mixed[number] == images[number]).float().mean().item() == pytest.approx(share, abs=1e-6)
        assert set(mixed[number].unique().tolist()) <= {float(number), float((number + 2) % 4)}


def test_both_switched_on_take_turns():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    kinds = {len(mix(images, TrialSettings(mixup=1.0, cutmix=1.0), random.Random(seed))[0][0].unique()) for seed in range(30)}
    assert kinds == {1, 2}


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_the_one_against_mixed_smoothed_targets(share, smoothing):
    logits = torch.randn(4, 3)
    soft = targets(LABELS, PARTNERS, share, classes=3, smoothing=smoothing)
    assert torch.allclose(soft.sum(1), torch.ones(4))
    found = cross_entropy(logits, LABELS, PARTNERS, share, smoothing=smoothing)
    assert torch.allclose(found, functional.cross_entropy(logits, soft), atol=1e-6)


def test_binary_cross_entropy_is_summed_over_classes():
    logits = torch.randn(4, 3)
    found = loss_function(TrialSettings(loss="binary_cross_entropy"))(logits, LABELS, PARTNERS, 1.0)
    probabilities, ones = logits.sigmoid(), functional.one_hot(LABELS, 3)
    assert torch.allclose(found, -(ones * probabilities.log() + (1 - ones) * (1 - probabilities).log()).sum(1).mean(), atol=1e-5)


def test_a_loss_of_ones_own_is_called_by_name(monkeypatch):
    monkeypatch.setattr("random.doubled", doubled, raising=False)  # any importable module will do
    logits = torch.randn(4, 3)
    found = loss_function(TrialSettings(loss="random:doubled"))(logits, LABELS, PARTNERS, 1.0)
    assert torch.allclose(found, 2 * functional.cross_entropy(logits, LABELS), atol=1e-6)


@pytest.mark.parametrize("name", ["hinge", "no_such_package:loss", "random:no_such_loss", "math:pi"])
def test_an_unknown_loss_is_refused_by_name(name):
    with pytest.raises(BadRequest, match=f"There is no loss `{name}`"):
        loss_function(TrialSettings(loss=name))
