"""Promise: the ready-made requests are valid, and the random search draws exactly the published distribution."""

import math
from itertools import product
from pathlib import Path

import pytest
import yaml

from stockpot.config import RetrainRequest, SweepSpec
from stockpot.spaces import Choice, IntUniform, LogUniform, Sometimes, Uniform
from stockpot.sweeps import draw

FOLDER = Path(__file__).parents[2] / "deployments" / "requests"


def request(name: str) -> RetrainRequest:
    return RetrainRequest.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_request_is_valid_and_draws_its_trials(path):
    spec = request(path.stem).sweep
    assert len(set(draw(spec))) == spec.trials + spec.init_as_ingredient


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


def test_the_seeds_differ_in_nothing_else():
    drawn = draw(request("seeds").sweep)
    assert [one.seed for one in drawn] == [0, 1, 2, 3, 4]
    assert len({one.model_copy(update={"seed": 0}) for one in drawn}) == 1
