"""Promise: the same request and seed draw the same trials anywhere; more trials keep the first ones; no trial is drawn twice."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stockpot.config import RetrainRequest, SweepSpec
from stockpot.errors import BadRequest
from stockpot.sweeps import allotted, draw, plan
from tests.requests_for_tests import DATA, INIT, REQUEST

SPACE = {
    "learning_rate": {"log_uniform": [1e-6, 1e-4]},
    "epochs": {"int_uniform": [4, 16]},
    "mixup": {"probability": 0.5, "value": 0, "otherwise": {"uniform": [0.0, 0.9]}},
    "augmentation": {"choice": ["minimal", "strong"]},
}


@given(seed=st.integers(0, 10_000), few=st.integers(1, 10), more=st.integers(0, 10))
def test_more_trials_keep_the_ones_already_drawn(seed, few, more):
    first = draw(SweepSpec(trials=few, seed=seed, space=SPACE))
    assert draw(SweepSpec(trials=few + more, seed=seed, space=SPACE))[:few] == first


@given(seed=st.integers(0, 10_000))
def test_draws_stay_in_their_space(seed):
    for settings in draw(SweepSpec(trials=5, seed=seed, space=SPACE)):
        assert 1e-6 <= settings.learning_rate <= 1e-4
        assert 4 <= settings.epochs <= 16
        assert settings.mixup == 0 or 0 < settings.mixup <= 0.9
        assert settings.augmentation in ("minimal", "strong")


def test_the_drawn_values_are_frozen():
    """Recorded on one machine: another machine, Python or release must draw the same."""
    request = RetrainRequest.model_validate({**REQUEST, "sweep": {"trials": 1, "seed": 0, "space": SPACE}})
    (trial,) = plan(request, DATA, INIT).trials
    drawn = {name: getattr(trial.settings, name) for name in SPACE}
    assert drawn == {"learning_rate": 1.65075e-05, "epochs": 9, "mixup": 0.0618019, "augmentation": "minimal"}
    assert trial.id == "e435cd52a42b"  # changes with a new field of the settings, knowingly: every trial is then another one


def test_log_uniform_spends_equal_shares_on_every_decade():
    rates = [settings.learning_rate for settings in draw(SweepSpec(trials=400, seed=1, space=SPACE))]
    assert 0.4 < sum(rate < 1e-5 for rate in rates) / len(rates) < 0.6
    assert math.isclose(sum(map(math.log10, rates)) / len(rates), -5, abs_tol=0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"soup": {"minimum": 9}}, "`soup.minimum` is 9 and the sweep leaves 8 ingredients at the most"),
        ({"gate": {"suite_tolerances": {"blure": 0.1}}}, "names blure, and the suites of `data.shifts` are none; correct the name"),
    ],
)
def test_what_a_sweep_cannot_come_to_is_refused_when_it_is_asked_for_and_can_be_read_where_it_was(change, said):
    asked = RetrainRequest.model_validate({**REQUEST, **change})
    with pytest.raises(BadRequest, match=said):
        allotted(asked)


def test_a_space_with_too_few_trials_is_refused():
    with pytest.raises(BadRequest, match=r"Trial \d of the sweep equals trial \d"):
        draw(SweepSpec(trials=3, space={"seed": {"choice": [1, 2]}, "mixup": {"choice": [0]}}))


def test_an_impossible_draw_names_trial_and_field():
    with pytest.raises(BadRequest, match=r"drew -1.* for `epochs` in trial 0"):
        draw(SweepSpec(trials=1, space={"epochs": {"choice": [-1]}}))
    with pytest.raises(BadRequest, match=r"drew 'adamv' for `optimiser` in trial 0: Input should be 'adamw'"):
        draw(SweepSpec(trials=1, space={"optimiser": {"choice": ["adamv"]}}))
    with pytest.raises(BadRequest, match=r"does not fit together in trial 0: .*ema_decays \[0.9, 0.9\] has a decay twice"):
        draw(SweepSpec(trials=1, space={"ema_decays": {"choice": [[0.9, 0.9]]}}))


def test_trial_ids_depend_on_content_only():
    request = RetrainRequest.model_validate({**REQUEST, "sweep": {"trials": 4, "space": SPACE}})
    other_store = request.model_copy(update={"store": "s3://elsewhere/store"})
    ids = [trial.id for trial in plan(request, DATA, INIT).trials]
    assert len(set(ids)) == 4
    assert [trial.id for trial in plan(other_store, DATA, INIT).trials] == ids


def test_a_trial_on_other_data_or_from_another_init_is_another_trial():
    request = RetrainRequest.model_validate({**REQUEST, "sweep": {"trials": 1}})
    other_data = DATA.model_copy(update={"snapshot": DATA.snapshot.model_copy(update={"digest": "c" * 64})})
    other_init = INIT.model_copy(update={"digest": "c" * 64})
    ids = [plan(request, data, init).trials[0].id for data, init in [(DATA, INIT), (other_data, INIT), (DATA, other_init)]]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(("settings", "multiple"), [({"batch_size": 9}, 2), ({"batch_size": 6, "mixup": 0.3}, 4)])
def test_a_batch_its_gpus_cannot_share_is_refused(settings, multiple):
    request = RetrainRequest.model_validate({**REQUEST, "sweep": {"trials": 1, "settings": settings}, "fan_out": {"gpus": 2}})
    with pytest.raises(BadRequest, match=f"make `batch_size` a multiple of {multiple}"):
        plan(request, DATA, INIT)


@pytest.mark.parametrize("setting", [{"compile": True}, {"optimiser": "adafactor"}])
def test_a_trial_that_needs_whole_matrices_is_refused_where_gpus_share_the_model(setting):
    fan_out = {"gpus": 2, "sharded": True}
    request = RetrainRequest.model_validate({**REQUEST, "sweep": {"trials": 1, "settings": setting}, "fan_out": fan_out})
    with pytest.raises(BadRequest, match=r"Trial 0 has `.*`, which needs whole matrices"):
        plan(request, DATA, INIT)


def test_gpus_change_no_trial_and_an_untrained_init_needs_one():
    alone, together = (
        plan(RetrainRequest.model_validate({**REQUEST, "sweep": {"trials": 1, "init_as_ingredient": True}, "fan_out": fan_out}), DATA, INIT)
        for fan_out in ({}, {"gpus": 4, "sharded": True})
    )
    assert [trial.id for trial in alone.trials] == [trial.id for trial in together.trials]
    assert [(trial.gpus, trial.sharded) for trial in together.trials] == [(4, True), (1, False)]


def test_a_grid_is_every_combination_once():
    spec = SweepSpec(trials=6, grid={"learning_rate": [1e-5, 1e-6, 1e-7], "seed": [4, 5]}, space={"mixup": {"uniform": [0.1, 0.2]}})
    drawn = draw(spec)
    assert [(one.learning_rate, one.seed) for one in drawn] == [(rate, seed) for rate in (1e-5, 1e-6, 1e-7) for seed in (4, 5)]
    assert len({one.mixup for one in drawn}) == 6


DEPENDING = {
    "learning_rate": {"given": "optimiser", "cases": {"sgd": {"log_uniform": [1e-2, 1e-1]}, "adamw": {"log_uniform": [1e-6, 1e-5]}}},
    "optimiser": {"choice": ["sgd", "adamw"]},
    "sam_rho": {"probability": 0.5, "value": 0, "otherwise": {"given": "schedule", "cases": {"cosine": {"choice": [0.1]}}}},
}


def test_a_field_may_depend_on_another_drawn_fixed_or_in_the_grid():
    drawn = draw(SweepSpec(trials=40, space=DEPENDING))
    assert all((1e-2 <= one.learning_rate <= 1e-1) == (one.optimiser == "sgd") for one in drawn)
    assert {one.optimiser for one in drawn} == {"sgd", "adamw"}
    assert {one.sam_rho for one in drawn} == {0, 0.1}
    grid = {"optimiser": ["sgd", "adamw"]}
    cells = draw(SweepSpec(trials=2, grid=grid, space={"learning_rate": DEPENDING["learning_rate"]}))
    assert [one.learning_rate >= 1e-2 for one in cells] == [True, False]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"mixup": {"given": "optimiser", "cases": {"sgd": {"choice": [0]}}}}, "`mixup` has no case for `optimiser` adamw; it has sgd"),
        (
            {
                "mixup": {"given": "cutmix", "cases": {"0": {"choice": [0]}}},
                "cutmix": {"given": "mixup", "cases": {"0": {"choice": [0]}}},
            },
            "`mixup` and `cutmix` depend on each other",
        ),
    ],
)
def test_what_depends_on_nothing_is_refused(space, said):
    with pytest.raises(BadRequest, match=said):
        draw(SweepSpec(trials=1, space=space))


def test_a_field_that_decides_must_exist():
    with pytest.raises(ValidationError, match="`optimizer` is no trial setting"):
        SweepSpec(space={"mixup": {"given": "optimizer", "cases": {"sgd": {"choice": [0]}}}})


def test_the_init_is_one_more_trial_the_same_for_every_sweep():
    few, other = (draw(SweepSpec(trials=2, seed=seed, space=SPACE, init_as_ingredient=True)) for seed in (0, 1))
    assert few[:-1] == draw(SweepSpec(trials=2, space=SPACE))
    assert few[-1] == other[-1]
    assert few[-1].max_steps == 0
    assert few[-1].augmentation == "none"  # which images and texts both know


@pytest.mark.parametrize("spec", [{"trials": 2}, {"trials": 1, "init_as_ingredient": True}])
def test_the_init_itself_is_no_second_trial(spec):
    assert len(draw(SweepSpec(trials=1, settings={"max_steps": 0}))) == 1
    with pytest.raises(BadRequest, match=r"Trials 0 and 1 of the sweep have `max_steps: 0`.*`init_as_ingredient: true`"):
        draw(SweepSpec(settings={"max_steps": 0}, **spec))


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"seed": [1, 2]}, "the grid has 2 combinations and `trials` is 6; write `trials: 2`"),
        ({"colour": [1]}, "`colour` is no trial setting"),
        ({"seed": []}, "at least 1 item"),
        ({"mixup": [0, 0.5]}, "`mixup` is in the space and in the grid"),
    ],
)
def test_an_impossible_grid_is_one_sentence(grid, said):
    with pytest.raises(ValidationError, match=said):
        SweepSpec(trials=6, grid=grid, space={"mixup": {"uniform": [0.1, 0.2]}})
