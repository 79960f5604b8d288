"""Guards: whatever goes away in the middle (the object store under the ledger, the ledger itself, before each step) and however many
soups are released at once, a soup becomes one version and one champion."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from stockpot.config import GateSpec, SoupSpec
from stockpot.errors import ServerUnreachable
from stockpot.ledger import champions, packaging, registry, tracking
from stockpot.ledger.connection import client, experiment, of_kind, search_runs
from stockpot.ledger.stored import delete_stored, stored_bytes
from stockpot.outcomes import Ingredient, SoupReport
from stockpot.release import releasing
from stockpot.release.explaining import reproduce
from stockpot.soup import souping
from stockpot.soup.souping import cook
from stockpot.storage import list_prefix
from tests.faulty_proxy import faulty_proxy
from tests.mlflow_server import free_port, mlflow_server
from tests.object_store import ObjectStore
from tests.tiny_sweep import Ground, finish_trials, tiny_sweep
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LENIENT = GateSpec(gate_tolerance=1.0, shift_tolerance=1.0)


class Surroundings:
    """A ledger on an object store, each of which can go and come back at its address."""

    def __init__(self, root: Path, store: ObjectStore) -> None:
        self._root, self._store = root, store
        self._ports = {"store": free_port(), "ledger": free_port()}
        self._up: dict[str, ExitStack] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._ports['ledger']}"

    @property
    def artifacts(self) -> str:
        return self._store.uri(f"mlflow-{self._ports['ledger']}")

    def start(self, name: str) -> None:
        self._up[name] = ExitStack()
        if name == "store":
            self._up[name].enter_context(faulty_proxy(self._store.port, self._ports["store"]))
        else:
            environ = {**self._store.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports['store']}", "AWS_MAX_ATTEMPTS": "1",
                       "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{self._ports['store']}"}  # fmt: skip
            self._up[name].enter_context(mlflow_server(self._root, self._ports["ledger"], self.artifacts, environ))

    def stop(self, name: str) -> None:
        if up := self._up.pop(name, None):
            up.close()


@pytest.fixture
def surroundings(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Surroundings]:
    (tmp_path / "server").mkdir()
    around = Surroundings(tmp_path / "server", store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", around.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        around.start("store")
        around.start("ledger")
        yield around
    finally:
        around.stop("ledger")
        around.stop("store")


def release(sweep_id: str) -> None:
    """What the soup flow does."""
    report = cook(sweep_id, say=[].append)
    releasing.gate(report, releasing.register(report), GateSpec())


def goes_away(around: Surroundings, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but `what` goes away just before its first call."""

    def call(*arguments: Any, **named: Any) -> Any:
        around.stop(what)
        return function(*arguments, **named)

    return call


def test_a_release_interrupted_before_every_step_registers_once(
    ground: Ground, surroundings: Surroundings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = f"outages-{uuid4().hex[:8]}"
    sweep = tiny_sweep(ground, model, 2)
    finish_trials(ground, sweep, tmp_path)
    for what, step in (("store", "package"), ("ledger", "package"), ("ledger", "_create_model"), ("store", "fetch_version"),
                       ("ledger", "fetch_version"), ("ledger", "set_alias"), ("ledger", "note_change")):  # fmt: skip
        with monkeypatch.context() as patch:
            module = {"package": packaging, "note_change": champions}.get(step, registry)
            patch.setattr(module, step, goes_away(surroundings, what, getattr(module, step)))
            with pytest.raises(ServerUnreachable, match="MLFLOW_TRACKING_URI"):
                release(sweep.id)
        surroundings.start(what)
    release(sweep.id)
    release(sweep.id)
    assert [found.version for found in client().search_model_versions(f"name = '{model}'")] == ["1"]
    assert registry.alias_version(model, "champion") == 1
    assert [line["after"] for line in champions.read_history(model)] == [1]
    assert reproduce(model).version.version == 1


def test_a_soup_interrupted_before_every_step_is_cooked_once_and_scores_nothing_twice(
    ground: Ground, surroundings: Surroundings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tiny_sweep(ground, f"outages-{uuid4().hex[:8]}", 4, SoupSpec(compare=("pruned",)))
    finish_trials(ground, sweep, tmp_path)
    costs, keep = [], souping._record
    for what, module, step in (
        ("store", tracking, "fetch_ingredient"),
        ("ledger", tracking, "fetch_ingredient"),
        ("store", packaging, "package"),
        ("ledger", registry, "log_soup_model"),
        ("store", tracking, "record_report"),
        ("ledger", tracking, "record_report"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, step, goes_away(surroundings, what, getattr(module, step)))
            patch.setattr(souping, "_record", lambda report, *rest: costs.append(report.costs) or keep(report, *rest))
            with pytest.raises(ServerUnreachable, match="MLFLOW_TRACKING_URI"):
                cook(sweep.id, say=[].append)
        surroundings.start(what)
    report = cook(sweep.id, say=[].append)
    assert cook(sweep.id, say=[].append) == report
    assert costs[0]["pruned"].samples > 0, "the first that got so far scored"
    assert report.costs["greedy"].samples == report.costs["pruned"].samples == 0, "and none after it"
    stored = [one for one in client().search_logged_models([experiment(report.model)]) if "stockpot.stored_soup" in one.tags]
    assert [one.model_id for one in stored] == [report.model_id]
    assert len(search_runs([experiment(report.model)], of_kind("soup", sweep.id), "attributes.start_time")) == 1


def test_what_is_deleted_takes_no_room_in_the_object_store(
    ground: Ground, s3: ObjectStore, surroundings: Surroundings, tmp_path: Path
) -> None:
    sweep = tiny_sweep(ground, f"outages-{uuid4().hex[:8]}", 2)
    tracking.open_sweep(sweep)
    one, other = finish_trials(ground, sweep, tmp_path)

    def bytes_of(ingredient: Ingredient) -> int:
        return sum(stored.size for stored in list_prefix(surroundings.artifacts) if ingredient.model_id in stored.uri)

    kept = bytes_of(other)
    assert bytes_of(one) == stored_bytes(one.model_id) > 0
    delete_stored(one.model_id, "ingredient")
    assert (bytes_of(one), bytes_of(other)) == (0, kept)


def released_in_a_process(report: SoupReport, environ: dict[str, str]) -> tuple[int, bool]:
    os.environ.update(environ)
    version = releasing.register(report)
    return version.version, releasing.gate(report, version, LENIENT).promoted


def test_soups_released_at_once_are_one_version_each_and_one_champion(ground: Ground, ledger: str, tmp_path: Path) -> None:
    model = f"outages-{uuid4().hex[:8]}"
    reports = []
    for trials, recipe in ((1, "greedy"), (3, "uniform")):
        sweep = tiny_sweep(ground, model, trials, SoupSpec.model_validate({"recipe": recipe}))
        finish_trials(ground, sweep, tmp_path)
        reports.append(cook(sweep.id, say=[].append))
    environ = {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI", "XDG_CACHE_HOME")}
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        ended = list(pool.map(released_in_a_process, reports * 2, [environ] * 4))
    assert all(promoted for _, promoted in ended)
    assert ended[:2] == ended[2:]
    assert {number for number, _ in ended} == {1, 2} == {int(one.version) for one in client().search_model_versions(f"name = '{model}'")}
    history = champions.read_history(model)
    assert [(line["before"], line["after"]) for line in history] == [
        (None, history[0]["after"]),
        (history[0]["after"], history[1]["after"]),
    ]
    assert registry.alias_version(model, "champion") == history[1]["after"]
    assert registry.alias_version(model, "previous") == history[0]["after"]


def released_until(sweep_id: str, step: str, environ: dict[str, str]) -> None:
    """A release whose process is killed when it comes to a step."""
    os.environ.update(environ)
    setattr(champions if step == "note_change" else registry, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    release(sweep_id)


@pytest.mark.parametrize("step", ["write_tag", "fetch_version", "set_alias", "note_change"])
def test_a_release_killed_between_version_and_alias_is_finished_by_the_next(ground: Ground, ledger: str, tmp_path: Path, step: str) -> None:
    model = f"killed-{uuid4().hex[:8]}"
    sweep = tiny_sweep(ground, model, 1)
    finish_trials(ground, sweep, tmp_path)
    environ = {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI", "XDG_CACHE_HOME")}
    process = multiprocessing.get_context("spawn").Process(target=released_until, args=(sweep.id, step, environ))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL
    assert registry.alias_version(model, "champion") == (1 if step == "note_change" else None)
    release(sweep.id)
    assert [found.version for found in client().search_model_versions(f"name = '{model}'")] == ["1"]
    assert registry.alias_version(model, "champion") == 1
    assert [line["after"] for line in champions.read_history(model)] == [1]
    assert reproduce(model).version.version == 1


def released_beside_another(sweep_id: str, meeting: Path, patience_s: float, environ: dict[str, str]) -> SoupReport:
    """A release that meets the other where nobody has found a soup run, and where nobody has stored the soup."""
    os.environ.update(environ)
    for module, step in ((tracking, "find_run"), (packaging, "package")):
        setattr(module, step, meeting_after(getattr(module, step), meeting / step, patience_s))
    release(sweep_id)
    report = tracking.read_report(sweep_id)
    assert report
    return report


def meeting_after(function: Callable[..., Any], place: Path, patience_s: float) -> Callable[..., Any]:
    """`function`, but after its first call it waits so long for the other process to come as far."""

    def call(*arguments: Any) -> Any:
        found, mine = function(*arguments), place / str(os.getpid())
        if not mine.exists():
            mine.touch()
            deadline = time.monotonic() + patience_s
            while len(list(place.iterdir())) < 2 and time.monotonic() < deadline:
                time.sleep(0.005)
        return found

    return call


@pytest.mark.parametrize(("nodes", "patience_s"), [(1, 3.0), (2, 60.0)])
def test_one_sweep_cooked_by_two_processes_at_once_is_one_soup_run_and_one_version(
    ground: Ground, ledger: str, tmp_path: Path, nodes: int, patience_s: float
) -> None:
    sweep = tiny_sweep(ground, f"outages-{uuid4().hex[:8]}", 2)
    finish_trials(ground, sweep, tmp_path)
    for step in ("find_run", "package"):
        (tmp_path / "meeting" / step).mkdir(parents=True)
    environs = [{"MLFLOW_TRACKING_URI": ledger, "XDG_CACHE_HOME": str(tmp_path / f"node-{number % nodes}")} for number in range(2)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        reports = list(pool.map(released_beside_another, [sweep.id] * 2, [tmp_path / "meeting"] * 2, [patience_s] * 2, environs))
    met = [len(list((tmp_path / "meeting" / step).iterdir())) for step in ("find_run", "package")]
    assert met == [nodes, nodes], "on one node the second waits until the first has cooked"
    report = cook(sweep.id, say=[].append)
    assert {(one.soup_sha256, one.mlflow_run_id, one.steps) for one in reports} == {
        (report.soup_sha256, report.mlflow_run_id, report.steps)
    }
    (run,) = search_runs([experiment(report.model)], of_kind("soup", sweep.id), "attributes.start_time")
    assert (run.info.run_id, run.info.status) == (report.mlflow_run_id, "FINISHED")
    assert [found.version for found in client().search_model_versions(f"name = '{report.model}'")] == ["1"]
    assert registry.alias_version(report.model, "champion") == 1
    assert [line["after"] for line in champions.read_history(report.model)] == [1]
    assert reproduce(report.model).version.soup_sha256 == report.soup_sha256
