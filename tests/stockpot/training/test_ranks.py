"""Promise: a trial on several ranks sees the samples and ends with the weights of one process; all ranks stop together, with the reason of
the one that failed, and none outlives its trial."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from stockpot.checkpoints import load_weights
from stockpot.config import Trial
from stockpot.errors import NonFinite, RankLost
from stockpot.ledger import tracking
from stockpot.ledger.connection import client
from stockpot.settings import TrialSettings
from stockpot.training import ranks
from stockpot.training.candidates import Candidate
from stockpot.training.preemption import Preempted
from stockpot.training.ranks import Place, run_on_ranks
from stockpot.training.trials import run_trial
from tests.stockpot.training.test_trials import CHILD, trial_of
from tests.waiting import PATIENCE_S, until

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
    if reason == "gone":
        os._exit(0)
    if reason == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
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
        ("gone", RankLost, r"Rank \d of 2 vanished"),
        ("preempted", Preempted, ""),
    ],
)
def test_all_ranks_stop_together_with_the_reason(reason, error, said, tmp_path):
    folder = tmp_path / "a folder #1?"
    folder.mkdir()
    lines: list[str] = []
    logged: list[tuple[dict[str, float], int]] = []
    listening: list[str] = []

    def log(metrics, step):
        logged.append((metrics, step))
        for process in (psutil.Process(), *started()) if reason == "preempted" else ():
            listening.extend(one.laddr.ip for one in process.net_connections() if one.status == psutil.CONN_LISTEN)

    with pytest.raises(error, match=said):
        run_on_ranks(
            2, partial(fail, reason), folder, told_to_leave=lambda: reason == "preempted" and bool(lines), log=log, say=lines.append
        )
    assert [line.split()[0] for line in lines] == ["pid"]  # only the first rank speaks
    assert logged == [({"seen": 1.0}, 3)]
    assert set(listening) == ({"127.0.0.1"} if reason == "preempted" else set())  # nobody else can talk to them
    assert [*tmp_path.iterdir()] == [folder]
    assert not started()


def started(trial: psutil.Process | None = None) -> list[psutil.Process]:
    """The ranks of that process, or of this one."""
    return [child for child in (trial or psutil.Process()).children() if is_rank(child)]


def is_rank(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # or it is a zombie
        return False


@pytest.mark.slow
def test_an_error_of_who_listens_is_not_taken_for_a_ranks_and_ends_all(tmp_path):
    def log(_metrics, _step):
        raise ConnectionError("the ledger is away")

    with pytest.raises(ConnectionError, match="the ledger is away"):
        run_on_ranks(2, partial(fail, "none"), tmp_path, told_to_leave=lambda: False, log=log, say=quiet)
    assert not started()


class Interrupted(BaseException):
    """What Ctrl-C does to a trial."""


@pytest.mark.slow
def test_stopped_ranks_end_with_their_trial(tmp_path):
    def told_to_leave():
        ranks = started()
        if len(ranks) == 2 and all(rank.status() == psutil.STATUS_STOPPED for rank in ranks):
            raise Interrupted
        return False

    with pytest.raises(Interrupted):
        run_on_ranks(2, partial(fail, "stopped"), tmp_path, told_to_leave=told_to_leave, log=lambda _metrics, _step: None, say=quiet)
    assert not started()


@pytest.mark.parametrize("begun", [0, 2])
def test_a_trial_that_ends_while_its_ranks_begin_waits_for_none(begun, tmp_path):
    def told_to_leave():
        if len(started()) >= begun:
            raise Interrupted
        return False

    with pytest.raises(Interrupted):
        run_on_ranks(2, partial(fail, "none"), tmp_path, told_to_leave=told_to_leave, log=lambda _metrics, _step: None, say=quiet)
    assert not started()
    assert not [*tmp_path.iterdir()]  # they had not met


def made_before(how: str, place: Place, told_to_leave, log, say):
    """Work that is done, in a process that then does not end, or ends badly."""
    if place.rank == 1:
        after = partial(time.sleep, 600) if how == "stays" else partial(os._exit, 139)
        threading.Timer(2, after).start()  # a thread that Python waits for at the end
    return {0.0: Candidate({"weight": torch.ones(2)}, 7)}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stays", "crashes"])
def test_a_training_that_is_done_counts_however_a_rank_ends_after_it(how, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "EXIT_S", 6.0)
    made = run_on_ranks(2, partial(made_before, how), tmp_path, told_to_leave=lambda: False, log=lambda _metrics, _step: None, say=quiet)
    assert made[0.0].step == 7
    assert torch.equal(made[0.0].weights["weight"], torch.ones(2))
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


class Unwelcome:
    """Work that no other process can load."""

    def __reduce__(self):
        return int, ("no number",)

    def __call__(self, *_):
        raise AssertionError


def test_a_signal_to_the_whole_group_while_its_ranks_begin_is_no_loss(tmp_path):
    """Slurm and systemd tell every process. A rank ignores that, once it has begun."""

    def told_to_leave():
        ranks = started()
        for rank in ranks if len(ranks) == 2 and not told else ():
            rank.send_signal(signal.SIGTERM)
            told.append(rank)
        return bool(told)

    told: list[psutil.Process] = []
    with pytest.raises(Preempted):
        run_on_ranks(2, partial(fail, "none"), tmp_path, told_to_leave=told_to_leave, log=lambda _metrics, _step: None, say=quiet)
    assert not started()


class DiesLoading:
    """Work that ends the second rank to load it, as soon as the first one ignores SIGTERM. died: a file that is then there."""

    def __init__(self, died: Path) -> None:
        self.died = died

    def __reduce__(self):
        return die_loading, (self.died,)

    def __call__(self, *_):
        raise AssertionError


def die_loading(died: Path):
    first, second = sorted(started(psutil.Process().parent()), key=psutil.Process.create_time)
    if second.pid == os.getpid():
        until(lambda: ignores_sigterm(first))
        died.touch()
        os._exit(5)
    return partial(fail, "none")


def ignores_sigterm(process: psutil.Process) -> bool:
    ignored = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    return bool(int(ignored.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
def test_a_rank_that_dies_before_its_first_word_ends_the_others_at_once(tmp_path):
    died = tmp_path / "died"
    with pytest.raises(RankLost, match="Rank 1 of 2 ended with exit code 5"):
        run_on_ranks(2, DiesLoading(died), tmp_path, told_to_leave=lambda: False, log=lambda _metrics, _step: None, say=quiet)
    assert time.time() - died.stat().st_mtime < 20  # torch waits 30 s for who ignores SIGTERM
    assert not started()


KILLED = """
from functools import partial
from pathlib import Path
import sys
from stockpot.training.ranks import run_on_ranks
from tests.stockpot.training.test_ranks import fail

if __name__ == "__main__":
    run_on_ranks(2, partial(fail, "none"), Path(sys.argv[1]), told_to_leave=lambda: False, log=lambda *_: None, say=print)
"""


@pytest.mark.slow
@pytest.mark.parametrize("later_s", [0.0, 1.0, 3.0])
def test_no_rank_outlives_a_trial_killed_while_they_begin(later_s, tmp_path):
    trial = psutil.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    ranks = until(lambda: started(trial))
    time.sleep(later_s)
    ranks = started(trial)
    trial.kill()
    trial.wait()
    assert not psutil.wait_procs(ranks, timeout=PATIENCE_S)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("level", "kept"), [("info", False), ("", False), ("INFO", True)])
def test_a_log_level_that_torchrun_does_not_know_stops_no_trial(level, kept):
    """And one on one device does not even load torchrun, which takes its time."""
    code = (
        "import os, sys, stockpot.training.trials; assert 'torch.distributed.elastic' not in sys.modules; "
        "import stockpot.training.torchrun; print('LOGLEVEL' in os.environ)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "LOGLEVEL": level})
    assert done.stdout.strip() == str(kept)


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
