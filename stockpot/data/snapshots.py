"""A dataset is a snapshot: one immutable manifest that names every shard by size and sha256, every sample by an index, and every split.

A dataset is a folder in object storage:

    shards/<sha256>.tar         plain WebDataset tars, content-addressed (or the user's own tars, when registered)
    index/<sha256>.parquet      one row per sample: key, shard, offset, size, label, digest, split
    snapshots/<digest>.json     the manifest, written last and never overwritten; its digest is the snapshot's identity
    snapshots/latest            the digest published last: what the folder's own address stands for
"""

import hashlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError

from stockpot import storage
from stockpot.config import PinnedSnapshot
from stockpot.data.indexing import Index
from stockpot.data.node_cache import Fetched, NodeCache
from stockpot.data.splits import SPLITS, SplitRule
from stockpot.digests import canonical, digest
from stockpot.errors import BadRequest, ObjectExists, ObjectMissing, SnapshotBroken, SnapshotMissing
from stockpot.fields import Closed


class Shard(Closed):
    """One tar file."""

    key: str = Field(description="Relative to the dataset, or a whole address.")
    size: int = Field(ge=0, description="Bytes.")
    sha256: str
    etag: str | None = Field(None, description="Of a registered shard when it was read; its change means the object was replaced.")
    counts: dict[str, int] = Field(description="Samples of each split in this shard; absent is 0.")


class IndexFile(Closed):
    """The parquet file with one row per sample, sorted by split, shard and offset."""

    key: str
    size: int = Field(gt=0)
    sha256: str
    samples: int = Field(gt=0)


class Manifest(Closed):
    """Everything a reader needs to read exactly the same samples, for ever."""

    format: Literal["stockpot-snapshot/1"] = "stockpot-snapshot/1"
    name: str
    classes: tuple[str, ...] = Field(min_length=1, description="Class names; a label is a place in this list.")
    splits: dict[str, int] = Field(description="Samples of each split.")
    rule: SplitRule | None = Field(description="How held_out and gate were drawn; None where the whole snapshot is one split.")
    unreadable: int = Field(0, description="Samples of the train split that could not be decoded when the snapshot was made.")
    shards: tuple[Shard, ...] = Field(min_length=1)
    index: IndexFile


@dataclass(frozen=True)
class Snapshot:
    """An opened snapshot: its manifest is verified, its index is fetched on first use."""

    uri: str
    manifest: Manifest

    @cached_property
    def digest(self) -> str:
        """sha256 of the manifest's canonical JSON."""
        return digest(self.manifest)

    @property
    def root(self) -> str:
        """Address of the dataset folder."""
        return self.uri.rsplit("/snapshots/", 1)[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by label."""
        return self.manifest.classes

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each split."""
        return self.manifest.splits

    @cached_property
    def index(self) -> Index:
        """Where every sample lies; fetched into the node cache and memory-mapped."""
        file = self.manifest.index
        with self.held():
            parquet = NodeCache().ensure(storage.join(self.root, file.key), file.sha256, file.size, suffix=".parquet").path
            return Index.open(parquet, file.samples)

    def held(self) -> AbstractContextManager[None]:
        """While it is entered, this node's janitor spares what belongs to the snapshot."""
        return NodeCache().hold(self.digest, self.contents)

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process, which maps the index by itself."""
        return {name: value for name, value in self.__dict__.items() if name != "index"}

    @property
    def contents(self) -> list[str]:
        """sha256 of every file a reader needs on its node."""
        return [self.manifest.index.sha256, *(shard.sha256 for shard in self.manifest.shards)]

    def first(self, split: str) -> int:
        """The id of a split's first sample. Raises `BadRequest` when the snapshot has no such split."""
        if split not in self.counts:
            raise BadRequest(f"Snapshot {self.digest[:12]} ({self.manifest.name}) has no split `{split}`, only {self.counts}.")
        return sum(self.counts.get(earlier, 0) for earlier in SPLITS[: SPLITS.index(split)])

    def fetch_shard(self, shard: int) -> Fetched:
        """A shard's verified file in the node cache."""
        entry = self.manifest.shards[shard]
        return NodeCache().ensure(self.shard_uri(shard), entry.sha256, entry.size, etag=entry.etag)

    def is_cached(self, shard: int) -> bool:
        """Whether this node has the shard."""
        return NodeCache().path(self.manifest.shards[shard].sha256).exists()

    def missing_bytes(self) -> int:
        """Bytes of shards that this node would have to fetch."""
        return sum(shard.size for number, shard in enumerate(self.manifest.shards) if not self.is_cached(number))

    def fits(self) -> bool:
        """Whether this node's disk can hold all shards, others evicted."""
        return self.missing_bytes() <= NodeCache().evictable(self.contents)

    def read_shard(self, shard: int) -> tuple[bytearray, int]:
        """A shard's verified bytes straight from storage, and the retries that took. Raises `SnapshotBroken`."""
        entry, uri = self.manifest.shards[shard], self.shard_uri(shard)
        data = bytearray()
        fetched = storage.fetch(uri, data.extend, etag=entry.etag)
        sha256 = hashlib.sha256(data).hexdigest()
        if (len(data), sha256) != (entry.size, entry.sha256):
            raise SnapshotBroken(
                f"Shard {uri} has {len(data):,} bytes with sha256 {sha256[:12]}, the manifest says {entry.size:,} bytes with "
                f"{entry.sha256[:12]}: it was damaged or replaced. Restore it, or publish a new snapshot."
            )
        return data, fetched.retries

    def shard_uri(self, shard: int) -> str:
        """Address of a shard by its place in the manifest."""
        return storage.join(self.root, self.manifest.shards[shard].key)

    def where(self, sample: int) -> str:
        """A sample by its shard and key, for whoever has to find it."""
        shard = self.manifest.shards[int(self.index.rows[sample]["shard"])].key
        return f"shard {shard}, sample {self.index.keys(sample, sample + 1)[0]!r}"

    def require_classes(self, classes: tuple[str, ...]) -> None:
        """Raise `SnapshotBroken` unless a model's classes are this snapshot's, in the same order."""
        if classes != self.classes:
            raise SnapshotBroken(
                f"Snapshot {self.digest[:12]} ({self.manifest.name}) has {len(self.classes)} classes {_few(self.classes)}, the model has "
                f"{len(classes)} {_few(classes)}; use a snapshot published with the model's classes."
            )


def pin(uri: str) -> PinnedSnapshot:
    """Address and digest of a snapshot, given its manifest, or a dataset: then the one published last. Raises `SnapshotMissing`, and
    `SnapshotBroken` for a manifest that is not the one its name says.

    A store that does not answer or refuses is said within five seconds.
    """
    try:
        storage.check(uri)
        if not uri.endswith(".json"):
            latest = storage.read_bytes(storage.join(uri, "snapshots/latest")).decode().strip()
            uri = storage.join(uri, f"snapshots/{latest}.json")
    except ObjectMissing as error:
        raise SnapshotMissing(f"{uri} holds no snapshot: {error}") from error
    pinned, named = PinnedSnapshot(uri=uri, digest=digest(_read(uri))), re.search(r"/([0-9a-f]{64})\.json$", uri)
    if named and named[1] != pinned.digest:
        raise _replaced(pinned, named[1])
    return pinned


def open_snapshot(pinned: PinnedSnapshot) -> Snapshot:
    """Read and verify the manifest. Raises `SnapshotMissing`, or `SnapshotBroken` when it is not the pinned one."""
    manifest = _read(pinned.uri)
    if (found := digest(manifest)) != pinned.digest:
        raise _replaced(PinnedSnapshot(uri=pinned.uri, digest=found), pinned.digest)
    return Snapshot(pinned.uri, manifest)


def shared_samples(one: Snapshot, its: Sequence[str], other: Snapshot, others: Sequence[str]) -> int:
    """How many samples of one snapshot's splits (`its`) show what any of the other's (`others`) shows: equal pixels, or tokens."""
    return int(pc.sum(pc.is_in(_shown(one, its), value_set=_shown(other, others))).as_py() or 0)


def _shown(snapshot: Snapshot, splits: Sequence[str]) -> pa.ChunkedArray:
    """Content digests of the samples of those splits that the snapshot has."""
    there = [(snapshot.first(split), snapshot.counts[split]) for split in splits if split in snapshot.counts]
    columns = [snapshot.index.column("digest", first, first + count) for first, count in there]
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.binary(32))


def commit(root: str, manifest: Manifest) -> PinnedSnapshot:
    """Store the manifest of a dataset whose shards and index are already stored: from here on the snapshot exists.

    Publishing the very same snapshot again changes nothing but `latest`.
    """
    identity = digest(manifest)
    uri = storage.join(root, f"snapshots/{identity}.json")
    try:
        storage.write_bytes(uri, canonical(manifest), create=True)
    except ObjectExists:
        open_snapshot(PinnedSnapshot(uri=uri, digest=identity))  # the same snapshot, by another publisher or an earlier attempt
    storage.write_bytes(storage.join(root, "snapshots/latest"), f"{identity}\n".encode())
    return PinnedSnapshot(uri=uri, digest=identity)


def _read(uri: str) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(storage.read_bytes(uri))
    except ObjectMissing as error:
        raise SnapshotMissing(f"There is no snapshot at {uri}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise SnapshotBroken(f"{uri} is no snapshot manifest ({'.'.join(map(str, first['loc']))}: {first['msg']}).") from error
    total = {split: sum(shard.counts.get(split, 0) for shard in manifest.shards) for split in SPLITS}
    found = {split: count for split, count in total.items() if count}
    if found != manifest.splits or sum(found.values()) != manifest.index.samples:
        raise SnapshotBroken(f"{uri} contradicts itself: its shards hold {found}, its splits say {manifest.splits}.")
    return manifest


def _replaced(found: PinnedSnapshot, wanted: str) -> SnapshotBroken:
    return SnapshotBroken(
        f"{found.uri} has digest {found.digest[:12]}, needed is {wanted[:12]}: the manifest was replaced. Restore it, or name another "
        "snapshot."
    )


def _few(names: tuple[str, ...]) -> str:
    return f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
