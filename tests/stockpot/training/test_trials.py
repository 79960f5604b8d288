"""Promise: a trial ends in one verified ingredient; finished ones are not repeated; killed and preempted ones end bit-identical to one left
alone; a trial's own fault fails it without an ingredient."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from stockpot import storage
from stockpot.checkpoints import load_weights
from stockpot.config import Trial
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.digests import file_digest, short
from stockpot.errors import BudgetSpent, ModelError, NonFinite, ServerUnreachable, SnapshotBroken, TrialFailed
from stockpot.ledger import recording, tracking
from stockpot.ledger.connection import client
from stockpot.ledger.stored import stored_models
from stockpot.outcomes import Ingredient
from stockpot.settings import TrialSettings
from stockpot.sweeps import UNTRAINED
from stockpot.training import trials
from stockpot.training.trials import Say, run_trial
from tests.interrupting import Interrupting
from tests.mlflow_server import free_port, mlflow_server
from tests.tiny_sweep import png, tiny_sweep
from tests.waiting import PATIENCE_S

SETTINGS = TrialSettings(
    epochs=40, batch_size=20, learning_rate=1e-3, mixup=0.2, ema_decays=(0.9, 0.99), evaluate_every_steps=7, warmup_steps=5
)
CHILD = """
import sys
from stockpot.config import Trial
from stockpot.training.trials import run_trial
run_trial(Trial.model_validate_json(sys.argv[1]), say=lambda line: print(line, flush=True))
"""


def trial_of(ground, model: str, tmp_path: Path, settings: TrialSettings = SETTINGS, **other) -> Trial:
    """A trial of an opened sweep, with a store of its own."""
    planned = tiny_sweep(ground, model, trials=1).trials[0]
    identity = short([settings, planned.snapshot.digest, planned.init.digest])
    return planned.model_copy(update={"id": identity, "settings": settings, "store": f"{tmp_path}/store", **other})


def test_a_trial_leaves_one_ingredient_and_nothing_else(ground, ledger, tmp_path):
    trial = trial_of(ground, "one-trial", tmp_path)
    lines: list[str] = []
    ingredient = run_trial(trial, say=lines.append)
    folder = tracking.fetch_ingredient(ingredient, tmp_path / "ingredient")
    assert file_digest(folder / "model.safetensors") == ingredient.weights_sha256
    stored = load_weights(folder / "held_out.safetensors")
    assert stored["logits"].shape == (60, 3)
    assert int((stored["logits"].argmax(1) == stored["labels"]).sum()) == ingredient.held_out.correct
    assert json.loads((folder / "card.json").read_text())["trial"]["id"] == trial.id
    assert ingredient.held_out.value > 0.5
    assert list((tmp_path / "store").rglob("*.*")) == []  # no state, no claim
    assert any("step 10 " in line for line in lines)
    averages = [tracking.find_ingredient("one-trial", name) for name in (f"{trial.id}-ema-0.9", f"{trial.id}-ema-0.99")]
    assert [one.ema_decay for one in averages if one] == [0.9, 0.99]
    assert len({one.weights_sha256 for one in [ingredient, *averages] if one}) == 3
    assert run_trial(trial, say=lines.append) == ingredient
    assert "finished already" in lines[-1]


def test_a_trial_that_stops_being_numbers_leaves_no_ingredient(ground, ledger, tmp_path):
    wild = SETTINGS.model_copy(update={"learning_rate": 0.99, "optimiser": "sgd", "clip_norm": 0.0, "epochs": 200})
    trial = trial_of(ground, "wild", tmp_path, wild.model_copy(update={"loss": "tests.stockpot.training.test_trials:nothing"}))
    with pytest.raises(NonFinite, match="stopped being a number at step 1"):
        run_trial(trial, say=lambda _line: None)
    assert tracking.find_ingredient("wild", trial.id) is None


def nothing(logits_BC, targets_BC):
    """A loss that is no number."""
    return (logits_BC * float("nan")).sum()


def test_memory_that_runs_out_in_the_last_evaluation_leaves_no_ingredient_and_says_so(ground, ledger, tmp_path, monkeypatch):
    def full(*_arguments, **_named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trial = trial_of(ground, "too-large", tmp_path, UNTRAINED)
    monkeypatch.setattr(trials, "logits", full)
    with pytest.raises(TrialFailed, match=r"ran out of memory for the evaluation of what was trained\. Use a device with more memory"):
        run_trial(trial, say=lambda _line: None)
    assert tracking.find_ingredient("too-large", trial.id) is None


def test_another_init_is_refused(ground, ledger, tmp_path):
    trial = trial_of(ground, "other-init", tmp_path)
    with pytest.raises(ModelError, match="it was built with"):
        run_trial(trial.model_copy(update={"init": trial.init.model_copy(update={"digest": "0" * 64})}), say=lambda _line: None)


def test_an_attempt_overtaken_before_it_knows_takes_nothing_back_that_the_later_one_published(ground, ledger, tmp_path, monkeypatch):
    """It has written that its ingredient counts, and is paused before it reads whether that stands; the later attempt ends the trial with
    that very ingredient."""
    trial, write, late = trial_of(ground, "published-by-another", tmp_path, UNTRAINED), storage.write_bytes, []

    def paused(uri: str, data: bytes, *, create: bool = False) -> None:
        write(uri, data, create=create)
        if trial.id.encode() in data:
            monkeypatch.setattr(storage, "write_bytes", write)
            late.append(run_trial(trial, say=lambda _line: None))

    monkeypatch.setattr(storage, "write_bytes", paused)
    with pytest.raises(TrialFailed, match="was replaced by a later one"):
        run_trial(trial, say=lambda _line: None)
    assert [tracking.find_ingredient(trial.model, trial.id)] == late
    tracking.fetch_ingredient(late[0], tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("points", range(5))
def test_a_takeover_at_any_point_of_a_trial_leaves_what_the_later_attempt_made(ground, ledger, s3, monkeypatch, points):
    """The earlier attempt is stopped before it writes to the ledger, or asks anything of the store, the later one runs to its end, the
    earlier one wakes up and goes on: at every such point, one in five a test."""
    settings = SETTINGS.model_copy(update={"epochs": 1, "ema_decays": (0.9,), "evaluate_every_steps": None})
    quiet: Say = lambda _line: None  # noqa: E731
    alone = run_trial(trial_of(ground, f"not-overtaken-{points}", Path("/"), settings, store=s3.uri(f"not-overtaken-{points}")), say=quiet)
    while True:
        model = f"overtaken-{points}"
        trial = trial_of(ground, model, Path("/"), settings, store=s3.uri(model), state_interval_s=0)
        late: list[Ingredient] = []
        with monkeypatch.context() as patch:
            takeover = partial(run_trial, trial, flow_run_id="late", attempt=2, say=quiet)
            point = Interrupting(patch, points, lambda: late.append(takeover()))  # noqa: B023
            try:
                assert run_trial(trial, flow_run_id="early", say=quiet) in (late or [None, tracking.find_ingredient(model, trial.id)])
            except TrialFailed as error:
                assert "was replaced by a later one" in str(error)  # noqa: PT017
        if not point.happened:
            break
        assert tracking.find_ingredient(model, trial.id) == late[0], points
        assert (late[0].weights_sha256, late[0].held_out) == (alone.weights_sha256, alone.held_out)
        assert sorted(one.about for one in stored_models(model)) == sorted(trial.ingredient_ids), f"{points}: each stored once"
        run = client().get_run(late[0].mlflow_run_id)
        assert (run.info.status, run.data.tags["stockpot.reason"]) == ("FINISHED", ""), points
        assert [point.value for point in client().get_metric_history(run.info.run_id, "held_out/accuracy")] == [alone.held_out.value]
        assert {found.uri.rpartition("/")[2].partition("-")[0] for found in storage.list_prefix(trial.store)} == {"entry"}, points
        points += 5
    assert points > 35


@pytest.mark.slow
def test_a_ledger_gone_at_the_end_costs_no_training(ground, ledger, tmp_path, monkeypatch):
    settings = SETTINGS.model_copy(update={"epochs": 2, "evaluate_every_steps": 2, "ema_decays": (0.9,)})
    alone = run_trial(trial_of(ground, "never-waited", tmp_path, settings), say=lambda _line: None)
    trial, store, lines = trial_of(ground, "waited", tmp_path, settings), recording.store, []
    silences = {"ledger": 1000, "store": 0}

    def silent_at_first(what, call, *args, **named):
        if silences[what]:
            silences[what] -= 1
            raise ServerUnreachable(f"No {what} answers")
        return call(*args, **named)

    monkeypatch.setattr(recording, "store", partial(silent_at_first, "ledger", store))
    monkeypatch.setattr(storage, "upload", partial(silent_at_first, "store", storage.upload))
    monkeypatch.setattr(trials, "ASK_EVERY_S", 0.0)
    monkeypatch.setattr(trials, "PATIENCE_S", 0.0)
    with pytest.raises(ServerUnreachable, match="No ledger answers"):
        run_trial(trial, say=lambda _line: None)
    silences |= {"ledger": 2, "store": 1}  # with the store gone too, it is saved in the next round
    monkeypatch.setattr(trials, "PATIENCE_S", PATIENCE_S)
    made = run_trial(trial, say=lines.append)
    assert sum("is trained and saved, and waits" in line for line in lines) == 1
    assert silences == {"ledger": 0, "store": 0}
    assert not any(" loss " in line for line in lines)
    assert (made.weights_sha256, made.held_out) == (alone.weights_sha256, alone.held_out)
    one, other = (tracking.find_ingredient(model, f"{trial.id}-ema-0.9") for model in ("never-waited", trial.model))
    assert one
    assert other
    assert one.weights_sha256 == other.weights_sha256
    assert list((tmp_path / "store").rglob("*.*")) == []


def test_a_snapshot_of_other_classes_is_refused(ground, ledger, tmp_path):
    given = GivenSamples([Sample("a", png(0, 0), 0), Sample("b", png(1, 1), 1)])
    two = publish(f"{tmp_path}/two", "two", ("red", "green"), given, splits="train")
    trial = trial_of(ground, "two-classes", tmp_path, snapshot=two)
    with pytest.raises(SnapshotBroken, match=r"has 2 classes \(red, green\), the model has 3 \(red, green, blue\)"):
        run_trial(trial, say=lambda _line: None)


def test_the_init_is_an_ingredient_that_is_never_trained(ground, ledger, tmp_path):
    ingredient = run_trial(trial_of(ground, "untrained", tmp_path, UNTRAINED), say=lambda _line: None)
    assert ingredient.weights_sha256 == file_digest(Path(ground.init.uri) / "model.safetensors")


def test_a_trial_whose_time_is_spent_goes_on_in_the_next_attempt(ground, ledger, tmp_path):
    quiet = {"say": lambda _line: None}
    short_settings = SETTINGS.model_copy(update={"epochs": 2})
    alone = run_trial(trial_of(ground, "unhurried", tmp_path, short_settings), **quiet)
    trial = trial_of(ground, "hurried", tmp_path, short_settings, budget_s=0)  # over at the first step, which no request may ask for
    with pytest.raises(BudgetSpent, match="has had its 0 s and is saved at step 1; the next attempt goes on"):
        run_trial(trial, **quiet)
    assert tracking.find_ingredient("hurried", trial.id) is None
    late = run_trial(trial.model_copy(update={"budget_s": None}), **quiet)
    assert late.weights_sha256 == alone.weights_sha256
    read = [client().get_run(one.mlflow_run_id).data.metrics["data/read"] for one in (alone, late)]
    assert read == [2 * 60] * 2


def start(trial: Trial, lines: int) -> subprocess.Popen[str]:
    """A process running the trial, once it has printed that many lines of progress."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, trial.model_dump_json()], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while lines and (line := child.stdout.readline()):
        lines -= " step " in line
    assert not lines, "the trial ended early"
    return child


@pytest.mark.slow
def test_a_trial_killed_and_preempted_at_random_ends_bit_identical(ground, ledger, tmp_path):
    alone = run_trial(trial_of(ground, "alone", tmp_path), say=lambda _line: None)
    trial = trial_of(ground, "disturbed", tmp_path, state_interval_s=0)
    with start(trial, 1 + time.time_ns() % 3) as killed:
        killed.send_signal(signal.SIGKILL)
    with start(trial, 1 + time.time_ns() % 2) as preempted:
        preempted.send_signal(signal.SIGTERM)
        assert preempted.wait(PATIENCE_S) == 143
    assert list((tmp_path / "store" / "training" / trial.model / trial.id).glob("state-*.safetensors"))
    lines: list[str] = []
    disturbed = run_trial(trial, say=lines.append)
    assert not any(" step 10 " in line for line in lines)  # it did not start anew
    assert disturbed.weights_sha256 == alone.weights_sha256
    assert disturbed.held_out == alone.held_out


def run_disturbed(trial: Trial, chance: random.Random) -> int:
    """Run a trial in processes that are killed at random steps, the last one left alone. Returns the number of kills."""
    kills = chance.randrange(1, 4)
    for _ in range(kills):
        with start(trial, chance.randrange(1, 4)) as child:
            time.sleep(chance.uniform(0, 0.2))
            child.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            assert child.wait(PATIENCE_S) in (-signal.SIGKILL, -signal.SIGTERM, 143, 0)
    codes = []
    while 0 not in codes:  # a server that does not answer in time is worth another attempt, as in a sweep
        with start(trial, 0) as child:
            assert child.stdout is not None
            child.stdout.read()
            codes.append(child.wait(PATIENCE_S))
        assert len(codes) < 4, codes
    return kills


@pytest.mark.slow
def test_a_sweep_whose_trials_are_killed_at_random_ends_with_the_same_ingredients_hash_for_hash(ground, ledger, tmp_path):
    seed = time.time_ns()
    print(f"kills drawn from seed {seed}")
    chance = random.Random(seed)
    left_alone, disturbed = (
        tiny_sweep(ground, model, trials=3, settings=SETTINGS, store=f"{tmp_path}/{model}") for model in ("alone-sweep", "killed-sweep")
    )
    for trial in left_alone.trials:
        run_trial(trial, say=lambda _line: None)
    assert sum(run_disturbed(trial.model_copy(update={"state_interval_s": 0}), chance) for trial in disturbed.trials) >= 3
    made, remade = (tracking.find_ingredients(sweep) for sweep in (left_alone, disturbed))
    assert len(made) == 9  # each trial's weights and two averages
    for one, other in zip(made, remade, strict=True):
        assert (one.trial_id, one.weights_sha256, one.held_out) == (other.trial_id, other.weights_sha256, other.held_out)
        folders = [tracking.fetch_ingredient(each, tmp_path / each.model_id) for each in (one, other)]
        assert len({file_digest(folder / "held_out.safetensors") for folder in folders}) == 1
    assert list((tmp_path / "killed-sweep").rglob("*.*")) == []  # no state, no claim


@pytest.mark.slow
def test_a_killed_tracking_server_never_stops_training_and_loses_no_point(ground, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port, root = free_port(), tmp_path / "server"
    root.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with mlflow_server(root, port):
        trial = trial_of(ground, "outage", tmp_path, state_interval_s=0)
        child = start(trial, 1)
        (server,) = [one for one in psutil.Process().children() if str(port) in one.cmdline()]
        os.killpg(server.pid, signal.SIGKILL)
    assert child.stdout is not None
    assert any("is trained and saved, and waits" in line for line in child.stdout)  # trained to its end with nobody to tell
    assert child.poll() is None  # it waits, what it trained saved
    with mlflow_server(root, port):
        assert child.wait(PATIENCE_S) == 0
        ingredient = run_trial(trial, say=lambda _line: None)
        points = client().get_metric_history(ingredient.mlflow_run_id, "train/loss")
        assert sorted({point.step for point in points}) == list(range(10, 121, 10))
