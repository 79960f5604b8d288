"""Guards: what one more trial is expected to add follows from the stored logits alone, as the mean of greedy ensembles over choices of
trials, and a decision stands for the rule it was taken by."""

from pathlib import Path
from statistics import mean
from uuid import uuid4

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stockpot.config import StopSpec, Sweep
from stockpot.evaluation import accuracy
from stockpot.fields import Metric
from stockpot.ledger import tracking
from stockpot.ledger.connection import client
from stockpot.soup import sufficiency
from stockpot.soup.recipes.ensemble import ensemble, greedy_ensemble
from stockpot.soup.sufficiency import ensembles, judge
from tests.tiny_sweep import Ground, finish_trials, tiny_sweep


def told(seed: int, trials: int, averages: int = 0) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Logits of 40 samples in 4 classes, whole numbers so that sums are exact, with as many moving averages a trial."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, 4, 40))
    made = [
        {f"{number}-{place}": torch.from_numpy(rng.integers(-3, 4, (40, 4)).astype(np.float32)) for place in range(1 + averages)}
        for number in range(trials)
    ]
    return made, labels


def naive(trials: list[dict[str, Tensor]], labels: Tensor, metric: Metric) -> float:
    """What the greedy ensemble scores, by the comparison's own recipe in float64."""
    logits = {name: one for trial in trials for name, one in trial.items()}
    return accuracy(ensemble(logits, greedy_ensemble(logits, labels, metric=metric)), labels, metric).value


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), trials=st.integers(1, 9), averages=st.integers(0, 2), metric=st.sampled_from(["accuracy", "macro_f1"]))
def test_every_point_is_the_greedy_ensembles_mean_over_choices(seed: int, trials: int, averages: int, metric: Metric) -> None:
    made, labels = told(seed, trials, averages)
    found = ensembles(made, labels, metric=metric)
    assert [count for count, _ in found] == sufficiency.marginal.sizes(trials)
    for count, mean_score in found:
        picked = [naive([made[place] for place in some], labels, metric) for some in sufficiency._choices(trials, count)]
        assert mean_score.value == pytest.approx(mean(picked))


def test_the_same_model_again_and_again_is_worth_nothing_more() -> None:
    made, labels = told(1, 1)
    again = [{f"{number}": made[0]["0-0"]} for number in range(8)]
    assert len({score.value for _, score in ensembles(again, labels)}) == 1


def test_a_sweep_is_judged_from_stored_logits_fetched_once(ground: Ground, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, f"sufficiency-{uuid4().hex[:8]}", trials=5)
    made = finish_trials(ground, sweep, tmp_path, noise=0.2, only=(0, 1, 3))
    folder = tmp_path / "logits"
    assert judge(sweep, StopSpec(below=0.9, after=4), folder) is None, "one more trial must finish first"
    found = judge(sweep, StopSpec(below=0.9, after=2), folder)
    assert found is not None
    assert [point.trials for point in found.curve] == [1, 2, 3]
    assert [point.accelerator_hours * 3600 for point in found.curve] == pytest.approx([1, 2, 3])
    fetched = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert [path.name for path in fetched] == ["held_out.safetensors"] * 3, "no weights were fetched"
    assert judge(sweep, found.rule, folder) == found
    assert {path: path.stat().st_mtime_ns for path in fetched} == fetched, "nor anything twice"

    assert tracking.read_enough(sweep) is None
    tracking.record_enough(sweep.id, found)
    assert tracking.read_enough(asking(sweep, found.rule)) == found
    assert tracking.read_enough(asking(sweep, StopSpec(below=0.8, after=2))) is None, "another rule asks again"
    run = tracking.open_sweep(asking(sweep, found.rule))
    assert client().get_run(run).data.tags["mlflow.note.content"] == found.reason

    (folder / made[1].model_id / "held_out.safetensors").write_bytes(b"changed")
    less = judge(sweep, found.rule, folder)
    assert less is not None
    assert less.curve[-1].trials == 2, "an ingredient whose logits changed is left out"


def asking(sweep: Sweep, rule: StopSpec) -> Sweep:
    request = sweep.request
    return sweep.model_copy(update={"request": request.model_copy(update={"fan_out": request.fan_out.model_copy(update={"stop": rule})})})
