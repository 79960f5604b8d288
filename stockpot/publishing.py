"""Making a snapshot: samples in, content-addressed shards, index and manifest out. The manifest is stored last, by conditional create.

Shards are written through webdataset's own TarWriter with fixed times, so equal samples give equal bytes, whoever writes them and when.
One shard's file and one row per sample are held at a time. A publication that was interrupted goes on after its last stored shard.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.writer import TarWriter

from stockpot import storage
from stockpot.config import PinnedSnapshot
from stockpot.digests import file_digest, short
from stockpot.errors import BadRequest, DataError
from stockpot.examination import ROWS, Examiner, Problems
from stockpot.indexing import SCHEMA, write_parquet
from stockpot.snapshots import IndexFile, Manifest, Shard, commit, open_snapshot
from stockpot.splits import SPLITS, SplitRule, SplitSpec, assign, draw, point

SHARD_BYTES = 128 * 2**20
"""Default size at which a shard is closed: large enough for storage, small enough that a node fetches several at once."""


@dataclass(frozen=True)
class Sample:
    """One picture with its label, as a source gives it."""

    key: str
    image: bytes
    label: int
    extension: str = "png"
    fields: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Where samples come from. `identity` changes when the samples do; `samples(n)` goes on after the first n, in the same order."""

    identity: str
    total: int | None

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
"""(samples done, samples in all if known): called after every sample."""


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
    an older snapshot, so that none of its samples changes split. `skip_fraction` is the share of undecodable pictures that may stay in,
    always as train. Raises `ProblemsFound` with every problem of the source at once, `DataError` when a split lacks a class.
    """
    if isinstance(splits, str) and splits not in SPLITS:
        raise BadRequest(f"There is no split `{splits}`; a whole snapshot is one of {', '.join(SPLITS)}.")
    job = short([root, name, classes, source.identity, shard_bytes]) if source.identity else None
    problems = Problems()
    examiner = Examiner(classes, problems, group_by=splits.group_by if isinstance(splits, SplitSpec) else "pixels")
    writer = _ShardWriter(root, job, shard_bytes, examiner)
    shards, tables = writer.stored()
    done = sum(table.num_rows for table in tables)
    with tempfile.TemporaryDirectory(prefix="stockpot-publish-") as folder:
        for shard, table in writer.write(source.samples(done), Path(folder), done, source.total, progress):
            shards.append(shard)
            tables.append(table)
        pinned = finish(
            root, name, classes, shards, tables, problems,
            splits=splits, extends=extends, skip_fraction=skip_fraction, least_per_class=least_per_class, folder=Path(folder),
        )  # fmt: skip
    writer.forget()
    return pinned


def finish(
    root: str,
    name: str,
    classes: tuple[str, ...],
    shards: list[Shard],
    tables: list[pa.Table],
    problems: Problems,
    *,
    splits: SplitSpec | str,
    extends: PinnedSnapshot | None,
    skip_fraction: float,
    least_per_class: int,
    folder: Path,
) -> PinnedSnapshot:
    """Draw the splits over all rows, check them, store the index and then the manifest."""
    rows = _joined(tables)
    problems.add_duplicates(rows, [shard.key for shard in shards])
    unreadable = problems.raise_unless_within(skip_fraction, rows.num_rows)
    codes, rule = _split(rows, splits, extends)
    _check_classes(rows["label"].to_numpy(), codes, classes, least_per_class)
    index = folder / "index.parquet"
    table = write_parquet(rows.append_column("split", pa.array(codes, pa.int8())).select(SCHEMA.names).cast(SCHEMA), index)
    sha256 = file_digest(index)
    key = f"index/{sha256}.parquet"
    _store_once(index, storage.join(root, key))
    counts = np.zeros((len(shards), len(SPLITS)), np.int64)
    np.add.at(counts, (rows["shard"].to_numpy(), codes), 1)
    manifest = Manifest(
        name=name,
        classes=classes,
        splits={split: int(n) for split, n in zip(SPLITS, counts.sum(0), strict=True) if n},
        rule=rule,
        unreadable=unreadable,
        shards=tuple(
            shard.model_copy(update={"counts": {split: int(n) for split, n in zip(SPLITS, row, strict=True) if n}})
            for shard, row in zip(shards, counts, strict=True)
        ),
        index=IndexFile(key=key, size=index.stat().st_size, sha256=sha256, samples=table.num_rows),
    )
    return commit(root, manifest)


class _ShardWriter:
    """Fills, stores and records one shard after the other."""

    def __init__(self, root: str, job: str | None, shard_bytes: int, examiner: Examiner) -> None:
        self.root, self.job, self.shard_bytes, self.examiner = root, job, shard_bytes, examiner
        self.records = storage.join(root, f"publishing/{job}/") if job else None

    def stored(self) -> tuple[list[Shard], list[pa.Table]]:
        """Shards of an interrupted publication of the same source, in order."""
        shards: list[Shard] = []
        tables: list[pa.Table] = []
        for record in storage.list_prefix(self.records) if self.records else ():
            table = pq.read_table(pa.BufferReader(storage.read_bytes(record.uri)))
            shards.append(Shard.model_validate_json((table.schema.metadata or {})[b"shard"]))
            tables.append(table)
        return shards, tables

    def write(
        self, samples: Iterator[Sample], folder: Path, done: int, total: int | None, progress: Progress | None
    ) -> Iterator[tuple[Shard, pa.Table]]:
        number = len(self.stored()[0]) if done else 0
        waiting = next(samples, None)
        while waiting is not None:
            path = folder / "shard.tar"
            rows: list[dict[str, Any]] = []
            with path.open("wb") as file:
                hashing = _Hashing(file)
                with TarWriter(hashing, mtime=0, encoder=False) as tar:
                    while waiting is not None and (tar.tarstream.offset < self.shard_bytes or not rows):
                        rows.append(self._append(tar, waiting, number))
                        done += 1
                        if progress:
                            progress(done, total)
                        waiting = next(samples, None)
            sha256 = hashing.sha256.hexdigest()
            shard = Shard(key=f"shards/{sha256}.tar", size=path.stat().st_size, sha256=sha256, counts={})
            table = pa.Table.from_pylist(rows, schema=ROWS)
            _store_once(path, storage.join(self.root, shard.key))
            self._record(number, shard, table)
            yield shard, table
            number += 1

    def _append(self, tar: TarWriter, sample: Sample, shard: int) -> dict[str, Any]:
        members = {sample.extension: sample.image, "cls": str(sample.label).encode()}
        if sample.fields:
            members["json"] = json.dumps(sample.fields, sort_keys=True).encode()
        offset = tar.tarstream.offset
        for extension in sorted(members):  # the order TarWriter writes them in: one 512-byte header, then whole blocks
            if extension == sample.extension:
                break
            offset += 512 + -(-len(members[extension]) // 512) * 512
        row = self.examiner.row(
            shard, f"shard {shard}", sample.key, offset + 512, sample.image, sample.label, sample.fields, sample.extension
        )
        tar.write({"__key__": sample.key, **members})
        return row

    def _record(self, number: int, shard: Shard, table: pa.Table) -> None:
        if self.records:
            sink = pa.BufferOutputStream()
            pq.write_table(table.replace_schema_metadata({b"shard": shard.model_dump_json().encode()}), sink)
            storage.write_bytes(storage.join(self.records, f"{number:06d}.parquet"), sink.getvalue().to_pybytes())

    def forget(self) -> None:
        """Remove the records of a finished publication."""
        for record in storage.list_prefix(self.records) if self.records else ():
            storage.remove(record.uri)


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def _store_once(path: Path, uri: str) -> None:
    """Content-addressed, so an object of that name is that object."""
    if not storage.exists(uri):
        storage.upload(path, uri)


def _joined(tables: list[pa.Table]) -> pa.Table:
    rows = pa.concat_tables(table.replace_schema_metadata(None) for table in tables) if tables else None
    if rows is None or not rows.num_rows:
        raise DataError("The source holds no samples: a snapshot needs at least one picture with a label.")
    return rows


def _split(rows: pa.Table, splits: SplitSpec | str, extends: PinnedSnapshot | None) -> tuple[Any, SplitRule | None]:
    if isinstance(splits, str):
        return np.full(rows.num_rows, SPLITS.index(splits), np.int8), None
    old = open_snapshot(extends).manifest.rule if extends else None
    salt = old.salt if old else splits.salt
    points = np.fromiter((point(group, salt) for group in rows["group"].to_pylist()), np.uint64, rows.num_rows)
    rule = old or draw(points, splits)
    codes = assign(points, rule)
    codes[~rows["readable"].to_numpy()] = 0
    return codes, rule


def _check_classes(labels_N: Any, codes_N: Any, classes: tuple[str, ...], least: int) -> None:
    for code in np.unique(codes_N):
        counts = np.bincount(labels_N[codes_N == code], minlength=len(classes))
        short_of = [f"{classes[label]} ({counts[label]})" for label in np.flatnonzero(counts < least)]
        if short_of:
            raise DataError(
                f"Split {SPLITS[code]} has fewer than {least} samples of {len(short_of)} of {len(classes)} classes: {', '.join(short_of[:5])}. "
                "Add samples, draw a larger share, or lower `least_per_class`."
            )
