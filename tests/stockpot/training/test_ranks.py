"""Promise: a trial on several ranks sees the samples and ends with the weights of one process; all ranks stop together, with the reason of
the one that failed, and none outlives its trial."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch

from stockpot.checkpoints import load_weights
from stockpot.config import Trial
from stockpot.errors import NonFinite, RankLost
from stockpot.ledger import tracking
from stockpot.ledger.connection import client
from stockpot.settings import TrialSettings
from stockpot.training.preemption import Preempted
from stockpot.training.ranks import Place, run_on_ranks
from stockpot.training.trials import run_trial
from tests.stockpot.training.test_trials import CHILD, trial_of
from tests.waiting import PATIENCE_S

SETTINGS = TrialSettings(
    epochs=2,
    batch_size=20,
    learning_rate=1e-3,
    optimiser="sgd",
    sam_rho=0.02,
    mixup=0.2,
    cutmix=0.2,
    micro_batch=4,
    warmup_steps=2,
    ema_decays=(0.9,),
    evaluate_every_steps=5,
)


def quiet(_line):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_end_with_the_weights_of_one_process(sharded, ground, ledger, tmp_path):
    """SGD keeps a difference of gradients in proportion, where Adam would blow up the smallest."""
    alone = trial_of(ground, f"one-rank-{sharded}", tmp_path, SETTINGS)
    together = trial_of(ground, f"two-ranks-{sharded}", tmp_path, SETTINGS, gpus=2, sharded=sharded)
    for trial in (alone, together):
        run_trial(trial, say=quiet)
    for name in together.ingredient_ids:
        one, other = (
            load_weights(
                tracking.fetch_ingredient(tracking.find_ingredient(trial.model, name), tmp_path / trial.model) / "model.safetensors"
            )
            for trial in (alone, together)
        )
        for tensor in one:
            assert torch.allclose(one[tensor], other[tensor], atol=1e-6, rtol=1e-5), (name, tensor)
    curves = [
        [
            (point.step, pytest.approx(point.value, abs=1e-5))
            for point in client().get_metric_history(tracking.find_ingredient(trial.model, trial.id).mlflow_run_id, curve)
        ]
        for trial in (alone, together)
        for curve in ("train/loss", "data/read")
    ]
    assert curves[0] == curves[2]
    assert curves[1] == curves[3]  # every sample once, over both ranks


def fail(reason: str, place: Place, told_to_leave, log, say):
    """What a rank does in these tests."""
    say(f"pid {os.getpid()}")
    log({"seen": 1.0}, 3)
    assert torch.distributed.is_torchelastic_launched()
    torch.distributed.barrier()
    if place.rank == 1 and reason == "stated":
        raise NonFinite("The loss stopped being a number at step 7.")
    if place.rank == 1 and reason == "broken":
        raise ZeroDivisionError("by nought")
    if place.rank == 1 and reason == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if place.rank == 1 and reason == "exit":
        os._exit(3)
    while not (place.rank == 0 and told_to_leave()):
        time.sleep(0.05)
    raise Preempted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reason", "error", "said"),
    [
        ("stated", NonFinite, "at step 7"),
        ("broken", RankLost, r"Rank 1 of 2 broke \(ZeroDivisionError: by nought"),
        ("exit", RankLost, "Rank 1 of 2 ended with exit code 3"),
        ("killed", RankLost, "Rank 1 of 2 ended with exit code -9"),
        ("preempted", Preempted, ""),
    ],
)
def test_all_ranks_stop_together_with_the_reason(reason, error, said, tmp_path):
    lines: list[str] = []
    logged: list[tuple[dict[str, float], int]] = []
    with pytest.raises(error, match=said):
        run_on_ranks(
            2,
            partial(fail, reason),
            tmp_path,
            told_to_leave=lambda: reason == "preempted" and bool(lines),
            log=lambda metrics, step: logged.append((metrics, step)),
            say=lines.append,
        )
    assert [line.split()[0] for line in lines] == ["pid"]  # only the first rank speaks
    assert logged == [({"seen": 1.0}, 3)]
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


class Unwelcome:
    """Work that no other process can load."""

    def __reduce__(self):
        return int, ("no number",)

    def __call__(self, *_):
        raise AssertionError


@pytest.mark.slow
def test_ranks_that_never_began_are_no_riddle(tmp_path):
    with pytest.raises(RankLost, match=r"Rank \d of 2 ended with exit code 1"):
        run_on_ranks(2, Unwelcome(), tmp_path, told_to_leave=lambda: False, log=lambda _metrics, _step: None, say=quiet)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "sharded"), [(signal.SIGTERM, False), (signal.SIGKILL, False), (signal.SIGKILL, True)])
def test_a_trial_on_two_ranks_killed_or_preempted_goes_on_and_leaves_no_rank(number, sharded, ground, ledger, tmp_path):
    settings = SETTINGS.model_copy(update={"epochs": 30})
    two = {"gpus": 2, "sharded": sharded}
    alone = run_trial(trial_of(ground, f"ranks-alone-{number}-{sharded}", tmp_path, settings, **two), say=quiet)
    interval_s = 300 if number == signal.SIGTERM else 0  # the state found after SIGTERM is the one it asked for
    trial = trial_of(ground, f"ranks-disturbed-{number}-{sharded}", tmp_path, settings, state_interval_s=interval_s, **two)
    with start(trial) as child:
        ranks = psutil.Process(child.pid).children(recursive=True)
        assert len(ranks) >= 2
        child.send_signal(number)
        assert child.wait(PATIENCE_S) in (143, -signal.SIGKILL)
        psutil.wait_procs(ranks, timeout=PATIENCE_S)
        assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    lines: list[str] = []
    disturbed = run_trial(trial, say=lines.append)
    assert not any(" step 10 " in line for line in lines)
    assert disturbed.weights_sha256 == alone.weights_sha256
    for curve in ("data/planned", "data/read"):  # of both attempts, and of both ranks
        one, other = (client().get_metric_history(made.mlflow_run_id, curve) for made in (alone, disturbed))
        assert [point.value for point in one] == [point.value for point in other] == [30 * 60]


def start(trial: Trial) -> subprocess.Popen[str]:
    """A process running the trial, once its ranks have made progress."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, trial.model_dump_json()], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    seen = 0
    while seen < 2 and (line := child.stdout.readline()):
        seen += " step " in line
    assert seen == 2, "the trial ended early"
    return child
