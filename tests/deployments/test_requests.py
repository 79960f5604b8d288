"""Promise: the ready-made requests are valid, and the random search draws exactly the published distribution."""

from pathlib import Path

import pytest
import yaml

from stockpot.config import RetrainRequest, SweepSpec
from stockpot.sweeps import draw

FOLDER = Path(__file__).parents[2] / "deployments" / "requests"


def request(name: str) -> RetrainRequest:
    return RetrainRequest.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_request_is_valid_and_draws_its_trials(path):
    spec = request(path.stem).sweep
    assert len(set(draw(spec))) == spec.trials + spec.init_as_ingredient


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


@pytest.mark.parametrize(("name", "trials", "rates"), [("standard_grid", 48, 4), ("extreme_grid", 97, 8), ("seeds", 5, 1)])
def test_the_grids_have_the_published_arms(name, trials, rates):
    drawn = draw(request(name).sweep)
    assert len(drawn) == trials
    assert len({one.learning_rate for one in drawn}) == rates
