"""The course of one trial's training on one rank: from a snapshot's batches to candidates, with states kept on the way.

It knows storage and no ledger: a rank's process starts without MLflow, which only the trial itself speaks to.
"""

import time
from collections.abc import Callable, Iterable
from functools import cache

from torch import Tensor, nn

from stockpot.config import Trial
from stockpot.data.shards import Pixels, Reading, TrainReader, pixels
from stockpot.data.snapshots import Snapshot, open_snapshot
from stockpot.errors import BudgetSpent
from stockpot.evaluation import accuracy, logits
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.loading import load_state
from stockpot.outcomes import Accuracy
from stockpot.settings import TrialSettings
from stockpot.training.accounting import Account
from stockpot.training.attempts import Attempt
from stockpot.training.augmentation import augmentation
from stockpot.training.candidates import Candidate
from stockpot.training.journal import FINISHED
from stockpot.training.preemption import Preempted
from stockpot.training.ranks import Place
from stockpot.training.trainer import Batch, Checkpoint, Log, State, total_steps, train

Say = Callable[[str], None]
Start = Callable[[], tuple[ModelConfig, dict[str, Tensor]]]
"""Gives the init."""
HERE = Place(0, 1, "cpu")


def train_on_place(
    trial: Trial, hold: Attempt, end: float, start: Start, place: Place, told_to_leave: Callable[[], bool], log: Log, say: Say
) -> dict[float, Candidate]:
    """One rank's training, from the init or the last state. The first rank keeps states on the way, and saves one when it must leave:
    told to, or at `end` on the monotonic clock, which all processes of a node share."""

    def checkpoint(step: int, state: Callable[[], State]) -> None:
        if told_to_leave():
            hold.save(step, state())
            raise Preempted
        if time.monotonic() > end:
            hold.save(step, state())
            raise BudgetSpent(
                f"Trial {trial.id} has had its {trial.budget_s} s and is saved at step {step}; the next attempt goes on from there."
            )
        hold.save_when_due(step, state)

    config, weights = start()
    model = build(config)
    load_state(model, weights)
    return fine_tune(
        model,
        trial.settings,
        open_snapshot(trial.snapshot),
        loader_workers=trial.loader_workers,
        skip_fraction=trial.skip_fraction,
        reading=trial.reading,
        say=say,
        place=place,
        sharded=trial.sharded,
        log=log,
        resume=hold.resume(),
        checkpoint=checkpoint if place.rank == 0 else lambda _step, _state: None,
    )


def fine_tune(
    model: Classifier,
    settings: TrialSettings,
    snapshot: Snapshot,
    *,
    loader_workers: int = 0,
    skip_fraction: float = 0.0,
    reading: Reading = "auto",
    say: Callable[[str], None] = print,
    place: Place = HERE,
    sharded: bool = False,
    log: Log = lambda _metrics, _step: None,
    resume: State | None = None,
    checkpoint: Checkpoint = lambda _step, _state: None,
) -> dict[float, Candidate]:
    """Train the model in place on the snapshot's train split; returns its candidates, by decay of their moving average.

    place: the rank that this process is, and its device; every rank reads its share of every batch, and the first one evaluates. sharded:
    ranks share the model too.
    """
    preprocess, account = model.config.preprocess, Account(place, resume)

    @cache
    def reader(name: str) -> TrainReader:
        """Train with that augmentation."""
        made = TrainReader(
            snapshot,
            preprocess=preprocess,
            augment=augmentation(name, preprocess, smallest_crop=settings.smallest_crop),
            batch_size=settings.batch_size,
            seed=settings.seed,
            loader_workers=loader_workers,
            skip_fraction=skip_fraction,
            reading=reading,
            say=say,
            rank=place.rank,
            world=place.world,
            # A rest of a few samples would make the last step of every epoch, and of the trial, a wild one.
            drop_last=snapshot.counts["train"] >= settings.batch_size,
        )
        account.open(made.counters)
        return made

    names = (settings.augmentation, settings.last_epoch_augmentation or settings.augmentation)
    steps = reader(settings.augmentation).steps_per_epoch
    last_epoch = (total_steps(settings, steps) - 1) // steps

    def batches(epoch: int, skip: int) -> Iterable[Batch]:
        return reader(names[epoch == last_epoch]).batches(epoch, skip)

    @cache
    def held_out() -> Pixels:
        return pixels(snapshot, "held_out", preprocess)

    def score(net: nn.Module) -> Accuracy:
        return accuracy(logits(net, held_out().images, preprocess, device=place.device), held_out().labels)

    def note(metrics: dict[str, float], step: int) -> None:
        if "train/loss" in metrics:  # which every rank comes to
            account.meet()
        log(metrics, step)

    candidates = train(
        model,
        settings,
        batches,
        steps_per_epoch=steps,
        preprocess=preprocess,
        device=place.device,
        log=note,
        resume=resume,
        checkpoint=lambda step, state: checkpoint(step, lambda: state() | account.state()),
        score=score if place.rank == 0 else None,
        rank=place.rank,
        world=place.world,
        sharded=sharded,
    )
    if resume is None or int(resume["step"]) < FINISHED:  # else they are logged
        log({f"data/{name}": float(count) for name, count in account.meet().items()}, total_steps(settings, steps))
    return candidates
