"""A dataset is a snapshot: one immutable manifest that names every shard by size and sha256, every sample by an index, and every split.

A dataset is a folder in object storage:

    shards/<sha256>.tar         plain WebDataset tars, content-addressed (or the user's own tars, when registered)
    index/<sha256>.parquet      one row per sample: key, shard, offset, size, label, digest, split
    snapshots/<digest>.json     the manifest, written last and never overwritten; its digest is the snapshot's identity
    snapshots/latest            the digest published last: what the folder's own address stands for
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import Field, ValidationError

from stockpot import storage
from stockpot.config import Closed, PinnedSnapshot
from stockpot.digests import canonical, digest
from stockpot.errors import ObjectMissing, SnapshotBroken, SnapshotMissing
from stockpot.indexing import Index
from stockpot.splits import SPLITS, SplitRule


class Shard(Closed):
    """One tar file."""

    key: str = Field(description="Relative to the dataset, or a whole address.")
    size: int = Field(gt=0, description="Bytes.")
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
        from stockpot.node_cache import NodeCache  # a door of the same ring, needed only here

        file = self.manifest.index
        parquet = NodeCache().ensure(storage.join(self.root, file.key), file.sha256, file.size, suffix=".parquet").path
        return Index.open(parquet, file.samples)

    def shard_uri(self, shard: int) -> str:
        """Address of a shard by its place in the manifest."""
        return storage.join(self.root, self.manifest.shards[shard].key)

    def require_classes(self, classes: tuple[str, ...]) -> None:
        """Raise `SnapshotBroken` unless a model's classes are this snapshot's, in the same order."""
        if classes != self.classes:
            raise SnapshotBroken(
                f"Snapshot {self.digest[:12]} ({self.manifest.name}) has {len(self.classes)} classes {_few(self.classes)}, the model has "
                f"{len(classes)} {_few(classes)}; use a snapshot published with the model's classes."
            )


def pin(uri: str) -> PinnedSnapshot:
    """Address and digest of a snapshot, given its manifest, or its dataset's folder: then the one published last. Raises `SnapshotMissing`."""
    if not uri.endswith(".json"):
        try:
            latest = storage.read_bytes(storage.join(uri, "snapshots/latest")).decode().strip()
        except ObjectMissing as error:
            raise SnapshotMissing(f"{uri} holds no snapshot: {error}") from error
        uri = storage.join(uri, f"snapshots/{latest}.json")
    return PinnedSnapshot(uri=uri, digest=digest(_read(uri)))


def open_snapshot(pinned: PinnedSnapshot) -> Snapshot:
    """Read and verify the manifest. Raises `SnapshotMissing`, or `SnapshotBroken` when it is not the pinned one."""
    manifest = _read(pinned.uri)
    if digest(manifest) != pinned.digest:
        raise SnapshotBroken(
            f"{pinned.uri} has digest {digest(manifest)[:12]}, {pinned.digest[:12]} was pinned: the manifest was replaced."
        )
    return Snapshot(pinned.uri, manifest)


def commit(root: str, manifest: Manifest) -> PinnedSnapshot:
    """Store the manifest of a dataset whose shards and index are already stored: from here on the snapshot exists.

    Publishing the very same snapshot again changes nothing but `latest`.
    """
    identity = digest(manifest)
    uri = storage.join(root, f"snapshots/{identity}.json")
    if not storage.exists(uri):
        storage.write_bytes(uri, canonical(manifest), create=True)
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


def _few(names: tuple[str, ...]) -> str:
    return f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
