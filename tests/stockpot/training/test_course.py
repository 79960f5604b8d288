"""Promise: fix-aug changes the augmentation in the last pass and nowhere else, whether a trial is given in epochs or in steps, and in an
attempt that begins in the middle."""

import pytest
import torch

from stockpot.data.snapshots import open_snapshot
from stockpot.models.classifier import build
from stockpot.settings import TrialSettings
from stockpot.training import course
from stockpot.training.course import fine_tune

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
