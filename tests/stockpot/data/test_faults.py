"""The fault matrix: a real S3 server behind a proxy that breaks connections. Each case reads every sample, or stops with one sentence that
names the shard, what was found and what was expected. Zero silent loss."""

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from stockpot import s3_bodies, storage
from stockpot.data.shards import TrainReader, pixels
from stockpot.data.snapshots import Snapshot, open_snapshot, pin
from stockpot.errors import ServerUnreachable, SnapshotBroken, StockpotError, StorageError
from tests.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.object_store import ObjectStore, client
from tests.tiny_data import PREPROCESS, publish_tiny
from tests.waiting import PATIENCE_S, SOON_S, until

SAMPLES = 96


@pytest.fixture(scope="module")
def published(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A snapshot of a few shards of 100 kB, all train, on the server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environ.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return open_snapshot(publish_tiny(store.uri("faults"), SAMPLES, shard_bytes=100_000, splits="train", side=40))


@pytest.fixture
def proxy(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3.port) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


def lose_patience(published: Snapshot, monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """Fewer seconds of silence than the ten of every day, once a client is there: making one takes a busy machine seconds of its own, more
    than the four of `storage.check`."""
    assert storage.exists(published.uri)
    monkeypatch.setattr(s3_bodies, "SILENCE_S", seconds)


def read_all(snapshot: Snapshot, reading: str = "cached") -> TrainReader:
    fresh = Snapshot(snapshot.uri, snapshot.manifest)
    reader = TrainReader(fresh, preprocess=PREPROCESS, augment=None, batch_size=16, seed=0, reading=reading)  # type: ignore[arg-type]
    assert sum(len(batch.labels) for batch in reader.batches(0)) == SAMPLES
    return reader


READINGS = pytest.mark.parametrize("reading", ["cached", "streamed"])


@READINGS
@pytest.mark.parametrize("fault", ["cut", "reset", "stall", "mute"])
def test_one_fault_is_repaired_by_range_and_every_sample_is_read(
    published: Snapshot, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault, reading: str
) -> None:
    if fault in ("stall", "mute"):
        lose_patience(published, monkeypatch, 3)
    proxy.break_next(fault, times=1, after=40_000)
    reader = read_all(published, reading)
    assert proxy.broken == 1
    assert reader.counters["retries"] >= 1  # a loaded machine may add a timeout of its own
    assert reader.counters["bytes_from_storage"] == sum(shard.size for shard in published.manifest.shards)


@READINGS
def test_a_cut_of_every_connection_after_some_bytes_still_reads_everything(
    s3: ObjectStore, proxy: FaultyProxy, tmp_path: Path, reading: str
) -> None:
    pinned = publish_tiny(s3.uri(tmp_path.name), SAMPLES, shard_bytes=3_000_000, splits="train", side=180)
    proxy.break_next("cut", times=10**6, after=1_000_000)
    reader = read_all(open_snapshot(pinned), reading)
    assert reader.counters["retries"] >= proxy.broken >= 9


def test_a_store_that_cannot_give_a_range_is_named_and_no_byte_is_taken_twice(
    published: Snapshot, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = s3fs.S3FileSystem._call_s3

    async def from_the_start(self: s3fs.S3FileSystem, method: str, *args: object, **named: object) -> object:
        named.pop("Range", None)
        return await call(self, method, *args, **named)

    lose_patience(published, monkeypatch, 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", from_the_start)
    proxy.break_next("stall", times=10**6, after=40_000)
    with pytest.raises(StorageError, match=r"shards/\w{64}\.tar was asked for from byte [\d,]+ on, and its store cannot give a range"):
        storage.read_bytes(published.shard_uri(0))


@READINGS
@pytest.mark.parametrize(
    ("fault", "after"),
    [
        ("cut", 0),
        pytest.param("cut", 100, marks=pytest.mark.slow),
        pytest.param("reset", 100, marks=pytest.mark.slow),
        pytest.param("mute", 0, marks=pytest.mark.slow),
        pytest.param("stall", 100, marks=pytest.mark.slow),
    ],
)
def test_a_permanent_fault_stops_with_a_sentence_that_names_the_shard(
    published: Snapshot, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault, after: int, reading: str
) -> None:
    lose_patience(published, monkeypatch, 1)
    proxy.break_next(fault, times=10**6, after=after)
    with pytest.raises((StorageError, ServerUnreachable)) as caught:
        read_all(published, reading)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert proxy.endpoint in sentence
    assert "shards/" in sentence or "does not answer" in sentence


@pytest.mark.slow
def test_a_permanent_stall_stops_in_the_end_naming_shard_and_byte(published: Snapshot, proxy: FaultyProxy) -> None:
    proxy.break_next("stall", times=10**6, after=2_000)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"shards/\w{64}\.tar stopped after [\d,]+ of [\d,]+ bytes \(no (byte|answer) for 10 s"):
        read_all(published)
    assert time.monotonic() - started < 60 + SOON_S  # four silences of ten seconds, and a slow machine's share


@pytest.mark.slow
def test_an_endpoint_that_never_answers_stops_in_the_end(published: Snapshot, proxy: FaultyProxy) -> None:
    proxy.break_next("mute", times=10**6, match=b"")
    started = time.monotonic()
    with pytest.raises(StockpotError, match=r"no answer|does not answer"):
        read_all(published)
    assert time.monotonic() - started < 60 + SOON_S  # four silences of ten seconds, and a slow machine's share


def test_an_endpoint_that_never_answers_is_said_soon_when_data_is_pinned(published: Snapshot, proxy: FaultyProxy) -> None:
    proxy.break_next("mute", times=10**6, match=b"")
    started = time.monotonic()
    with pytest.raises(ServerUnreachable, match="no answer within 4 s"):
        pin(published.root)
    assert time.monotonic() - started < SOON_S


def damage(store: ObjectStore, snapshot: Snapshot, change: object) -> str:
    """Replace the last shard's object by a changed copy; returns its key."""
    shard = snapshot.manifest.shards[-1]
    plain = client(store)
    data = plain.cat_file(snapshot.shard_uri(len(snapshot.manifest.shards) - 1))
    plain.pipe_file(f"{snapshot.root}/{shard.key}", change(data))  # type: ignore[operator]
    return shard.key


def _second_member(data: bytes) -> int:
    return data.index(b"s000", 1024)


@pytest.fixture
def own(s3: ObjectStore, tmp_path: Path) -> Snapshot:
    """A snapshot that a test may damage."""
    return open_snapshot(publish_tiny(s3.uri(tmp_path.name), SAMPLES, shard_bytes=100_000, splits="train", side=40))


@READINGS
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data[: _second_member(data)], id="truncated at a member boundary"),
        pytest.param(lambda data: data[: _second_member(data) + 100], id="truncated inside a header"),
        pytest.param(lambda data: data[: len(data) // 2 + 77], id="truncated inside an image"),
        pytest.param(lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:], id="flipped bit in a header"),
        pytest.param(lambda data: data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], id="flipped bit in an image"),
        pytest.param(lambda data: b"", id="zero bytes"),
        pytest.param(lambda data: b"\0" * 10240, id="no members"),
        pytest.param(lambda data: b"<html>moved</html>" * 500, id="an HTML page"),
        pytest.param(lambda data: data + data, id="longer than it was"),
    ],
)
def test_a_damaged_or_replaced_shard_stops_the_reader_naming_shard_found_and_expected(
    s3: ObjectStore, own: Snapshot, change: object, reading: str
) -> None:
    key = damage(s3, own, change)
    expected = next(shard for shard in own.manifest.shards if shard.key == key)
    with pytest.raises(SnapshotBroken) as caught:
        read_all(own, reading)
    sentence = str(caught.value)
    assert key in sentence
    assert f"{expected.size:,} bytes" in sentence
    assert expected.sha256[:12] in sentence


def test_an_evaluation_of_a_damaged_shard_stops_too_and_leaves_no_pixels(s3: ObjectStore, own: Snapshot, tmp_path: Path) -> None:
    damage(s3, own, lambda data: data[:3000] + b"?" + data[3001:])
    with pytest.raises(SnapshotBroken, match=own.manifest.shards[-1].key):
        pixels(own, "train", PREPROCESS)
    assert not list((tmp_path / "cache/stockpot/pixels").glob("*/images.npy"))


@READINGS
def test_an_object_replaced_while_it_is_read_stops_the_reader(s3: ObjectStore, own: Snapshot, proxy: FaultyProxy, reading: str) -> None:
    proxy.break_next("cut", times=1, after=40_000)
    done = threading.Event()

    def replace_after_the_cut() -> None:
        while not proxy.broken:
            time.sleep(0.001)
        for number, shard in enumerate(own.manifest.shards):
            plain.pipe_file(f"{own.root}/{shard.key}", bytes(reversed(contents[number])))
        done.set()

    plain = client(s3)
    contents = [plain.cat_file(f"{own.root}/{shard.key}") for shard in own.manifest.shards]
    thread = threading.Thread(target=replace_after_the_cut)
    thread.start()
    with pytest.raises(SnapshotBroken, match=r"replaced|manifest says"):
        read_all(own, reading)
    assert done.wait(PATIENCE_S)
    thread.join()


def test_an_object_replaced_between_epochs_is_seen_when_streaming_and_harmless_when_cached(s3: ObjectStore, own: Snapshot) -> None:
    cached = TrainReader(own, preprocess=PREPROCESS, augment=None, batch_size=16, seed=0)
    streamed = TrainReader(own, preprocess=PREPROCESS, augment=None, batch_size=16, seed=0, reading="streamed")
    for reader in (cached, streamed):
        assert sum(len(batch.labels) for batch in reader.batches(0)) == SAMPLES
    key = damage(s3, own, lambda data: bytes(reversed(data)))
    assert sum(len(batch.labels) for batch in cached.batches(1)) == SAMPLES
    with pytest.raises(SnapshotBroken, match=key):
        list(streamed.batches(1))


@READINGS
def test_a_missing_shard_is_named(s3: ObjectStore, own: Snapshot, reading: str) -> None:
    client(s3).rm_file(f"{own.root}/{own.manifest.shards[-1].key}")
    with pytest.raises(StorageError, match=own.manifest.shards[-1].key):
        read_all(own, reading)


def _with_a_full_disk(snapshot: Snapshot, cache: str, build: bool, answers: "multiprocessing.queues.Queue[str]") -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    fresh = Snapshot(snapshot.uri, snapshot.manifest)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if build:
        for number in range(len(fresh.manifest.shards)):
            fresh.fetch_shard(number)
        fresh.index  # noqa: B018
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        pixels(fresh, "train", PREPROCESS) if build else fresh.fetch_shard(0)
        answers.put("read")
    except StockpotError as error:
        answers.put(str(error))


@pytest.mark.parametrize("build", [False, True], ids=["fetching a shard", "building pixels"])
def test_a_disk_that_fills_up_is_named_and_nothing_half_is_left(published: Snapshot, s3: ObjectStore, tmp_path: Path, build: bool) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=_with_a_full_disk, args=(published, str(tmp_path / "full"), build, answers))
    process.start()
    sentence = answers.get(timeout=PATIENCE_S)
    process.join()
    assert "cannot be written to disk" in sentence
    assert ("images.npy" if build else published.manifest.shards[0].key) in sentence
    half = [path for path in (tmp_path / "full").rglob("*") if path.suffix == ".part" or path.name == "images.npy"]
    assert half == []
    assert build or not list((tmp_path / "full").rglob("*.tar"))


def _fill(snapshot: Snapshot, answers: "multiprocessing.queues.Queue[int]") -> None:
    answers.put(sum(snapshot.fetch_shard(number).read_bytes for number in range(len(snapshot.manifest.shards))))


def test_two_processes_fill_the_cache_and_one_is_killed_the_other_has_every_shard(
    published: Snapshot, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.break_next("stall", times=1, after=40_000)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    victim = context.Process(target=_fill, args=(published, answers))
    victim.start()
    until(lambda: proxy.broken == 1, every_s=0.02)
    other = context.Process(target=_fill, args=(published, answers))
    other.start()
    time.sleep(0.3)
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    assert answers.get(timeout=PATIENCE_S) == sum(shard.size for shard in published.manifest.shards)
    other.join()
    assert not list((tmp_path / "cache").rglob("*.part"))
    read_all(published)
