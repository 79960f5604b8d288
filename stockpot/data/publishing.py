"""Making a snapshot: samples in, content-addressed shards, index and manifest out. The manifest is stored last, by conditional create.

Shards are written through webdataset's own TarWriter with fixed times, so equal samples give equal bytes, whoever writes them and when.
One shard's file and one row per sample are held at a time. A publication that was interrupted goes on after its last stored shard.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tarfile import BLOCKSIZE as BLOCK
from tarfile import TarInfo
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
from webdataset.writer import TarWriter

from stockpot import storage
from stockpot.config import PinnedSnapshot
from stockpot.data.examination import Candidate, Examiner, Problems
from stockpot.data.manifests import Finished, Records, finish, require_several, store_once
from stockpot.data.node_cache import written
from stockpot.data.snapshots import Shard
from stockpot.data.splits import SplitSpec
from stockpot.digests import short
from stockpot.errors import DataError

SHARD_BYTES = 128 * 2**20
"""Default size at which a shard is closed: large enough for storage, small enough that a node fetches several at once."""

EXAMINED_AT_ONCE = 64
"""Samples that are in memory while they are decoded."""


@dataclass(frozen=True)
class Sample:
    """One image, or one text as tokens, with its label, as a source gives it."""

    key: str
    data: bytes
    """An encoded image, or an array of token ids as `stockpot.data.tokens` reads it."""
    label: int
    extension: str = "png"
    """`npy` for tokens."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    """What it is called where it comes from, for whoever has to mend it; default: its key."""


class Source(Protocol):
    """Where samples come from. `identity` changes when the samples do; `samples(n)` goes on after the first n, in the same order."""

    @property
    def identity(self) -> str: ...

    @property
    def total(self) -> int | None: ...

    def samples(self, start: int) -> Iterator[Sample]: ...


@dataclass(frozen=True)
class GivenSamples:
    """Samples at hand. With no identity, an interrupted publication starts again; what is stored already is not stored twice."""

    given: Iterable[Sample]
    identity: str = ""
    total: int | None = None

    def samples(self, start: int) -> Iterator[Sample]:
        """All samples after the first `start`."""
        for place, sample in enumerate(self.given):
            if place >= start:
                yield sample


Progress = Callable[[int, int | None], None]
"""(samples done, samples in all if known), called after every few samples."""


def publish(
    root: str,
    name: str,
    classes: tuple[str, ...],
    source: Source,
    *,
    splits: SplitSpec | str,
    extends: PinnedSnapshot | None = None,
    shard_bytes: int = SHARD_BYTES,
    skip_fraction: float = 0.0,
    least_per_class: int = 1,
    progress: Progress | None = None,
) -> PinnedSnapshot:
    """Store a dataset under `root` and return its snapshot.

    `splits` draws train, held_out and gate (`SplitSpec`), or names the one split of the whole snapshot. `extends` takes over the rule of
    an older snapshot, so that none of its samples changes split. `skip_fraction` is the share of undecodable samples that may stay in,
    always as train. Raises `ProblemsFound` with every problem of the source at once, `DataError` when a split lacks a class.
    """
    require_several(name, classes)
    examiner = Examiner(classes, splits.group_by if isinstance(splits, SplitSpec) else "pixels")
    job = short([root, name, classes, source.identity, shard_bytes, examiner.group_by]) if source.identity else None
    records = Records(root, job)
    finished = records.load()
    done = sum(one.rows.num_rows for one in finished)
    with tempfile.TemporaryDirectory(prefix="stockpot-publish-") as folder, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        samples = source.samples(done)
        waiting = next(samples, None)
        while waiting is not None:
            writing = _Writing(Path(folder) / "shard.tar", len(finished), examiner, pool, shard_bytes)
            waiting = writing.fill(chain([waiting], samples), done, source.total, progress)
            one = writing.store(root)
            records.save(len(finished), one)
            finished.append(one)
            done += one.rows.num_rows
        if not done:
            raise DataError(f"The source of {name} holds no samples; a snapshot needs at least one sample with a label.")
        pinned = finish(
            root, name, classes, finished, folder=Path(folder),
            splits=splits, extends=extends, skip_fraction=skip_fraction, least_per_class=least_per_class,
        )  # fmt: skip
    records.forget()
    return pinned


class _Writing:
    """One shard being written to a local file, hashed on the way."""

    def __init__(self, path: Path, number: int, examiner: Examiner, pool: ThreadPoolExecutor, shard_bytes: int) -> None:
        self.path, self.number, self.examiner, self.pool, self.shard_bytes = path, number, examiner, pool, shard_bytes
        self.problems = Problems()
        self.tables: list[pa.Table] = []
        self.sha256 = hashlib.sha256()

    def fill(self, samples: Iterator[Sample], done: int, total: int | None, progress: Progress | None) -> Sample | None:
        """Write samples until the shard is full; returns the first one that no longer belongs to it."""
        waiting: Sample | None = None
        batch: list[Candidate] = []
        with written(self.path), self.path.open("wb") as file, TarWriter(_Hashing(file, self.sha256), mtime=0, encoder=False) as tar:
            for sample in samples:
                if tar.tarstream.offset >= self.shard_bytes:
                    waiting = sample
                    break
                batch.append(_append(tar, sample))
                done += 1
                if len(batch) == EXAMINED_AT_ONCE:
                    batch = self._examine(batch)
                    if progress:
                        progress(done, total)
            self._examine(batch)
            if progress:
                progress(done, total)
        return waiting

    def _examine(self, batch: list[Candidate]) -> list[Candidate]:
        self.tables.append(self.examiner.rows(self.number, f"{self.number:05d}", batch, self.pool, self.problems))
        return []

    def store(self, root: str) -> Finished:
        """Put the shard where its content says; nothing happens when it is there already."""
        sha256 = self.sha256.hexdigest()
        shard = Shard(key=f"shards/{sha256}.tar", size=self.path.stat().st_size, sha256=sha256, counts={})
        uri = storage.join(root, shard.key)
        store_once(self.path, uri)
        return Finished(shard, pa.concat_tables(self.tables), self.problems)


def _append(tar: TarWriter, sample: Sample) -> Candidate:
    """Write one sample; returns it with the place of its data in the tar."""
    members = {sample.extension: sample.data, "cls": str(sample.label).encode()}
    if sample.fields:
        members["json"] = json.dumps(sample.fields, sort_keys=True).encode()
    offset = tar.tarstream.offset
    for extension in sorted(members):  # TarWriter's order: for each member its header, then whole blocks
        offset += _header_bytes(tar, f"{sample.key}.{extension}")
        if extension == sample.extension:
            break
        offset += -(-len(members[extension]) // BLOCK) * BLOCK
    tar.write({"__key__": sample.key, **members})
    return Candidate(sample.key, offset, sample.data, sample.label, sample.fields, sample.origin)


def _header_bytes(tar: TarWriter, name: str) -> int:
    """One block, and more for a long name or one that is not ASCII."""
    return len(TarInfo(name).tobuf(tar.tarstream.format, tar.tarstream.encoding, tar.tarstream.errors))


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO, sha256: "hashlib._Hash") -> None:
        self.file, self.sha256 = file, sha256

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)
