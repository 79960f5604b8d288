"""One trial from ledger to ledger: fetch the init, read the snapshot, fine-tune, evaluate on held_out, record the ingredient.

A trial is complete in itself and known by its digest: one that is already in the ledger is returned, not repeated.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from stockpot.checkpoints import save_weights
from stockpot.config import Trial
from stockpot.data.shards import Pixels, pixels
from stockpot.data.snapshots import Snapshot, open_snapshot
from stockpot.digests import canonical
from stockpot.errors import ServerUnreachable, TrialFailed
from stockpot.evaluation import accuracy, logits
from stockpot.ledger import recording, tracking
from stockpot.ledger.recording import Made
from stockpot.ledger.trial_log import TrialLog, replay_metrics
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.folders import write_model
from stockpot.models.loading import load_state
from stockpot.outcomes import Ingredient
from stockpot.training import inits
from stockpot.training.attempts import Attempt
from stockpot.training.candidates import Candidate, finished
from stockpot.training.course import Start, train_on_place
from stockpot.training.fitting import room_for
from stockpot.training.journal import FINISHED
from stockpot.training.preemption import deferred_sigterm
from stockpot.training.ranks import Place, run_on_ranks
from stockpot.training.trainer import Log

Say = Callable[[str], None]
PATIENCE_S = 600.0
"""How long a finished training waits for a ledger that does not answer: a restart, or an upgrade of its database."""
ASK_EVERY_S = 5.0


def run_trial(trial: Trial, *, flow_run_id: str | None = None, attempt: int = 1, say: Say) -> Ingredient:
    """Run the trial and record its ingredient, or return the one the ledger holds.

    An interrupted trial goes on from its last training state; one that ends while the ledger is gone saves what it trained, and waits.
    say: called with one line per event. Raises `TrialFailed` (`NonFinite`) when training fails by its own fault, `ModelError` when the
    init is not the one the trial was drawn for, `BudgetSpent`, the state saved, at the end of `budget_s`, and whatever the data or the
    ledger refuse; exits with 143, the state saved, when it is told to by SIGTERM.
    """
    if done := _finished(trial, say):
        return done
    if late := replay_metrics():
        say(f"{late} points of earlier trials on this node were delivered")
    began = time.monotonic()
    config, weights = inits.fetch(trial.init)
    snapshot = open_snapshot(trial.snapshot)
    snapshot.require_classes(config.classes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hold = Attempt(trial)
    if done := _finished(trial, say):  # another attempt has ended it while this one began
        hold.finish()
        return done
    with (
        TrialLog(trial, flow_run_id, attempt, say, claim=hold.claim) as log,
        TemporaryDirectory(prefix="stockpot-trial-") as folder,
    ):
        log.params({**trial.settings.model_dump(), "init": trial.init.digest, "snapshot": trial.snapshot.digest})
        log.params({"device": device, "gpus": trial.gpus, "sharded": trial.sharded})
        counted = {name: one for name, one in hold.recorded.items() if recording.is_stored(one)}  # by an attempt that got no further
        candidates: dict[float, Candidate] = {}
        if not counted.keys() >= set(trial.ingredient_ids):
            note = _note(trial, log, say)
            candidates = _candidates(trial, hold, lambda: (config, weights), Path(folder), device=device, log=note, say=say)
        made = _evaluation(trial, config, snapshot, candidates, Path(folder), device, began)
        for decay in sorted((0.0, *trial.settings.ema_decays), reverse=True):  # the trial's own weights last: with them it is finished
            name = trial.ingredient_id(decay)
            stored = partial(_stored, trial, log.mlflow_run_id, made, decay)
            ingredient = _patiently(partial(_recorded, hold, name, counted, stored), hold, candidates, say)
            score = ingredient.held_out
            say(f"trial {trial.index:02d} {name} held_out {score.value:.4f} ({score.correct} of {score.seen})")
        hold.finish()
        say(f"trial {trial.index:02d} {trial.id} finished in {time.monotonic() - began:.1f} s")
        return ingredient


def _evaluation(
    trial: Trial,
    config: ModelConfig,
    snapshot: Snapshot,
    candidates: dict[float, Candidate],
    folder: Path,
    device: str,
    began: float,
) -> Callable[[float], Made]:
    """Gives what the candidate of a decay comes to, evaluated and written into `folder` once, however often it is asked for."""
    model = build(config)
    held_out = pixels(snapshot, "held_out", config.preprocess)

    @cache
    def made(decay: float) -> Made:
        candidate, place = candidates[decay], folder / trial.ingredient_id(decay)
        load_state(model, candidate.weights)
        with room_for("the evaluation of what was trained", "Use a device with more memory, or a smaller model.")():
            logits_NC = logits(model, held_out.images, config.preprocess, device=device)
        score = accuracy(logits_NC, held_out.labels)
        sha256 = _write_ingredient(place, trial, decay, model, logits_NC, held_out)
        return Made(place, sha256, score, held_out.transform_digest, time.monotonic() - began, candidate.step, decay)

    return made


def _stored(trial: Trial, mlflow_run_id: str, made: Callable[[float], Made], decay: float) -> Ingredient:
    return recording.store(trial, mlflow_run_id, made(decay))


def _finished(trial: Trial, say: Say) -> Ingredient | None:
    """The trial's ingredient, where the ledger has it."""
    done = tracking.find_ingredient(trial.model, trial.id)
    if done is None:
        return None
    say(f"trial {trial.index:02d} {trial.id} is finished already: held_out {done.held_out.value:.4f}")
    return done.model_copy(update={"index": trial.index})


def _recorded(hold: Attempt, name: str, counted: dict[str, Ingredient], stored: Callable[[], Ingredient]) -> Ingredient:
    """The ingredient of that id in the ledger: found there, counted before, or stored now, and then counted by a word in the journal and
    nothing else. Raises `TrialFailed` when a later attempt has the word, and takes back what it stored, unless that one counts it: it may
    have read the word before this attempt knew that it was not the last."""
    if found := tracking.find_ingredient(hold.trial.model, name):
        return found
    if name not in counted:
        ingredient = stored()
        try:
            hold.record(ingredient)
        except TrialFailed:
            if hold.recorded.get(name) != ingredient:
                recording.discard(ingredient)
            raise
        counted[name] = ingredient
    recording.publish(hold.trial, counted[name])
    return counted[name]


def _patiently(work: Callable[[], Ingredient], hold: Attempt, candidates: dict[float, Candidate], say: Say) -> Ingredient:
    """The work's result, tried again for `PATIENCE_S` while the ledger does not answer. The candidates are saved before the first wait, so
    that a further attempt has nothing to train. Raises `ServerUnreachable` at the end of it."""
    end = time.monotonic() + PATIENCE_S
    saved = False
    while True:
        try:
            return work()
        except ServerUnreachable as error:
            if candidates and not saved and hold.trial.id not in hold.recorded:
                with suppress(ServerUnreachable):  # the store may be what is away: the next round saves
                    hold.save(FINISHED, finished(candidates))
                    saved = True
                    say(f"trial {hold.trial.index:02d} is trained and saved, and waits {PATIENCE_S:.0f} s for the ledger: {error}")
            if time.monotonic() > end:
                raise
        time.sleep(ASK_EVERY_S)


def _candidates(trial: Trial, hold: Attempt, start: Start, folder: Path, *, device: str, log: Log, say: Say) -> dict[float, Candidate]:
    """Train to the end, on as many ranks as the trial asks for; told to leave by SIGTERM, end once the state is saved."""
    end = math.inf if trial.budget_s is None else time.monotonic() + trial.budget_s
    with deferred_sigterm() as told_to_leave:
        if trial.gpus == 1:
            return train_on_place(trial, hold, end, start, Place(0, 1, device), told_to_leave, log, say)
        work = partial(train_on_place, trial, hold, end, partial(inits.fetch, trial.init))
        return run_on_ranks(trial.gpus, work, folder, told_to_leave=told_to_leave, log=log, say=say)
    raise AssertionError("deferred_sigterm ends the process after Preempted")


def _note(trial: Trial, log: TrialLog, say: Say) -> Log:
    """Metrics to the ledger, and a line for whoever watches."""

    def note(metrics: dict[str, float], step: int) -> None:
        log.metrics(metrics, step)
        if "train/loss" in metrics:
            loss, rate, epoch = (metrics[f"train/{name}"] for name in ("loss", "learning_rate", "epoch"))
            say(f"trial {trial.index:02d} step {step} epoch {epoch:.1f} loss {loss:.4f} lr {rate:.2e}")

    return note


def _write_ingredient(folder: Path, trial: Trial, ema_decay: float, model: Classifier, logits_NC: Tensor, held_out: Pixels) -> str:
    """The five files of an ingredient: weights, model config, fingerprint, per-sample held-out logits and card. Returns the sha256 of the
    weights."""
    sha256 = write_model(folder, model)
    save_weights(folder / "held_out.safetensors", {"logits": logits_NC, "labels": torch.as_tensor(held_out.labels)})
    card: dict[str, Any] = {
        "trial": trial,
        "ema_decay": ema_decay,
        "weights_sha256": sha256,
        "held_out": accuracy(logits_NC, held_out.labels),
        "transform_digest": held_out.transform_digest,
        "torch": torch.__version__,
    }
    (folder / "card.json").write_bytes(canonical(card))
    return sha256
