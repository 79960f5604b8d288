"""Promise: a retraining outlives a trial whose progress cannot be told, a trial that finds no free GPU spends no attempt, and one that
would go on from a state of other data or another init is refused before it takes a GPU.
"""

import asyncio
import logging

import pytest
import torch
from prefect.logging import disable_run_logger

import flows.finetune
from stockpot import storage
from stockpot.config import Init, PinnedSnapshot, Trial
from stockpot.errors import BadRequest, DeviceBusy, StorageRefused
from stockpot.settings import TrialSettings
from stockpot.training.attempts import Attempt
from tasks import finetuning
from tasks.dispatching import Job
from tasks.finetuning import trial_progress


@pytest.fixture
def trial(tmp_path):
    place, init = PinnedSnapshot(uri="/nowhere", digest="a" * 64), Init(uri="/nowhere", digest="b" * 64)
    settings, store = TrialSettings(), f"{tmp_path}/store"
    return Trial(id="0123456789ab", sweep_id="s", model="far", index=0, settings=settings, snapshot=place, init=init, store=store)


def refuse(*_given):
    raise StorageRefused("The store refuses this user.")


@pytest.mark.parametrize("fault", ["refused", "another version"])
def test_progress_that_cannot_be_told_counts_as_nothing_and_is_said(trial, fault, monkeypatch, caplog):
    if fault == "refused":
        monkeypatch.setattr(storage, "list_prefix", refuse)
    else:
        storage.write_bytes(f"{trial.store}/training/far/{trial.id}/entry-0000000007", b'{"claim": 7, "made_by": "a later version"}')
    monkeypatch.setattr(finetuning, "get_run_logger", lambda: logging.getLogger("run"))
    job = Job(trial.id, "d", {"trial": trial.model_dump(mode="json")}, "job-1", "trial:far", ())
    assert asyncio.run(trial_progress(job)) == 0
    assert "job-1: how far it got cannot be told" in caplog.text


def test_a_node_whose_gpus_are_all_held_is_named(trial, monkeypatch):
    def busy(*_given):
        raise DeviceBusy("2 of 2 GPUs of this node are held.")

    monkeypatch.setattr(flows.finetune, "finetune_trial", busy)
    with disable_run_logger():
        state = flows.finetune.finetune.fn(trial)
    assert (state.name, state.message) == ("DeviceBusy", "2 of 2 GPUs of this node are held.")


@pytest.mark.parametrize("part", ["snapshot", "init"])
def test_a_state_of_another_snapshot_or_init_is_refused_before_a_gpu_is_taken(trial, part, monkeypatch):
    """No parent can meet one: it knows a trial by the digest of both, and with either changed dispatches another trial. This is for a run
    that a person starts by hand, with the trial's parameters changed."""

    def claimed(_gpus):
        raise DeviceBusy("2 of 2 GPUs of this node are held.")

    monkeypatch.setattr(finetuning, "claimed_gpus", claimed)
    Attempt(trial).save(3, {"step": torch.tensor(3)})
    changed = trial.model_copy(update={part: getattr(trial, part).model_copy(update={"digest": "f" * 64})})
    with pytest.raises(DeviceBusy):
        finetuning.finetune_trial.fn(trial, 1)
    with pytest.raises(BadRequest, match=f"The training state of trial {trial.id} was made with {part} .*, the trial has ffffffffffff"):
        finetuning.finetune_trial.fn(changed, 1)
