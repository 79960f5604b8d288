"""Rows of a split are computed once a node, kept as they were, and a killed computation goes on behind the last whole piece."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stockpot.data import feature_store
from stockpot.data.feature_store import Piece, stored_rows
from stockpot.data.node_cache import NodeCache
from stockpot.errors import DataError

TRUE = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def pieces_of_four(monkeypatch: pytest.MonkeyPatch, node: Path) -> None:
    monkeypatch.setattr(feature_store, "PIECE", 4)


class Source:
    """Makes pieces, and remembers from where on it was asked."""

    def __init__(self, until: int = 10) -> None:
        self.asked: list[int] = []
        self.until = until

    def __call__(self, first: int) -> Iterator[Piece]:
        self.asked.append(first)
        for start in range(first, 10, 4):
            if start >= self.until:
                os.kill(os.getpid(), signal.SIGKILL)
            yield Piece(TRUE[start : start + 4], [1] if start == 4 else [])


def test_rows_are_computed_once_and_read_only() -> None:
    source = Source()
    for _ in range(2):
        found = stored_rows("a-b", (10, 3), source)
        assert np.array_equal(found.rows, TRUE)
        assert found.unreadable.tolist() == [5]
    assert source.asked == [0]
    assert not found.rows.flags.writeable


def test_a_killed_computation_goes_on_behind_its_last_whole_piece() -> None:
    if not (child := os.fork()):
        try:
            stored_rows("a-b", (10, 3), Source(until=8))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    source = Source()
    assert np.array_equal(stored_rows("a-b", (10, 3), source).rows, TRUE)
    assert source.asked == [8]


@pytest.mark.parametrize(
    ("name", "edit", "asked"),
    [
        ("rows.npy", lambda data: data[:-70] + bytes([data[-70] ^ 1]) + data[-69:], [4]),  # in the second piece
        ("rows.npy", lambda data: data[:-8], [0]),
        ("rows.npy", lambda data: b"", [0]),
        ("journal", lambda data: data[:-5], [8]),
        ("journal", lambda data: data.rpartition(b"\n[")[0], [8]),
        ("journal", lambda data: b"", [0]),
    ],
    ids=["a flipped bit", "rows cut short", "no rows", "a journal cut short", "a journal cut at a line's end", "no journal"],
)
def test_what_is_damaged_is_computed_again(node: Path, name: str, edit: object, asked: list[int]) -> None:
    stored_rows("a-b", (10, 3), Source())
    path = node / "features" / "a-b" / name
    path.write_bytes(edit(path.read_bytes()))  # type: ignore[operator]
    source = Source()
    assert np.array_equal(stored_rows("a-b", (10, 3), source).rows, TRUE)
    assert source.asked == asked
    assert stored_rows("a-b", (10, 3), source).unreadable.tolist() == [5]
    assert source.asked == asked


def test_a_disk_that_cannot_be_written_is_said_and_another_fault_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(_first: int) -> Iterator[Piece]:
        raise OSError("the network is down")
        yield

    with pytest.raises(OSError, match=r"^the network is down$"):
        stored_rows("a-b", (10, 3), unreadable)
    monkeypatch.setattr(os, "fsync", lambda _file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match=r"rows.npy cannot be written to disk: No space left on device. Free some space"):
        stored_rows("a-b", (10, 3), Source())


def test_rows_of_another_shape_are_not_taken_for_these() -> None:
    stored_rows("a-b", (10, 3), Source())
    wide = np.arange(20, dtype=np.float32).reshape(10, 2)
    found = stored_rows("a-b", (10, 2), lambda first: iter([Piece(wide[at : at + 4], []) for at in range(first, 10, 4)]))
    assert np.array_equal(found.rows, wide)


def test_the_janitor_takes_what_no_process_works_on(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NodeCache, "require_space", lambda self, size: None)
    monkeypatch.setattr(NodeCache, "free", lambda self: 0)
    stored_rows("a-old", (10, 3), Source())

    def meddling(first: int) -> Iterator[Piece]:
        assert NodeCache().evict(1) == 1
        yield from Source()(first)

    assert np.array_equal(stored_rows("a-new", (10, 3), meddling).rows, TRUE)
    assert sorted(path.name for path in (node / "features").iterdir() if path.is_dir()) == ["a-new"]
