"""The node cache: one download for any number of processes, never half, free space first, and a janitor that spares what is in use."""

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

import pytest

from stockpot import storage
from stockpot.data import node_cache
from stockpot.data.indexing import Index
from stockpot.data.node_cache import NodeCache, locked
from stockpot.data.snapshots import Snapshot, open_snapshot
from stockpot.errors import DataError, Interrupted, SnapshotBroken
from tests.tiny_data import publish_tiny
from tests.waiting import PATIENCE_S, until


@pytest.fixture
def snapshot(tmp_path: Path, node: Path) -> Snapshot:
    return open_snapshot(publish_tiny(f"{tmp_path}/data", 90, splits="test"))


def files(node: Path) -> list[Path]:
    return sorted(path for path in node.glob("sha256/*/*") if path.suffix != ".lock")


def test_a_second_use_is_a_hit_and_reads_nothing(snapshot: Snapshot) -> None:
    first, second = snapshot.fetch_shard(0), snapshot.fetch_shard(0)
    assert (first.hit, first.read_bytes) == (False, snapshot.manifest.shards[0].size)
    assert (second.hit, second.read_bytes) == (True, 0)
    assert first.path.stat().st_mode & 0o222 == 0


def test_other_bytes_than_the_manifests_are_refused_and_nothing_stays(snapshot: Snapshot, node: Path) -> None:
    path = Path(snapshot.shard_uri(1))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(SnapshotBroken, match=r"has [\d,]+ bytes with sha256 \w{12}, the manifest says"):
        snapshot.fetch_shard(1)
    assert files(node) == []


def test_parts_of_dead_processes_are_removed(snapshot: Snapshot) -> None:
    shard = snapshot.manifest.shards[0]
    part = NodeCache().path(shard.sha256).with_suffix(".99999.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    snapshot.fetch_shard(0)
    assert not part.exists()


def test_too_little_space_is_said_before_anything_is_fetched(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, node: Path) -> None:
    monkeypatch.setattr(node_cache, "SPARE_BYTES", 10**18)
    with pytest.raises(DataError, match=r"needs 0\.00 GB, 0\.00 GB are free .* XDG_CACHE_HOME"):
        snapshot.fetch_shard(0)
    assert files(node) == []


def test_eviction_spares_held_snapshots_and_takes_the_oldest_first(
    tmp_path: Path, snapshot: Snapshot, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_snapshot(publish_tiny(f"{tmp_path}/other", 60, splits="train", side=25))
    mine = [snapshot.fetch_shard(number).path for number in range(len(snapshot.manifest.shards))]
    theirs = [other.fetch_shard(number).path for number in range(2)]
    monkeypatch.setattr(NodeCache, "free", lambda self: 10**6 if not theirs[0].exists() else 0)
    with NodeCache().hold(snapshot.digest, snapshot.contents):
        os.utime(mine[0], (1, 1))
        assert NodeCache().evict(10**5) == 1
        assert [path.exists() for path in theirs] == [False, True]
        monkeypatch.setattr(NodeCache, "free", lambda self: 0)
        NodeCache().evict(10**5)
        assert all(path.exists() for path in mine)
        assert not theirs[1].exists()
    NodeCache().evict(10**5)
    assert not any(path.exists() for path in mine)


def _hold(snapshot: Snapshot, ready: "multiprocessing.synchronize.Event") -> None:
    with NodeCache().hold(snapshot.digest, snapshot.contents):
        ready.set()
        time.sleep(600)


def test_a_snapshot_held_by_another_process_is_spared_until_that_process_dies(
    snapshot: Snapshot, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = snapshot.fetch_shard(0).path
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(snapshot, ready))
    holder.start()
    try:
        assert ready.wait(PATIENCE_S)
        monkeypatch.setattr(NodeCache, "free", lambda self: 0)
        NodeCache().evict(1)
        assert kept.exists()
    finally:
        os.kill(holder.pid or 0, signal.SIGKILL)
        holder.join()
    NodeCache().evict(1)
    assert not kept.exists()


def _fill(snapshot: Snapshot, results: "multiprocessing.queues.Queue[int]") -> None:
    results.put(sum(snapshot.fetch_shard(number).read_bytes for number in range(len(snapshot.manifest.shards))))


def test_eight_processes_read_the_dataset_once(snapshot: Snapshot) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_fill, args=(snapshot, results)) for _ in range(8)]
    for worker in workers:
        worker.start()
    read = [results.get(timeout=PATIENCE_S) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(read) == sum(shard.size for shard in snapshot.manifest.shards)


def test_who_waited_for_the_fetch_of_another_shares_its_failure_and_may_try_again(
    snapshot: Snapshot, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of the network is Transient for all of them: their trials are started again."""
    asked, locked = [], node_cache.locked

    def noted(path: Path, *say: Callable[[str], None]) -> AbstractContextManager[TextIO]:
        asked.append(path)
        return locked(path, *say)

    def cut(*_given: object, **_named: object) -> object:
        until(lambda: len(asked) == 2, every_s=0.01)
        raise Interrupted("It stopped after 7 bytes.")

    monkeypatch.setattr(node_cache, "locked", noted)
    monkeypatch.setattr(storage, "fetch_hashed", cut)
    with ThreadPoolExecutor(2) as pool:
        failures = [pool.submit(snapshot.fetch_shard, 0).exception for _ in range(2)]
        assert [(type(failure()), str(failure())) for failure in failures] == [(Interrupted, "It stopped after 7 bytes.")] * 2
    assert len(asked) == 2


def test_what_may_be_had_is_what_eviction_frees(snapshot: Snapshot, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = snapshot.fetch_shard(0).path.stat().st_size
    for kind in ("pixels", "features"):
        (node / kind / "0123456789ab-old").mkdir(parents=True)
        (node / kind / "0123456789ab-old" / "rows.npy").write_bytes(bytes(1000))
    monkeypatch.setattr(NodeCache, "free", lambda self: 0)
    assert NodeCache().evictable([]) == shard + 2000
    assert NodeCache().evictable(snapshot.contents) == 2000
    assert NodeCache().evict(10**9) == 3
    assert NodeCache().evictable([]) == 0


def _fill_slowly(snapshot: Snapshot, begun: "multiprocessing.synchronize.Event") -> None:
    fetch = storage.fetch

    def slow(uri: str, sink: object, **extra: object) -> object:
        def crawl(piece: bytes) -> None:
            sink(piece[:100])  # type: ignore[operator]
            begun.set()
            time.sleep(600)

        return fetch(uri, crawl, **extra)  # type: ignore[arg-type]

    storage.fetch = slow  # type: ignore[assignment]
    snapshot.fetch_shard(0)


def test_a_process_killed_while_filling_leaves_the_other_a_whole_shard(snapshot: Snapshot, node: Path) -> None:
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    victim = context.Process(target=_fill_slowly, args=(snapshot, begun))
    victim.start()
    assert begun.wait(PATIENCE_S)
    results = context.Queue()
    other = context.Process(target=_fill, args=(snapshot, results))
    other.start()
    time.sleep(0.3)
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    assert results.get(timeout=PATIENCE_S) == sum(shard.size for shard in snapshot.manifest.shards)
    other.join()
    assert all(path.suffix == ".tar" for path in files(node))


def test_a_process_that_waits_for_a_stopped_one_says_so_instead_of_waiting_for_ever(
    snapshot: Snapshot, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    victim = context.Process(target=_fill_slowly, args=(snapshot, begun))
    victim.start()
    try:
        assert begun.wait(PATIENCE_S)
        os.kill(victim.pid or 0, signal.SIGSTOP)
        monkeypatch.setattr(node_cache, "STANDSTILL_S", 0.5)
        with pytest.raises(Interrupted, match=r"lock and has got no further than [\d,]+ bytes for 0\.5 s: it is stopped or hangs"):
            snapshot.fetch_shard(0)
    finally:
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
    assert not snapshot.fetch_shard(0).hit


def test_a_failure_is_not_shared_with_those_who_ask_later_whatever_the_clock_says(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_given: object, **_named: object) -> object:
        raise Interrupted("It stopped.")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "fetch_hashed", cut)
        with pytest.raises(Interrupted):
            snapshot.fetch_shard(0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    assert not snapshot.fetch_shard(0).hit


@pytest.mark.parametrize("left", ['[1e9, "Interrupted", "before this node was started"]', '[17.5, "Inter'])
def test_what_a_dead_process_left_in_a_lock_stops_nobody(snapshot: Snapshot, left: str) -> None:
    lock = NodeCache().path(snapshot.manifest.shards[0].sha256).with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(left)
    assert not snapshot.fetch_shard(0).hit


def test_a_cache_that_cannot_be_written_is_one_sentence(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for use in (lambda: snapshot.fetch_shard(0), lambda: snapshot.index, snapshot.fits, lambda: NodeCache().evict(1), NodeCache().free):
        with pytest.raises(DataError, match=r"cannot be written to disk: Not a directory\. Let this user write there"):
            use()


def test_the_failure_is_said_where_the_disk_has_no_room_to_note_it(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(DataError, match=r"cannot be written to disk: No space left on device\. Free some space"):
        snapshot.fetch_shard(0)


def test_what_another_process_renames_under_the_janitors_eyes_is_passed_over(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = snapshot.fetch_shard(0).path
    monkeypatch.setattr(NodeCache, "_idle", lambda self, own=(): [kept.with_suffix(".1.part"), kept])
    monkeypatch.setattr(NodeCache, "free", lambda self: 0)
    assert NodeCache().evictable([]) == kept.stat().st_size
    NodeCache().evict(1)
    assert not kept.exists()


def test_an_index_is_held_while_it_is_opened(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Index.open

    def meddling(parquet: Path, samples: int) -> Index:
        monkeypatch.setattr(NodeCache, "free", lambda self: 0)
        NodeCache().evict(1)
        return opened(parquet, samples)

    monkeypatch.setattr(Index, "open", meddling)
    assert len(snapshot.index.keys(0, 90)) == 90


def test_an_open_index_outlives_its_eviction_and_travels_without_its_rows(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = snapshot.index.keys(0, 90)
    travelled = pickle.dumps(snapshot)
    monkeypatch.setattr(NodeCache, "free", lambda self: 0)
    assert NodeCache().evict(1) >= 2
    assert snapshot.index.keys(0, 90) == keys
    monkeypatch.undo()
    other = pickle.loads(travelled)
    assert "index" not in other.__dict__
    assert other.digest == snapshot.digest


def test_who_waits_for_another_process_says_which_one_and_says_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = tmp_path / "own.lock", list[str]()

    def take() -> None:
        with locked(path, said.append):
            pass

    monkeypatch.setattr(node_cache, "TELL_EVERY_S", 0.2)
    hold = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold, str(path)], stdout=subprocess.PIPE) as holder, ThreadPoolExecutor(1) as other:
        assert holder.stdout
        holder.stdout.readline()
        holder.send_signal(signal.SIGSTOP)
        waiting = other.submit(take)
        until(lambda: len(said) > 2)
        assert not waiting.done()
        holder.kill()
        waiting.result(PATIENCE_S)
    who = rf"Another process on this node \(pid {holder.pid}, stopped\)"
    assert re.fullmatch(rf"{who} holds {path}; waiting until it is done\.", said[0])
    again = rf"{who} still holds {path}, waited for since \d+ s; if it is stopped or hangs, end it\."
    assert all(re.fullmatch(again, line) for line in said[1:3])
