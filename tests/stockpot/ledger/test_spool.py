"""Promise: points reach their server once it takes them, whatever it or the disk refused before, and what is lost is counted."""

import fcntl
from pathlib import Path
from unittest.mock import Mock

import pytest

from stockpot.errors import ServerUnreachable
from stockpot.ledger import trial_log
from stockpot.ledger.spool import Point, Spool, replay

POINTS = [Point("train/loss", 1.0 / step, step, step) for step in range(1, 6)]


def refuse(_points: list[Point]) -> None:
    raise ServerUnreachable("not now")


def test_a_full_disk_neither_stops_the_caller_nor_loses_what_is_delivered(tmp_path: Path) -> None:
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    sent: list[Point] = []
    spool = Spool(tmp_path / "full.jsonl", sent.extend)
    spool.add(POINTS)
    assert (spool.close(), spool.lost, sent) == (0, 0, POINTS)


def test_what_neither_disk_nor_server_took_is_counted(tmp_path: Path) -> None:
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    spool = Spool(tmp_path / "full.jsonl", refuse)
    spool.add(POINTS)
    assert (spool.close(), spool.lost) == (5, 5)


def test_a_line_cut_off_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    spool = Spool(path, refuse)
    spool.add(POINTS[:2])
    with path.open("a") as file:
        file.write('\n["train/loss", 0.3')
    spool.add(POINTS[2:])
    assert (spool.close(), spool.lost) == (5, 0)
    sent: list[Point] = []
    assert replay(path, sent.extend) == 5
    assert sent == POINTS
    assert not path.exists()


def test_points_that_two_deliver_at_once_are_delivered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes at each step of the first: before it locks, while it sends, and after all."""
    path = tmp_path / "points.jsonl"
    spool = Spool(path, refuse)
    spool.add(POINTS)
    spool.close()
    sent: list[Point] = []
    lock = fcntl.flock

    def late(file: object, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        assert replay(path, lambda points: sent.extend(points) or replay(path, sent.extend)) == 5
        lock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    assert replay(path, sent.extend) == 0
    assert replay(path, sent.extend) == 0
    assert sent == POINTS
    assert not path.exists()


def test_a_file_delivered_before_its_maker_locked_it_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lock = tmp_path / "points.jsonl", fcntl.flock

    def taken(file: object, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        assert replay(path, refuse) == 0
        lock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", taken)
    spool = Spool(path, refuse)
    spool.add(POINTS)
    assert (spool.close(), spool.lost) == (5, 0)
    sent: list[Point] = []
    assert replay(path, sent.extend) == 5


def answer(status: int) -> Exception:
    """What MLflow's client raises for an HTTP status."""
    from mlflow.exceptions import RestException

    error = RestException({"error_code": "BAD_REQUEST", "message": "no"})
    error.get_http_status_code = lambda: status  # type: ignore[method-assign]
    return error


@pytest.mark.parametrize("status", [401, 403, 429, 400])
def test_points_a_server_refuses_are_kept_and_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    class Client:
        calls = 0

        def log_batch(self, _run: str, metrics: list[object]) -> None:
            Client.calls += 1
            if Client.calls == 1:
                raise answer(status)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(trial_log, "client", Client)
    spool = Spool(tmp_path / "points.jsonl", lambda points: trial_log._send_points("run", points), every_s=0.01)
    spool.add(POINTS)
    assert spool._thread.is_alive()
    while Client.calls < 2:
        spool._thread.join(0.01)
        assert spool._thread.is_alive()
    assert spool.close() == 0


@pytest.mark.parametrize("refused", ["get_run", "log_batch"])
@pytest.mark.parametrize("status", [401, 403, 429, 404, 500])
def test_what_another_trial_left_and_nobody_takes_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, status: int
) -> None:
    path = tmp_path / "stockpot" / "spool" / "run.x.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('["train/loss", 1.0, 1, 1]\n')
    server = Mock()
    server.get_run().info.lifecycle_stage = "active"
    getattr(server, refused).side_effect = answer(status)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(trial_log, "client", lambda: server)
    assert trial_log.replay_metrics() == 0
    assert path.exists()
    getattr(server, refused).side_effect = None
    assert trial_log.replay_metrics() == 1
    assert not path.exists()
