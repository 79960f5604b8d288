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

from stockpot.checkpoints import load_weights
from stockpot.config import SoupSpec, StopSpec, Sweep
from stockpot.evaluation import accuracy
from stockpot.fields import Metric
from stockpot.ledger import tracking
from stockpot.ledger.connection import client
from stockpot.soup import sufficiency
from stockpot.soup.recipes.ensemble import ensemble, greedy_ensemble
from stockpot.soup.recipes.greedy import Accept
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


def naive(trials: list[dict[str, Tensor]], labels: Tensor, metric: Metric, accept: Accept = "improve") -> float:
    """What the greedy ensemble scores, by the comparison's own recipe in float64."""
    logits = {name: one for trial in trials for name, one in trial.items()}
    return accuracy(ensemble(logits, greedy_ensemble(logits, labels, accept, metric)), labels, metric).value


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), trials=st.integers(1, 9), averages=st.integers(0, 2), metric=st.sampled_from(["accuracy", "macro_f1"]),
    accept=st.sampled_from(["improve", "not_worse"]),
)  # fmt: skip
def test_every_point_is_the_greedy_ensembles_mean_over_choices(
    seed: int, trials: int, averages: int, metric: Metric, accept: Accept
) -> None:
    made, labels = told(seed, trials, averages)
    found = ensembles(made, labels, accept, metric)
    assert [count for count, _ in found] == sufficiency.marginal.sizes(trials)
    for count, mean_score in found:
        picked = [naive([made[place] for place in some], labels, metric, accept) for some in sufficiency._choices(trials, count)]
        assert mean_score.value == pytest.approx(mean(picked))


@given(trials=st.integers(2, 40), data=st.data())
def test_choices_are_eight_of_so_many_trials_and_not_all_the_same(trials: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, trials - 1))
    some = sufficiency._choices(trials, count)
    assert [len({*one} & {*range(trials)}) for one in some] == [count] * 8
    assert len({frozenset(one) for one in some}) > 1


def test_the_same_model_again_and_again_is_worth_nothing_more() -> None:
    made, labels = told(1, 1)
    again = [{f"{number}": made[0]["0-0"]} for number in range(8)]
    assert len({score.value for _, score in ensembles(again, labels)}) == 1


def test_a_sweep_is_judged_from_stored_logits_fetched_once(
    ground: Ground, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tiny_sweep(ground, f"sufficiency-{uuid4().hex[:8]}", trials=5)
    made = finish_trials(ground, sweep, tmp_path, noise=0.2, only=(0, 1, 3))
    client().set_logged_model_tags(made[0].model_id, {"stockpot.ingredient": made[0].model_copy(update={"gpus": 4}).model_dump_json()})
    folder = tmp_path / "logits"
    assert judge(sweep, StopSpec(below=0.9, after=4), folder) is None, "one more trial must finish first"
    found = judge(sweep, StopSpec(below=0.9, after=2), folder)
    assert found is not None
    assert [point.trials for point in found.curve] == [1, 2, 3]
    assert [point.accelerator_hours * 3600 for point in found.curve] == pytest.approx([2, 4, 6]), "one took four GPUs for its second"
    fetched = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert [path.name for path in fetched] == ["held_out.safetensors"] * 3, "no weights were fetched"
    assert judge(sweep, found.rule, folder) == found
    assert {path: path.stat().st_mtime_ns for path in fetched} == fetched, "nor anything twice"

    stored = [load_weights(tmp_path / f"trial-{one.index}" / "held_out.safetensors") for one in made]
    trials, labels = [{one.trial_id: logits["logits"]} for one, logits in zip(made, stored, strict=True)], stored[0]["labels"]
    asked = []
    monkeypatch.setattr(sufficiency, "ensembles", lambda *given: (asked.append(given[2:]), ensembles(*given))[1])
    soup = SoupSpec(accept="not_worse", metric="mcc")
    other = judge(sweep.model_copy(update={"request": sweep.request.model_copy(update={"soup": soup})}), found.rule, folder)
    assert other is not None
    assert asked == [("not_worse", "mcc")], "as the request's soup is chosen"
    assert [(point.trials, point.held_out) for point in other.curve] == ensembles(trials, labels, "not_worse", "mcc")

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
