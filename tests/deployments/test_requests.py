"""Promise: the ready-made requests are valid, name only what exists, and their sweeps are the published ones: the distribution of the
random search, every cell of a grid, and each value that Wortsman et al. 2022 (arXiv:2203.05482) give for the other backbones."""

import copy
import math
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from stockpot.config import TEXT_PREFIX, RetrainRequest, SweepSpec
from stockpot.data.snapshots import open_snapshot
from stockpot.models.bases import load_base, require_known
from stockpot.models.classifier import build
from stockpot.preparation import Preprocess
from stockpot.spaces import Choice, IntUniform, LogUniform, Sometimes, Uniform
from stockpot.sweeps import UNTRAINED, allotted, draw
from stockpot.training.augmentation import augmentation
from stockpot.training.course import fine_tune
from tests.tiny_texts import BERT, TOPICS, encoder, publish_texts

FOLDER = Path(__file__).parents[2] / "deployments" / "requests"


def request(name: str) -> RetrainRequest:
    return RetrainRequest.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_request_is_valid_and_draws_its_trials(path):
    asked = request(path.stem)
    trials = {settings for settings, _ in allotted(asked)}  # refuses a batch that the GPUs of a trial cannot share
    assert len(trials) == asked.sweep.trials + asked.sweep.init_as_ingredient
    require_known(asked.base)
    pictures = Preprocess(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    for name in {name for one in trials for name in (one.augmentation, one.last_epoch_augmentation) if name}:
        augmentation(name, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_trials_of_every_request_can_be_trained(path, ground, node, tmp_path):
    """The first eight of each, on tiny pictures or texts, made short: whatever they combine goes together."""
    asked, model, data = request(path.stem), build(ground.config), ground.data.snapshot
    if asked.base.arch.startswith(TEXT_PREFIX):
        data = publish_texts(f"{tmp_path}/texts")
        model = build(load_base(encoder(tmp_path, BERT)).config(TOPICS))
    for settings in draw(asked.sweep)[:8]:
        short = {"batch_size": 20, "epochs": 1, "max_steps": settings.max_steps and 3, "warmup_steps": 1}
        evaluated = settings.evaluate_every_steps and 2
        candidates = fine_tune(
            copy.deepcopy(model), settings.model_copy(update={**short, "evaluate_every_steps": evaluated}), open_snapshot(data)
        )
        assert candidates.keys() == {0.0, *settings.ema_decays}
        assert all(torch.isfinite(tensor).all() for one in candidates.values() for tensor in one.weights.values())


def test_the_random_search_has_the_published_space():
    """Wortsman et al. 2022 (arXiv:2203.05482), appendix J.2.1: rate 10^-U(4, 6), decay 10^-U(0.2, 4), smoothing 0 or U(0, 0.25), 4 to 16
    epochs, mixup 0 or U(0, 0.9), RandAugment with M of 0 to 20 and N of 0 to 2. How often minimal is drawn is said by the authors' record
    of their runs, hparam_info.json: a third."""
    space = request("random_search").sweep.space
    augmentation, decay = space.pop("augmentation"), space.pop("weight_decay")
    assert space == {
        "learning_rate": LogUniform(log_uniform=(1e-6, 1e-4)),
        "label_smoothing": Sometimes(probability=0.5, value=0, otherwise=Uniform(uniform=(0, 0.25))),
        "epochs": IntUniform(int_uniform=(4, 16)),
        "mixup": Sometimes(probability=0.5, value=0, otherwise=Uniform(uniform=(0, 0.9))),
    }
    assert isinstance(decay, LogUniform)
    assert [math.log10(bound) for bound in decay.log_uniform] == pytest.approx([-4, -0.2])
    assert isinstance(augmentation, Sometimes)
    assert (augmentation.probability, augmentation.value) == (pytest.approx(1 / 3), "minimal")
    assert isinstance(augmentation.otherwise, Choice)
    assert sorted(augmentation.otherwise.choice) == sorted(f"rand-m{m}-n{n}-p1-mmax20" for m in range(21) for n in range(3))


def many(count: int = 1000) -> list:
    return list(draw(SweepSpec(**{**request("random_search").sweep.model_dump(), "trials": count})))


def test_the_random_search_stays_in_the_published_ranges():
    for one in many():
        assert 1e-6 <= one.learning_rate <= 1e-4
        assert 1e-4 <= one.weight_decay <= 10**-0.2
        assert 0 <= one.label_smoothing <= 0.25
        assert 4 <= one.epochs <= 16
        assert 0 <= one.mixup <= 0.9
        assert one.augmentation == "minimal" or one.augmentation in {f"rand-m{m}-n{n}-p1-mmax20" for m in range(21) for n in range(3)}
        assert (one.optimiser, one.schedule, one.batch_size, one.warmup_steps, one.clip_norm) == ("adamw", "cosine", 512, 500, 1.0)


def test_the_random_search_switches_off_as_often_as_published():
    """Half of the published runs have no mixup, half no smoothing (39 of 71 each), a third minimal augmentation (27 of 71)."""
    drawn = many()
    assert sum(one.mixup == 0 for one in drawn) / 1000 == pytest.approx(1 / 2, abs=0.05)
    assert sum(one.label_smoothing == 0 for one in drawn) / 1000 == pytest.approx(1 / 2, abs=0.05)
    assert sum(one.augmentation == "minimal" for one in drawn) / 1000 == pytest.approx(1 / 3, abs=0.05)
    assert {one.epochs for one in drawn} == set(range(4, 17))


STANDARD = (3e-5, 2e-5, 1e-5, 3e-6)
"""Learning rates of the paper's standard grid (arXiv:2203.05482); the extreme grid adds the other four."""


@pytest.mark.parametrize(("name", "rates"), [("standard_grid", STANDARD), ("extreme_grid", (3e-4, 1e-4, *STANDARD, 1e-6, 1e-7))])
def test_the_grids_are_the_published_ones(name, rates):
    spec = request(name).sweep
    trials = [one for one in draw(spec) if one.max_steps != 0]  # but for the init
    arms = [(one.learning_rate, one.augmentation, one.mixup, one.seed) for one in trials]
    assert sorted(arms) == sorted(product(rates, ("minimal", "medium", "strong"), (0, 0.5), (0, 1)))
    assert spec.init_as_ingredient == (name == "extreme_grid")
    for one in trials:
        assert (one.optimiser, one.schedule, one.epochs, one.batch_size, one.warmup_steps, one.clip_norm) == (
            "adamw", "cosine", 10, 512, 500, 1.0,
        )  # fmt: skip


def test_the_small_one_downloads_nothing_and_is_small():
    asked = request("small")
    assert (asked.base.weights, asked.init.head) == (None, "random")
    assert sum(tensor.numel() for tensor in load_base(asked.base).tower.values()) < 1e6
    assert asked.sweep.trials * max(one.epochs for one in draw(asked.sweep)) <= 50


def test_the_seeds_differ_in_nothing_else():
    drawn = draw(request("seeds").sweep)
    assert [one.seed for one in drawn] == [0, 1, 2, 3, 4]
    assert len({one.model_copy(update={"seed": 0}) for one in drawn}) == 1


class Published(NamedTuple):
    """What the paper says of a sweep."""

    section: str
    trials: int
    values: dict[str, set[Any]]
    """All that the trials together have in a setting."""


PUBLISHED = {
    "text_search": Published(
        "3.3.3, BERT and T5 on four tasks of GLUE",
        32,
        {
            "optimiser": {"adam"},
            "schedule": {"linear"},
            "weight_decay": {0.0},
            "batch_size": {8, 16, 32, 64},
            "epochs": {2, 3, 5},
            "augmentation": {"none"},
        },
    ),
    "vit_g": Published(
        "3.3.2, ViT-G/14",
        58,
        {
            "optimiser": {"adafactor"},
            "batch_size": {512},
            "max_steps": {10_000, 20_000},
            "schedule": {"constant", "cosine"},
            "loss": {"cross_entropy", "binary_cross_entropy"},
            "smallest_crop": {0.05, 0.7, 0.9, 1.0},
            "evaluate_every_steps": {1000},
            "ema_decays": {(0.999, 0.9999999)},
        },
    ),
    "basic_l": Published("BASIC-L: 2 rates by 10 augmentations", 20, {"batch_size": {64}, "epochs": {8}}),
    "efficientnet_l2": Published("3.3.1, ALIGN", 12, {"optimiser": {"adamw"}}),
}
"""By request, from arXiv:2203.05482; ranges are tested one by one."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_sweep_has_the_published_trials_and_values(name):
    published, spec = PUBLISHED[name], request(name).sweep
    trials = draw(spec)[: spec.trials]  # the init comes last
    assert len(trials) == published.trials
    assert {field: {getattr(one, field) for one in trials} for field in published.values} == published.values


def test_texts_are_searched_and_cut_as_published():
    """Rates log-uniform between 1e-6 and 1e-3, 128 tokens, and CoLA's metric, the Matthews correlation."""
    asked = request("text_search")
    assert asked.sweep.space.pop("learning_rate") == LogUniform(log_uniform=(1e-6, 1e-3))
    assert asked.sweep.space.keys() == {"batch_size", "epochs"}
    assert all(1e-6 <= one.learning_rate <= 1e-3 for one in draw(request("text_search").sweep))
    assert (asked.base.max_tokens, asked.soup.metric) == (128, "mcc")


def test_the_pool_of_vit_g_has_all_that_was_varied_together_and_apart():
    """RandAugment, mixup, CutMix and SAM: trials with each of them and without."""
    trials = draw(request("vit_g").sweep)
    assert {one.augmentation.startswith("rand-") for one in trials} == {True, False}
    for field in ("mixup", "cutmix", "sam_rho"):
        assert {getattr(one, field) > 0 for one in trials} == {True, False}


def test_basic_l_is_two_rates_by_ten_augmentations_with_averages_of_its_batch_size():
    """A decay per step of a smaller batch is the root that gives the same decay per image."""
    trials = draw(request("basic_l").sweep)
    rates = {one.learning_rate for one in trials}
    arms = {(one.augmentation, one.last_epoch_augmentation) for one in trials}
    assert (len(rates), len(arms)) == (2, 10)
    assert {(one.learning_rate, one.augmentation, one.last_epoch_augmentation) for one in trials} == {
        (rate, *arm) for rate, arm in product(rates, arms)
    }
    for one in trials:
        assert [1 - decay for decay in one.ema_decays] == pytest.approx([1 - wide ** (64 / 512) for wide in (0.999, 0.9999999)], rel=1e-5)


def test_align_is_a_grid_over_rate_augmentation_and_mixup_with_its_init():
    spec = request("efficientnet_l2").sweep
    *trials, init = draw(spec)
    assert spec.grid.keys() == {"learning_rate", "augmentation", "mixup"}
    assert (len(trials), init) == (12, UNTRAINED)
    assert {one.learning_rate for one in trials} < {*STANDARD}


def test_wilds_is_the_random_search_on_batches_of_128():
    wilds, search = request("wilds"), request("random_search").sweep
    assert wilds.base.arch == "ViT-L-14"
    assert wilds.sweep == search.model_copy(update={"settings": search.settings.model_copy(update={"batch_size": 128})})
    assert wilds.data.shifts and wilds.soup.metric == "macro_f1"


def test_imagenet_22k_is_searched_as_the_standard_grid():
    assert request("imagenet22k").sweep == request("standard_grid").sweep


def test_a_soup_across_datasets_trains_nothing_and_borrows_bodies_for_a_head_of_text():
    asked = request("across_datasets")
    assert draw(asked.sweep) == (UNTRAINED,), "the init, evaluated once whatever sweep asks for it"
    assert (asked.init.head, asked.init.freeze_head) == ("zero_shot", True)
    assert asked.soup.bodies_of
