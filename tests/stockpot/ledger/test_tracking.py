"""Guards: the ledger finds a finished trial whatever sweep asks, a failed one says why, and a dead server is a sentence, not a stall."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from mlflow.entities import Run
from mlflow.tracking._tracking_service import client as mlflow_client
from safetensors.torch import save_file

from stockpot.config import BaseSpec, DataSpec, Init, PinnedData, PinnedSnapshot, RetrainRequest, Sweep, SweepSpec
from stockpot.digests import file_digest
from stockpot.errors import IngredientMismatch, RecordUnreadable, RegistryError, ServerUnreachable, SweepMissing, TrialFailed
from stockpot.ledger import tracking, trial_log
from stockpot.ledger.connection import client, experiment, find_run, of_kind, search_runs
from stockpot.ledger.recording import Made
from stockpot.ledger.records import parsed
from stockpot.ledger.stored import delete_stored
from stockpot.ledger.trial_log import TrialLog, replay_metrics
from stockpot.outcomes import Accuracy, Ingredient
from stockpot.sweeps import plan
from tests.faulty_proxy import faulty_proxy
from tests.interrupting import Interrupting
from tests.tiny_sweep import record_ingredient
from tests.waiting import PATIENCE_S, SOON_S


def sweep_of(model: str, trials: int = 2) -> Sweep:
    request = RetrainRequest(
        model=model, store="/store", data=DataSpec(snapshot="/data/a.json"), base=BaseSpec(arch="ViT-B-32"), sweep=SweepSpec(trials=trials)
    )
    snapshot = PinnedSnapshot(uri="/data/a.json", digest="a" * 64)
    return plan(request, PinnedData(snapshot=snapshot), Init(uri="/store/inits/x", digest="b" * 64))


def made_in(folder: Path, seed: int = 0, width: int = 3) -> Made:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"head.weight": torch.full((2, width), float(seed))}, folder / "model.safetensors")
    save_file({"logits": torch.zeros(4, width)}, folder / "held_out.safetensors")
    (folder / "card.json").write_text("{}")
    (folder / "model.json").write_text("{}")
    (folder / "fingerprint.json").write_text("{}")
    return Made(folder, file_digest(folder / "model.safetensors"), Accuracy(correct=3, seen=4), "t", seconds=1.0, step=1)


def record(sweep: Sweep, index: int, folder: Path, width: int = 3, claim: int = 1) -> Ingredient:
    with TrialLog(sweep.trials[index], claim=claim) as log:
        log.params(sweep.trials[index].settings.model_dump())
        log.metrics({"train/loss": 1.0}, step=0)
        log.metrics({"train/loss": 0.5}, step=1)
        return record_ingredient(log, made_in(folder, index, width))


def seconds_of_a_hundred_steps(log: TrialLog) -> float:
    start = time.monotonic()
    for step in range(100):
        log.metrics({"train/loss": float(step)}, step)
    return time.monotonic() - start


@pytest.fixture
def sweep(ledger: str) -> Sweep:
    one = sweep_of(f"tracking-{uuid4().hex[:8]}")
    tracking.open_sweep(one, flow_run_id="flow-1")
    return one


def test_a_sweep_is_read_back_as_it_was_planned_and_opened_once(sweep: Sweep) -> None:
    assert tracking.read_sweep(sweep.id) == sweep
    assert tracking.open_sweep(sweep) == tracking.open_sweep(sweep)
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": 2, "failed": 0})
    summary = tracking.list_sweeps(sweep.request.model)
    assert [(one.sweep_id, one.status, one.trials, one.finished) for one in summary] == [(sweep.id, "FINISHED", 2, 2)]


def test_what_an_earlier_stockpot_wrote_by_other_rules_is_refused_in_a_sentence(sweep: Sweep) -> None:
    old = sweep.model_dump(mode="json")
    old["request"]["soup"]["mixing"]["share"] = 1.0  # as was once allowed
    client().log_text(tracking.open_sweep(sweep), json.dumps(old), "sweep.json")
    why = r"is not as this Stockpot writes it \(`request\.soup\.mixing\.share`: Input should be less than 1\); read it with"
    with pytest.raises(RecordUnreadable, match=f"^`sweep.json` of MLflow run .* {why}"):
        tracking.read_sweep(sweep.id)
    for text, place in (("{}", "`trial_id`: Field required"), ("{", "`JSON`: Invalid JSON")):
        with pytest.raises(RecordUnreadable, match=place):
            parsed(Ingredient, text, "It")


def test_an_unknown_sweep_is_missing_by_name(ledger: str) -> None:
    with pytest.raises(SweepMissing, match="no sweep 'nope'"):
        tracking.read_sweep("nope")


def test_an_ingredient_is_found_by_trial_id_and_fetched_whole(sweep: Sweep, tmp_path: Path) -> None:
    made = record(sweep, 0, tmp_path / "made")
    assert tracking.find_ingredient(sweep.request.model, sweep.trials[0].id) == made
    assert tracking.find_ingredient(sweep.request.model, sweep.trials[1].id) is None
    folder = tracking.fetch_ingredient(made, tmp_path / "fetched")
    assert sorted(path.name for path in folder.iterdir()) == sorted(tracking.INGREDIENT_FILES)


def test_the_trials_run_is_a_child_with_curves_lineage_and_system_metrics(sweep: Sweep, tmp_path: Path) -> None:
    made = record(sweep, 0, tmp_path)
    run = client().get_run(made.mlflow_run_id)
    assert run.data.tags["mlflow.parentRunId"] == tracking.open_sweep(sweep)
    assert run.info.status == "FINISHED"
    assert [(point.step, point.value) for point in client().get_metric_history(made.mlflow_run_id, "train/loss")] == [(0, 1.0), (1, 0.5)]
    assert run.data.metrics["held_out/accuracy"] == 0.75
    assert run.data.params["learning_rate"] == "2e-05"
    assert any(name.startswith("system/") for name in run.data.metrics)
    assert run.inputs.dataset_inputs[0].dataset.digest == "a" * 36


def test_a_finished_trial_is_reused_by_another_sweep_of_the_model(sweep: Sweep, tmp_path: Path) -> None:
    record(sweep, 0, tmp_path)
    larger = sweep_of(sweep.request.model, trials=3)
    assert larger.id != sweep.id
    assert [one.trial_id for one in tracking.find_ingredients(larger)] == [sweep.trials[0].id]


def test_a_failed_attempt_says_why_and_the_next_reopens_its_run(sweep: Sweep, tmp_path: Path) -> None:
    log = TrialLog(sweep.trials[0], claim=1)
    with pytest.raises(TrialFailed), log:
        raise TrialFailed("The loss is NaN at step 3.")
    first = log.mlflow_run_id
    run = client().get_run(first)
    assert (run.info.status, run.data.tags["stockpot.reason"]) == ("FAILED", "The loss is NaN at step 3.")
    assert record(sweep, 0, tmp_path, claim=2).mlflow_run_id == first
    assert client().get_run(first).info.status == "FINISHED"


def test_an_attempt_that_was_replaced_no_longer_says_how_the_run_ends(sweep: Sweep, tmp_path: Path) -> None:
    orphan = TrialLog(sweep.trials[0], claim=1)
    orphan.__enter__()
    run = record(sweep, 0, tmp_path, claim=2).mlflow_run_id
    error = TrialFailed("Replaced by a later attempt.")
    orphan.__exit__(type(error), error, None)
    after = client().get_run(run)
    assert (after.info.status, after.data.tags["stockpot.reason"]) == ("FINISHED", "")


@pytest.mark.parametrize("point", range(3))
def test_however_late_an_attempt_is_replaced_the_later_one_says_how_the_run_ends(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    early, made = TrialLog(sweep.trials[0], claim=1), []
    early.__enter__()
    replaced = Interrupting(monkeypatch, point, lambda: made.append(record(sweep, 0, tmp_path, claim=2)))
    error = TrialFailed("Anything.")
    early.__exit__(type(error), error, None)
    assert replaced.happened
    after = client().get_run(made[0].mlflow_run_id)
    assert (after.info.status, after.data.tags["stockpot.reason"]) == ("FINISHED", "")


@pytest.mark.parametrize("point", range(3))
def test_a_run_that_its_sweep_ends_is_not_reopened_by_an_earlier_attempt(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: int
) -> None:
    """The latest attempt published the ingredient and died; the earlier one wakes up and fails while the sweep is closed."""
    early, late = TrialLog(sweep.trials[0], claim=1), TrialLog(sweep.trials[0], claim=2)
    early.__enter__()
    late.__enter__()
    run = record_ingredient(late, made_in(tmp_path)).mlflow_run_id
    error = TrialFailed("Anything.")
    woken = Interrupting(monkeypatch, point, lambda: early.__exit__(type(error), error, None))
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": 1})
    assert woken.happened
    after = client().get_run(run)
    assert (after.info.status, after.data.tags["stockpot.reason"]) == ("FINISHED", "")
    late._sampler.close()


@pytest.mark.parametrize("clock", ["own", "same"])
def test_of_two_first_attempts_at_once_both_write_to_one_run(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, clock: str) -> None:
    """Each creates its run before the other looks, and has seen the other's before that may be deleted."""
    both = threading.Barrier(2)

    def look(*about: str) -> Run | None:
        found = find_run(*about)
        both.wait(PATIENCE_S)
        return found

    monkeypatch.setattr(trial_log, "find_run", look)
    if clock == "same":
        monkeypatch.setattr(mlflow_client, "get_current_time_millis", lambda: 10**12)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(TrialLog(sweep.trials[0], claim=claim)._run) for claim in (1, 2)]
    (left,) = search_runs([experiment(sweep.request.model)], of_kind("trial", sweep.id), "attributes.start_time")
    assert [run.result().info.run_id for run in runs] == [left.info.run_id] * 2


def test_points_of_a_trial_that_still_runs_are_left_to_it(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    with TrialLog(sweep.trials[0], claim=1) as log:
        log.metrics({"train/loss": 1.0}, step=0)
        assert replay_metrics() == 0
    assert [point.value for point in client().get_metric_history(log.mlflow_run_id, "train/loss")] == [1.0]


def test_points_of_a_run_that_another_server_keeps_wait_for_it(ledger: str) -> None:
    path = trial_log._spool_folder() / f"{uuid4().hex}.x.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('["train/loss", 1.0, 1, 1]\n')
    assert replay_metrics() == 0
    assert path.exists()
    path.unlink()


def test_an_interrupted_trial_is_killed_not_failed(sweep: Sweep) -> None:
    with pytest.raises(KeyboardInterrupt), TrialLog(sweep.trials[0], claim=1) as log:
        raise KeyboardInterrupt
    assert client().get_run(log.mlflow_run_id).info.status == "KILLED"


def test_an_incomplete_or_foreign_ingredient_is_named(sweep: Sweep, tmp_path: Path) -> None:
    made = record(sweep, 0, tmp_path / "made")
    with pytest.raises(IngredientMismatch, match="sha256"):
        tracking.fetch_ingredient(made.model_copy(update={"weights_sha256": "0" * 64}), tmp_path / "a")
    with pytest.raises(IngredientMismatch, match="is gone"):
        tracking.fetch_ingredient(made.model_copy(update={"model_id": "m-0"}), tmp_path / "b")
    (tmp_path / "made" / "card.json").unlink()
    with pytest.raises(IngredientMismatch, match=r"hands over no card\.json"), TrialLog(sweep.trials[1], claim=1) as log:
        record_ingredient(log, Made(tmp_path / "made", made.weights_sha256, Accuracy(correct=1, seen=2), "t", seconds=0.0))


def test_no_server_is_one_sentence_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ServerUnreachable, match="MLFLOW_TRACKING_URI is not set"):
        tracking.check_server()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ServerUnreachable, match=r"MLFLOW_TRACKING_URI=http://127\.0\.0\.1:9"):
        tracking.check_server()
    assert time.monotonic() - start < SOON_S


def test_metrics_and_the_ingredient_outlive_a_server_that_dies_before_the_end(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, ledger: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said: list[str] = []
    log = TrialLog(sweep.trials[0], say=said.append, claim=1)
    log.__enter__()
    record_ingredient(log, made_in(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert seconds_of_a_hundred_steps(log) < SOON_S
    log.__exit__(None, None, None)
    assert "ended FINISHED, which its run does not say yet: No MLflow server answers" in said[0]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ledger)
    assert replay_metrics() >= 100
    assert len(client().get_metric_history(log.mlflow_run_id, "train/loss")) == 100
    assert replay_metrics() == 0
    assert client().get_run(log.mlflow_run_id).info.status == "RUNNING"
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": 1})
    assert client().get_run(log.mlflow_run_id).info.status == "FINISHED"


def test_a_download_that_breaks_off_is_one_sentence_and_the_next_is_whole(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ledger: str
) -> None:
    made = record(sweep, 0, tmp_path / "made", width=20_000)
    run = tracking.open_sweep(sweep)
    tracking.store_text(run, "card.md", "a" * 100_000)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with faulty_proxy(int(ledger.rpartition(":")[2])) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
        for fault in ("cut", "reset", "stall"):
            proxy.break_next(fault, 1, after=50_000, match=b"model.safetensors")
            with pytest.raises(
                ServerUnreachable, match=f"download of `model.safetensors` from MLFLOW_TRACKING_URI={proxy.endpoint} broke off"
            ):
                tracking.fetch_ingredient(made, tmp_path / fault)
            assert proxy.broken == 1
            assert tracking.fetch_ingredient(made, tmp_path / fault)
        proxy.break_next("cut", 1, after=50_000, match=b"held_out.safetensors")
        with pytest.raises(ServerUnreachable, match=r"download of `held_out.safetensors` .* broke off"):
            tracking.fetch_logits(made, tmp_path / "logits")
        whole = (tmp_path / "made" / "held_out.safetensors").read_bytes()
        for _ in range(2):  # the second time without the server
            assert tracking.fetch_logits(made, tmp_path / "logits").read_bytes() == whole
            monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.endpoint)
        proxy.break_next("cut", 1, after=50_000, match=b"card.md")
        with pytest.raises(ServerUnreachable, match=r"download of `card.md` .* broke off"):
            tracking.read_text(run, "card.md")
        assert tracking.read_text(run, "card.md") == "a" * 100_000


def test_what_is_deleted_between_its_listing_and_its_download_is_named(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ledger: str
) -> None:
    made = record(sweep, 0, tmp_path / "made")
    download = tracking.download_artifacts

    def too_late(**asked: str) -> str:
        delete_stored(made.model_id, "ingredient")
        return download(**asked)

    monkeypatch.setattr(tracking, "download_artifacts", too_late)
    with pytest.raises(
        IngredientMismatch, match=f"Ingredient {made.trial_id} is not what was recorded: .* (is gone|is missing); run its trial"
    ):
        tracking.fetch_ingredient(made, tmp_path / "late")
    run = tracking.open_sweep(sweep)
    tracking.store_text(run, "notes/card.md", "told")
    assert tracking.read_text(run, "notes/card.md") == "told"
    with pytest.raises(RegistryError, match=f"The ledger at {ledger} has no `notes/report.json` any more: it was deleted"):
        tracking.read_text(run, "notes/report.json")
