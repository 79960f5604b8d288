"""The storage door: files and S3 behave alike; conditional create decides races; bad credentials, buckets, prefixes and silent servers are
one sentence in under five seconds."""

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest
import s3fs

import stockpot.s3
from stockpot import storage
from stockpot.errors import ObjectExists, ObjectMissing, ServerUnreachable, SnapshotBroken, StorageError, StorageRefused
from tests.object_store import ObjectStore
from tests.waiting import SOON_S


@pytest.fixture(params=["path", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        store: ObjectStore = request.getfixturevalue("s3")
        return store.uri(f"storage-{tmp_path.name}")
    return str(tmp_path / "root") if request.param == "path" else f"file://{tmp_path}/root"


def test_what_is_written_is_read(root: str) -> None:
    storage.write_bytes(storage.join(root, "a/b"), b"one")
    storage.write_bytes(storage.join(root, "a/b"), b"two")
    assert storage.read_bytes(storage.join(root, "a/b")) == b"two"
    assert storage.exists(storage.join(root, "a/b"))
    assert not storage.exists(storage.join(root, "a"))


def test_the_second_conditional_create_is_refused_and_changes_nothing(root: str) -> None:
    uri = storage.join(root, "once")
    storage.write_bytes(uri, b"first", create=True)
    with pytest.raises(ObjectExists, match="once"):
        storage.write_bytes(uri, b"second", create=True)
    assert storage.read_bytes(uri) == b"first"


def test_a_listing_gives_every_object_below_a_prefix_with_its_size(root: str) -> None:
    for name in ("p/1", "p/2/3", "q"):
        storage.write_bytes(storage.join(root, name), b"x" * len(name))
    assert [(item.uri, item.size) for item in storage.list_prefix(storage.join(root, "p/"))] == [
        (storage.join(root, "p/1"), 3),
        (storage.join(root, "p/2/3"), 5),
    ]
    assert storage.list_prefix(storage.join(root, "none/")) == []


def test_a_file_goes_up_and_comes_down_whole_and_a_wrong_hash_is_refused(root: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(5 * 2**20 + 17))
    storage.upload(source, storage.join(root, "big"))
    storage.download(storage.join(root, "big"), target)
    assert target.read_bytes() == source.read_bytes()
    target.unlink()
    with pytest.raises(SnapshotBroken, match="sha256"):
        storage.download(storage.join(root, "big"), target, sha256="0" * 64)
    assert not target.exists()
    assert not list(tmp_path.glob(".stockpot-*"))


def test_an_empty_object_is_read_as_empty(root: str) -> None:
    storage.write_bytes(storage.join(root, "empty"), b"")
    assert storage.read_bytes(storage.join(root, "empty")) == b""


def test_names_are_what_they_are_whatever_letters_they_have(root: str) -> None:
    names = ["ä ö/b c#1?.txt", "a[1]/[x]*.txt", "a%20b/c+d.txt"]
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())
    assert sorted(item.uri for item in storage.list_prefix(f"{root}/")) == sorted(storage.join(root, name) for name in names)
    for name in names:
        assert storage.read_bytes(storage.join(root, name)) == name.encode()
        assert [item.uri for item in storage.list_prefix(storage.join(root, name)[:-2])] == [storage.join(root, name)]
    assert storage.folders(root) == ["a%20b", "a[1]", "ä ö"]


def test_links_are_followed_once_and_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "deep" / "1").write_bytes(b"1")
    root = tmp_path / "root"
    root.mkdir()
    (root / "folder").symlink_to(tmp_path / "real")
    (root / "again").symlink_to(tmp_path / "real" / "deep")
    (root / "file").symlink_to(tmp_path / "real" / "deep" / "1")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "deep" / "round").symlink_to(root)
    assert [item.uri.removeprefix(f"{root}/") for item in storage.list_prefix(f"{root}/")] == ["again/1", "file", "folder/deep/1"]
    (root / "lost").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ObjectMissing, match=rf"{root}/lost is a link to {tmp_path}/unmounted, where nothing is"):
        storage.list_prefix(f"{root}/")


def test_a_store_that_passes_over_conditions_is_found_out(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.uri("passing", "over")
    storage.write_bytes(uri, b"old content")
    etag = storage.list_prefix(uri)[0].etag
    storage.write_bytes(uri, b"new content!")
    call = s3fs.S3FileSystem._call_s3

    async def without_if_match(self: s3fs.S3FileSystem, method: str, *args: object, **named: object) -> object:
        named.pop("IfMatch", None)
        return await call(self, method, *args, **named)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", without_if_match)
    with pytest.raises(SnapshotBroken, match="replaced"):
        storage.fetch(uri, lambda _: None, etag=etag)


def test_an_upload_that_nobody_reads_is_given_up(s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes(12 * 2**20))
    monkeypatch.setattr("stockpot.s3.CALL_S", 1)
    monkeypatch.setattr("stockpot.s3.SLOWEST_BYTES_PER_S", 2**24)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ServerUnreachable, match=r"no answer within 1\.75 s"):
            storage.upload(big, s3.uri("some"))
        assert time.monotonic() - started < SOON_S


def test_what_is_missing_is_named(root: str) -> None:
    with pytest.raises(ObjectMissing, match="nowhere"):
        storage.read_bytes(storage.join(root, "nowhere"))
    with pytest.raises(ObjectMissing):
        storage.check(storage.join(root, "nowhere"))
    storage.check(storage.join(root, "nowhere"), missing=None)
    storage.remove(storage.join(root, "nowhere"))


def test_an_object_replaced_since_it_was_listed_is_refused(root: str) -> None:
    uri = storage.join(root, "changing")
    storage.write_bytes(uri, b"old content")
    etag = storage.list_prefix(uri)[0].etag
    storage.write_bytes(uri, b"new content!")
    with pytest.raises(SnapshotBroken, match="replaced"):
        storage.fetch(uri, lambda _: None, etag=etag)


def test_a_disk_that_cannot_be_written_is_named_not_the_server(root: str) -> None:
    storage.write_bytes(storage.join(root, "data"), b"x" * 1000)

    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        storage.fetch(storage.join(root, "data"), full)


def test_large_uploads_are_created_once_too(s3: ObjectStore, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(34 * 2**20))
    storage.upload(big, s3.uri("large"), create=True)
    with pytest.raises(ObjectExists):
        storage.upload(big, s3.uri("large"), create=True)


NO_KEY: dict[str, str | None] = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, StorageRefused, ["refused", "0042", "127.0.0.1"]),
        ({"AWS_ACCESS_KEY_ID": "NOBODYKNOWS9999"}, StorageRefused, ["9999", "s3://stockpot/some"]),
        (NO_KEY, StorageRefused, ["No key for s3://stockpot/some is known", "no key in the environment", "stockpot stack up"]),
        ({**NO_KEY, "AWS_PROFILE": "nobodys"}, StorageRefused, ["No key", "profile nobodys", "could not be found"]),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ServerUnreachable, ["127.0.0.1:9", "AWS_ENDPOINT_URL"]),
    ],
)
def test_a_store_that_refuses_is_said_soon(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], error: type[Exception], words: list[str]
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    started = time.monotonic()
    with pytest.raises(error) as caught:
        storage.check(s3.uri("some"))
    assert time.monotonic() - started < SOON_S
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_role_is_not_waited_for_where_nobody_gives_one(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in NO_KEY:
            monkeypatch.delenv(name)
        stockpot.s3._filesystem.cache_clear()
        started = time.monotonic()
        with pytest.raises(StorageRefused, match="nothing was asked of S3"):
            storage.check(s3.uri("some"))
        assert time.monotonic() - started < SOON_S
        silent.settimeout(0)
        silent.accept()  # a role was asked for


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("s3:/b/x", "s3://b/x"),
        ("s3:///b/x", "s3://b/x"),
        ("s3:b", "s3://b"),
        ("S3://b", "s3://b"),
        ("gs://b", "s3://b"),
        ("file:/x", "file:///x"),
    ],
)
def test_what_is_written_almost_as_an_address_is_refused(text: str, meant: str) -> None:
    for use in (storage.address, storage.read_bytes, storage.check):
        with pytest.raises(StorageError, match=rf"'{text}' is no address \(did you mean {meant}\?\)"):
            use(text)


def test_a_path_is_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.address("a:b/c") == f"{tmp_path}/a:b/c"
    for text in ("/d", "s3://b/x", "file:///d"):
        assert storage.address(text) == text


def test_a_busy_machine_is_not_taken_for_a_store_that_is_away(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(s3.uri("busy"), b"here")
    making = s3fs.S3FileSystem.set_session

    async def slowly(self: s3fs.S3FileSystem, *args: object, **named: object) -> object:
        if self._s3 is None:
            await asyncio.sleep(2)
        return await making(self, *args, **named)

    monkeypatch.setattr(s3fs.S3FileSystem, "set_session", slowly)
    stockpot.s3._filesystem.cache_clear()
    stockpot.s3.check(s3.uri("busy"), timeout_s=1)


@pytest.mark.parametrize(
    ("uri", "words"), [("s3://no-such-bucket/x", "no bucket `no-such-bucket`"), ("s3://stockpot/empty/", "Nothing is stored")]
)
def test_missing_buckets_and_empty_prefixes_are_said_soon(s3: ObjectStore, uri: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(ObjectMissing, match=words):
        storage.check(uri)
    assert time.monotonic() - started < SOON_S


def test_an_endpoint_that_never_answers_is_said_soon(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ServerUnreachable, match="no answer"):
            storage.check(s3.uri("some"))
        assert time.monotonic() - started < SOON_S
