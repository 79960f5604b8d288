"""Promise: of two attempts of a trial one alone writes. Whatever the earlier was about to read or write when a later one took over, and
whenever it wakes up, what the later one wrote stands. On files and on a real object store."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stockpot import storage
from stockpot.config import Init, PinnedSnapshot, Trial
from stockpot.errors import BadRequest, TrialFailed
from stockpot.outcomes import Accuracy, Ingredient
from stockpot.settings import TrialSettings
from stockpot.training import attempts
from stockpot.training.attempts import Attempt
from stockpot.training.journal import FINISHED, Journal, progress
from tests.interrupting import Interrupting
from tests.object_store import ObjectStore


@pytest.fixture(params=["path", pytest.param("s3", marks=pytest.mark.slow)])
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Trial:
    store: ObjectStore | None = request.getfixturevalue("s3") if request.param == "s3" else None
    place = PinnedSnapshot(uri="/nowhere", digest="a" * 64)
    return Trial(
        id="0123456789ab",
        sweep_id="s",
        model="fenced",
        index=0,
        settings=TrialSettings(),
        snapshot=place,
        init=Init(uri="/nowhere", digest="b" * 64),
        store=store.uri(f"attempts-{tmp_path.name}") if store else f"{tmp_path}/store",
    )


def state(step: int) -> dict[str, torch.Tensor]:
    return {"step": torch.tensor(step)}


def ingredient(trial: Trial, model_id: str) -> Ingredient:
    return Ingredient(
        trial_id=trial.id,
        index=0,
        model_id=model_id,
        mlflow_run_id="r",
        weights_sha256="c" * 64,
        init_digest="b" * 64,
        transform_digest="t",
        held_out=Accuracy(correct=1, seen=2),
        seconds=1.0,
    )


def step_of(attempt: Attempt) -> int | None:
    found = attempt.resume()
    return None if found is None else int(found["step"])


def save_on(trial: Trial) -> None:
    Attempt(trial).save(9, state(9))


def end(trial: Trial) -> None:
    late = Attempt(trial)
    late.save(9, state(9))
    late.record(ingredient(trial, "later"))
    late.finish()


WORDS: dict[str, Callable[[Attempt], object]] = {
    "claim": lambda attempt: Attempt(attempt.trial),
    "save": lambda attempt: attempt.save(5, state(5)),
    "record": lambda attempt: attempt.record(ingredient(attempt.trial, "early")),
    "finish": Attempt.finish,
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("takeover", [save_on, end])
def test_a_takeover_at_any_point_of_an_attempt_stands(trial, monkeypatch, word, takeover):
    points = 0
    while True:
        with monkeypatch.context() as patch:
            early = Attempt(trial.model_copy(update={"id": f"{points:012d}"}))
            early.save(2, state(2))
            early.save(3, state(3))
            point = Interrupting(patch, points, partial(takeover, early.trial))
            with suppress(TrialFailed):
                WORDS[word](early)
        if not point.happened:
            break
        later = Journal(early.trial)
        left = {found.uri.rpartition("/")[2].partition("-")[0] for found in storage.list_prefix(f"{later.root}/")}
        if takeover is end:
            assert (later.standing.state, later.standing.ingredients) == (None, {})
            assert left == {"entry"}, "no state outlives the trial, whoever stored it"
        else:
            assert later.standing.state is not None
            assert later.standing.state.step == 9
            assert step_of(Attempt(early.trial)) == 9
        points += 1
    assert points >= 4


def test_an_entry_where_earlier_ones_were_removed_does_not_stand(trial):
    early, late = Journal(trial), Journal(trial)
    for _ in range(3):
        late.write(lambda _standing: {"ended": False})
    assert [found.uri[-10:] for found in storage.list_prefix(late.root + "/")] == [f"{late.number}"], "the highest alone is kept"
    with pytest.raises(TrialFailed, match="This attempt of trial 0123456789ab was replaced by a later one"):
        early.write(lambda _standing: {"ingredients": {"x": ingredient(trial, "early")}})
    late.write(lambda standing: {"ended": True})
    assert late.standing.ingredients == {}
    assert Journal(trial).standing.state is None


def test_of_many_attempts_at_once_each_entry_has_one_writer(trial):
    """Eight threads claim and write as fast as they can: all numbers of what stood differ, and nobody wrote after a later claim."""
    start, stood, lock = threading.Barrier(8), [], threading.Lock()

    def attempt() -> None:
        start.wait()
        for _ in range(4):
            journal = Journal(trial)
            numbers = [journal.number]
            try:
                for _ in range(3):
                    journal.write(lambda standing: {"ingredients": {str(journal.claim): ingredient(trial, "m")}})  # noqa: B023
                    numbers.append(journal.number)
            except TrialFailed:
                pass
            with lock:
                stood.extend((number, journal.claim) for number in numbers)

    with ThreadPoolExecutor(8) as pool:
        for one in [pool.submit(attempt) for _ in range(8)]:
            one.result()
    claims = [claim for _, claim in sorted(stood)]
    assert len({number for number, _ in stood}) == len(stood)
    assert claims == sorted(claims)


def test_the_next_attempt_finds_what_was_saved_and_recorded(trial):
    assert progress(trial) == 0
    early = Attempt(trial)
    assert early.resume() is None
    early.save(3, state(3))
    average = ingredient(trial, "m").model_copy(update={"trial_id": f"{trial.id}-ema-0.9"})
    early.record(average)
    early.save(4, state(4))
    late = Attempt(trial)
    assert (step_of(late), progress(trial)) == (4, 5)
    assert late.recorded == {average.trial_id: average}
    with pytest.raises(TrialFailed):
        early.save(5, state(5))
    assert step_of(late) == 4
    late.finish()
    assert Attempt(trial).recorded == {}, "a trial that has ended is begun anew"


def test_a_state_is_saved_when_its_interval_is_over(trial, monkeypatch):
    """Of ten seconds, from the attempt's start and then from the last state."""
    clock, saved = [1000], []
    monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    attempt = Attempt(trial.model_copy(update={"state_interval_s": 10}))
    for second in (9, 10, 19, 20):
        clock[0] = 1000 + second
        attempt.save_when_due(second, partial(state, second))
        saved.append(step_of(attempt))
    assert saved == [None, 10, 10, 20]


@pytest.mark.parametrize("dies", ["upload", "write_bytes"])
def test_a_state_counts_with_its_entry_which_is_written_last(trial, monkeypatch, dies):
    """Whichever of the two writes the machine is lost in, what was saved before stands whole."""

    def killed(*_given, **_named) -> None:
        raise KeyboardInterrupt

    attempt = Attempt(trial)
    attempt.save(3, state(3))
    with monkeypatch.context() as patch:
        patch.setattr(storage, dies, killed)
        with pytest.raises(KeyboardInterrupt):
            attempt.save(5, state(5))
    assert step_of(Attempt(trial)) == 3


def test_no_state_outlives_the_trials_own_ingredient(trial, monkeypatch):
    """The ledger shows the trial as finished once that is published, so nobody may come after it to remove a state. Killed before it was
    removed, and so before that, there is somebody."""

    def killed(_uri: str) -> None:
        raise KeyboardInterrupt

    attempt = Attempt(trial)
    attempt.save(FINISHED, state(3))
    before = progress(trial)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            attempt.record(ingredient(trial, "m"))
    assert progress(trial) > before
    for last in (Attempt(trial), Attempt(trial)):
        assert (last.resume(), last.recorded) == (None, {trial.id: ingredient(trial, "m")})
    assert len(storage.list_prefix(f"{last.journal.root}/")) == 1


def test_a_write_whose_answer_was_lost_is_made_again(trial, monkeypatch):
    """The store has the entry, the client asks again and hears that it exists."""
    attempt, write = Attempt(trial), storage.write_bytes

    def unheard(uri: str, data: bytes, *, create: bool = False) -> None:
        monkeypatch.setattr(storage, "write_bytes", write)
        write(uri, data, create=create)
        write(uri, data, create=create)

    monkeypatch.setattr(storage, "write_bytes", unheard)
    attempt.save(3, state(3))
    assert step_of(Attempt(trial)) == 3


@pytest.mark.parametrize("part", ["snapshot", "init"])
def test_a_state_of_another_snapshot_or_init_is_refused(trial, part):
    Attempt(trial).save(3, state(3))
    other = trial.model_copy(update={part: getattr(trial, part).model_copy(update={"digest": "f" * 64})})
    with pytest.raises(BadRequest, match=f"was made with {part} .* the trial has ffffffffffff"):
        Attempt(other).resume()
