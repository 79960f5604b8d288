"""A snapshot of shards that exist already: one full read, nothing touched; and what changed since.

The user's objects stay where they are; the manifest, index and, while it runs, records of finished shards are added under the dataset's own
address. Later reads are guarded by each shard's etag and sha256.
"""

import hashlib
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from stockpot import storage
from stockpot.config import PinnedSnapshot
from stockpot.data.examination import ROWS, Candidate, Examiner, Problems
from stockpot.data.manifests import Finished, Records, finish, require_several
from stockpot.data.publishing import EXAMINED_AT_ONCE, Progress
from stockpot.data.snapshots import Shard, Snapshot
from stockpot.data.sources import list_shards
from stockpot.data.splits import SplitSpec
from stockpot.data.tars import Found, read_shard
from stockpot.digests import short
from stockpot.errors import BadRequest, ObjectMissing, SnapshotBroken, counted
from stockpot.storage import StoredObject

logger = logging.getLogger(__name__)


def register(
    uris: list[str],
    *,
    root: str,
    name: str,
    classes: tuple[str, ...] | None,
    splits: SplitSpec | str,
    extends: PinnedSnapshot | None = None,
    skip_fraction: float = 0.0,
    least_per_class: int = 1,
    progress: Progress | None = None,
    say: Callable[[str], None] = logger.warning,
) -> PinnedSnapshot:
    """A snapshot of the tars under the given prefixes (or of the given tars), stored under `root`; `say` is told what is left out.

    Raises `ProblemsFound` with every problem of every shard at once. Interrupted, it goes on after the last shard it finished.
    """
    shards = [item for uri in uris for item in list_shards(uri)]
    if again := [uri for uri, count in Counter(item.uri for item in shards).items() if count > 1]:
        raise BadRequest(
            f"Shard {again[0]} is listed twice ({counted(len(again), 'such shard')}); its samples would count twice. List every shard once."
        )
    if classes:
        require_several(name, classes)
    examiner = Examiner(classes, splits.group_by if isinstance(splits, SplitSpec) else "pixels")
    records = Records(root, short([[[item.uri, item.size, item.etag] for item in shards], classes, examiner.group_by]))
    finished = records.load()
    with tempfile.TemporaryDirectory(prefix="stockpot-register-") as folder, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, item in enumerate(shards):
            if number >= len(finished):
                finished.append(_examined(number, item, root, Path(folder), examiner, pool))
                records.save(number, finished[-1])
            if progress:
                progress(number + 1, len(shards))
        pinned = finish(
            root, name, classes, finished, folder=Path(folder),
            splits=splits, extends=extends, skip_fraction=skip_fraction, least_per_class=least_per_class, say=say,
        )  # fmt: skip
    records.forget()
    return pinned


def _examined(number: int, item: StoredObject, root: str, folder: Path, examiner: Examiner, pool: ThreadPoolExecutor) -> Finished:
    path = folder / "shard.tar"
    with path.open("wb") as file:
        _, sha256 = storage.fetch_hashed(item.uri, file, etag=item.etag)
    problems = Problems()
    below = item.uri.removeprefix(f"{root.rstrip('/')}/")
    name = item.uri if below.startswith("/") else below  # `root//shard` is no address below `root`
    tables = [ROWS.empty_table()]
    found = read_shard(path, name, examiner.classes, problems)
    with path.open("rb") as tar:
        for at in range(0, len(found), EXAMINED_AT_ONCE):
            candidates = [_candidate(sample, tar.fileno()) for sample in found[at : at + EXAMINED_AT_ONCE]]
            tables.append(examiner.rows(number, name, candidates, pool, problems))
    shard = Shard(key=name, size=item.size, sha256=sha256, etag=item.etag, counts={})
    return Finished(shard, pa.concat_tables(tables), problems)


def _candidate(sample: Found, file: int) -> Candidate:
    return Candidate(sample.key, sample.place.offset, os.pread(file, sample.place.size, sample.place.offset), sample.label, sample.fields)


class Change(NamedTuple):
    """One object that is no longer what the snapshot says."""

    key: str
    found: str
    needed: str


def verify(snapshot: Snapshot, *, deep: bool = False, progress: Callable[[int, int], None] | None = None) -> list[Change]:
    """What changed since the snapshot was made: sizes and etags by listing, or with `deep` the sha256 of every byte."""
    objects: list[tuple[str, int, str, str | None]] = [
        (snapshot.manifest.index.key, snapshot.manifest.index.size, snapshot.manifest.index.sha256, None)
    ]
    objects += [(shard.key, shard.size, shard.sha256, shard.etag) for shard in snapshot.manifest.shards]
    listed = _listing(snapshot.root, [key for key, *_ in objects])
    changes = []
    for done, (key, size, sha256, etag) in enumerate(objects, 1):
        item = listed.get(storage.join(snapshot.root, key))
        if item is None:
            changes.append(Change(key, "missing", f"{size:,} bytes"))
        elif item.size != size:
            changes.append(Change(key, f"{item.size:,} bytes", f"{size:,} bytes"))
        elif etag not in {None, item.etag}:
            changes.append(Change(key, f"etag {item.etag}", f"etag {etag}"))
        elif deep and (found := _sha256(item.uri)) != sha256:
            changes.append(Change(key, f"sha256 {found[:12]}", f"sha256 {sha256[:12]}"))
        if progress:
            progress(done, len(objects))
    return changes


def _listing(root: str, keys: list[str]) -> dict[str, StoredObject]:
    """The folders that hold the keys, each listed once."""
    folders = {storage.join(root, key).rpartition("/")[0] for key in keys}
    return {item.uri: item for folder in sorted(folders) for item in storage.list_prefix(f"{folder}/")}


def _sha256(uri: str) -> str:
    sha256 = hashlib.sha256()
    try:
        storage.fetch(uri, sha256.update)
    except (ObjectMissing, SnapshotBroken) as error:
        return str(error)
    return sha256.hexdigest()
