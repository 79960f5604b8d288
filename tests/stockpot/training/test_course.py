"""Promises: fix-aug changes the augmentation in the last pass and nowhere else, whether a trial is given in epochs or in steps, and in an
attempt that begins in the middle. What is logged as read is that of all attempts of the trial."""

import pytest
import torch

from stockpot.data.snapshots import open_snapshot
from stockpot.models.classifier import build
from stockpot.settings import TrialSettings
from stockpot.training import course
from stockpot.training.candidates import finished
from stockpot.training.course import fine_tune
from stockpot.training.preemption import Preempted

SETTINGS = TrialSettings(
    batch_size=20,
    augmentation="tests.stockpot.training.test_course:dark",
    last_epoch_augmentation="tests.stockpot.training.test_course:bright",
)


def dark(image_CHW, seed, size):
    """Black."""
    return torch.zeros(3, size, size, dtype=torch.uint8)


def bright(image_CHW, seed, size):
    """White."""
    return torch.full((3, size, size), 255, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("asked", "begun", "seen"),
    [
        ({"epochs": 3}, 0, "dddddd" + "bbb"),
        ({"epochs": 1}, 0, "bbb"),
        ({"max_steps": 7}, 0, "dddddd" + "b"),
        ({"max_steps": 6}, 0, "ddd" + "bbb"),
        ({"epochs": 3}, 4, "dd" + "bbb"),
        ({"epochs": 3}, 7, "bb"),
    ],
)
def test_the_augmentation_changes_with_the_last_pass(ground, node, monkeypatch, asked, begun, seen):
    """Of 60 pictures, three steps a pass."""
    snapshot, states, pictures = open_snapshot(ground.data.snapshot), {}, []
    train = course.train

    def watched(model, settings, batches, **named):
        def noted(epoch, skip):
            for batch in batches(epoch, skip):
                pictures.append("b" if batch.images.float().mean() == 255 else "d" if not batch.images.any() else "?")
                yield batch

        return train(model, settings, noted, **named)

    def note(step, state):
        states[step] = state()

    monkeypatch.setattr(course, "train", watched)
    settings = SETTINGS.model_copy(update=asked)
    if begun:
        fine_tune(build(ground.config), settings, snapshot, checkpoint=note)
        pictures.clear()
    fine_tune(build(ground.config), settings, snapshot, resume=states.get(begun))
    assert "".join(pictures) == seen


def attempt(ground, settings, resume=None, leave_at=None):
    """What one attempt logs of the data, and the state it leaves, or its candidates."""
    logged, states = {}, []

    def note(step, state):
        if step == leave_at:
            states.append(state())
            raise Preempted

    def log(metrics, _step):
        logged.update({name.removeprefix("data/"): value for name, value in metrics.items() if name.startswith("data/")})

    snapshot = open_snapshot(ground.data.snapshot)
    try:
        return logged, fine_tune(build(ground.config), settings, snapshot, log=log, resume=resume, checkpoint=note)
    except Preempted:
        return logged, states[0]


@pytest.mark.parametrize("leave_at", [1, 4, 11])
def test_a_trial_in_two_attempts_on_two_nodes_counts_what_both_read(ground, tmp_path, monkeypatch, leave_at):
    """Twelve steps of 20 pictures, the last three with another reader; counts are added up at step 10 too. Each node fetches all shards."""
    settings = SETTINGS.model_copy(update={"epochs": 4})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "alone"))
    alone, _ = attempt(ground, settings)
    assert (alone["planned"], alone["read"], alone["skipped"]) == (240, 240, 0)
    assert alone["bytes_from_storage"] > 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    early, state = attempt(ground, settings, leave_at=leave_at)
    assert early == {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    late, candidates = attempt(ground, settings, state)
    assert [late[name] for name in ("planned", "read", "skipped")] == [240, 240, 0]
    assert late["bytes_from_storage"] == 2 * alone["bytes_from_storage"]
    again, _ = attempt(ground, settings, finished(candidates))
    assert again == {}, "an attempt that only hands over reads nothing, and what was logged stands"
