"""The end of every publication and registration: the rows of all shards become splits, index and manifest. And the records that make
both resumable."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stockpot import storage
from stockpot.config import PinnedSnapshot
from stockpot.data.examination import ROWS, Problems
from stockpot.data.indexing import SCHEMA, write_parquet
from stockpot.data.node_cache import written
from stockpot.data.snapshots import IndexFile, Manifest, Shard, Snapshot, commit, open_snapshot
from stockpot.data.splits import SPLITS, SplitRule, SplitSpec, assign, draw, point, wanted
from stockpot.digests import file_digest
from stockpot.errors import BadRequest, DataError, ObjectMissing, counted

logger = logging.getLogger(__name__)

LARGER = (0.05, 0.1, 0.2, 0.3)
"""Shares for held_out and for gate that are tried for a dataset that is too small for those asked for."""


class Finished(NamedTuple):
    """One shard that is stored and examined."""

    shard: Shard
    rows: pa.Table
    problems: Problems


@dataclass(frozen=True)
class Records:
    """What an interrupted job had finished: one small parquet object a shard, under the dataset, removed at the end. None: keep none."""

    root: str
    job: str | None

    @property
    def prefix(self) -> str:
        """Where they lie."""
        return storage.join(self.root, f"publishing/{self.job}/")

    def load(self) -> list[Finished]:
        """Shards of an interrupted job of the same source, in order."""
        finished = []
        for number, record in enumerate(storage.list_prefix(self.prefix) if self.job else ()):
            if not record.uri.endswith(f"/{number:06d}.parquet"):
                break
            try:
                stored = storage.read_bytes(record.uri)
            except ObjectMissing:  # another publisher of the same source has just finished
                break
            rows = pq.read_table(pa.BufferReader(stored))
            notes = json.loads(rows.schema.metadata[b"stockpot"])
            shard = Shard.model_validate(notes["shard"])
            finished.append(Finished(shard, rows.replace_schema_metadata(None).cast(ROWS), Problems.from_plain(notes["problems"])))
        return finished

    def save(self, number: int, one: Finished) -> None:
        """Note one finished shard."""
        if self.job:
            notes = json.dumps({"shard": one.shard.model_dump(), "problems": one.problems.plain()}).encode()
            sink = pa.BufferOutputStream()
            pq.write_table(one.rows.replace_schema_metadata({b"stockpot": notes}), sink)
            storage.write_bytes(storage.join(self.prefix, f"{number:06d}.parquet"), sink.getvalue().to_pybytes())

    def forget(self) -> None:
        """Remove the records of a job that is done."""
        for record in storage.list_prefix(self.prefix) if self.job else ():
            storage.remove(record.uri)


def finish(
    root: str,
    name: str,
    classes: tuple[str, ...] | None,
    finished: list[Finished],
    *,
    folder: Path,
    splits: SplitSpec | str,
    extends: PinnedSnapshot | None = None,
    skip_fraction: float = 0.0,
    least_per_class: int = 1,
    say: Callable[[str], None] = logger.warning,
) -> PinnedSnapshot:
    """Draw the splits over all rows, check them, store the index and last the manifest. `classes` None: named by their numbers.

    say: told what is no part of a sample.
    """
    rows = pa.concat_tables([one.rows for one in finished])
    problems = Problems()
    for one in finished:
        problems.merge(one.problems)
    for sentence in problems.left_out():
        say(sentence)
    problems.add_duplicates(rows, [one.shard.key for one in finished])
    unreadable = problems.raise_unless_within(skip_fraction, rows.num_rows)
    labels = rows["label"].to_numpy()
    classes = classes or _numbered(labels)
    require_several(name, classes)
    codes, rule = _split(rows, splits, extends, classes)
    if rule:
        _require_apart(rows, codes)
    if few := _too_few(labels, codes, classes, least_per_class, rule):
        shares = _other_shares(rows, splits, classes, least_per_class) if isinstance(splits, SplitSpec) and not extends else ""
        raise _lacking(few, classes, least_per_class, shares)
    index = folder / "index.parquet"
    with written(index):
        write_parquet(rows.append_column("split", pa.array(codes, pa.int8())).select(SCHEMA.names).cast(SCHEMA), index)
    key = f"index/{file_digest(index)}.parquet"
    store_once(index, storage.join(root, key))
    counts_SC = np.zeros((len(finished), len(SPLITS)), np.int64)
    np.add.at(counts_SC, (rows["shard"].to_numpy(), codes), 1)
    manifest = Manifest(
        name=name,
        classes=classes,
        splits=_counts(counts_SC.sum(0)),
        rule=rule,
        unreadable=unreadable,
        shards=tuple(one.shard.model_copy(update={"counts": _counts(row)}) for one, row in zip(finished, counts_SC, strict=True)),
        index=IndexFile(key=key, size=index.stat().st_size, sha256=file_digest(index), samples=rows.num_rows),
    )
    return commit(root, manifest)


def require_several(name: str, classes: tuple[str, ...]) -> None:
    """Raise `DataError` for a dataset of fewer than two classes: every classifier would be right about it."""
    if len(classes) < 2:
        raise DataError(
            f"{name} has {len(classes)} class ({', '.join(classes)}), needed at least 2: a folder for each class, right below the address "
            "that is published, or a line for each in classes.txt."
        )


def store_once(path: Path, uri: str) -> None:
    """Store a content-addressed file, unless it lies there with this size already."""
    if storage.size(uri) != path.stat().st_size:
        storage.upload(path, uri)


def _numbered(labels_N: NDArray[np.int32]) -> tuple[str, ...]:
    """Names for the classes of shards that come without: one wrong label must not make a million of them."""
    if (highest := int(labels_N.max())) >= len(labels_N):
        raise DataError(
            f"The highest label is {highest:,} among {len(labels_N):,} samples, so classes would have none: mend the label, or give the "
            "class names with --classes FILE, one a line."
        )
    return tuple(map(str, range(highest + 1)))


def class_counts(
    labels_N: NDArray[np.int32], codes_N: NDArray[np.int8], classes: tuple[str, ...], rule: SplitRule | None
) -> dict[str, list[int]]:
    """Samples of every class in every split that is there, or was to be drawn."""
    codes = {*np.unique(codes_N).tolist(), *(wanted(rule) if rule else ())}
    return {SPLITS[code]: np.bincount(labels_N[codes_N == code], minlength=len(classes)).tolist() for code in sorted(codes)}


def _counts(row: NDArray[np.int64]) -> dict[str, int]:
    return {split: int(count) for split, count in zip(SPLITS, row, strict=True) if count}


def _split(
    rows: pa.Table, splits: SplitSpec | str, extends: PinnedSnapshot | None, classes: tuple[str, ...]
) -> tuple[NDArray[np.int8], SplitRule | None]:
    if isinstance(splits, str):
        if splits not in SPLITS:
            raise BadRequest(f"There is no split `{splits}`; a whole snapshot is one of {', '.join(SPLITS)}.")
        return np.full(rows.num_rows, SPLITS.index(splits), np.int8), None
    old = _rule_of(extends, splits.group_by, classes) if extends else None
    points = np.fromiter((point(group, old.salt if old else splits.salt) for group in rows["group"].to_pylist()), np.uint64, rows.num_rows)
    rule = old or draw(points, splits)
    codes = assign(points, rule)
    codes[~rows["readable"].to_numpy()] = 0  # what cannot be read must not be needed by an evaluation
    return codes, rule


def _rule_of(extends: PinnedSnapshot, group_by: str, classes: tuple[str, ...]) -> SplitRule:
    old = open_snapshot(extends).manifest
    if old.rule is None or old.rule.group_by != group_by:
        raise BadRequest(
            f"{extends.uri} is grouped by {old.rule.group_by if old.rule else 'nothing (it is one split)'}, the new one by {group_by}: "
            "extend it with the same grouping, or publish without extending."
        )
    if classes[: len(old.classes)] != old.classes:
        raise BadRequest(f"{extends.uri} has the classes {old.classes[:3]}..., the new one {classes[:3]}...: keep the old order.")
    return old.rule


def _require_apart(rows: pa.Table, codes_N: NDArray[np.int8]) -> None:
    """Raise `DataError` where the groups of a json field would put one picture into two splits."""
    drawn = rows.select(["digest", "key"]).append_column("split", pa.array(codes_N))
    seen = drawn.group_by("digest").aggregate([("split", "min"), ("split", "max"), ("key", "min"), ("key", "max")])
    crossing = seen.filter(pc.not_equal(seen["split_min"], seen["split_max"]))
    if crossing.num_rows:
        first = crossing.slice(0, 1).to_pylist()[0]
        raise DataError(
            f"{counted(crossing.num_rows, 'picture')} would be in several splits, needed 0: their groups differ. First: samples "
            f"{first['key_min']!r} and {first['key_max']!r} are the same. Give them one group, or group by pixels."
        )


def _too_few(
    labels_N: NDArray[np.int32], codes_N: NDArray[np.int8], classes: tuple[str, ...], least: int, rule: SplitRule | None
) -> dict[str, list[str]]:
    """Classes with fewer than `least` samples, and how many they have, by split."""
    few = {}
    for split, counts in class_counts(labels_N, codes_N, classes, rule).items():
        if short_of := [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < least]:
            few[split] = short_of
    return few


def _lacking(few: dict[str, list[str]], classes: tuple[str, ...], least: int, shares: str) -> DataError:
    split, short_of = next(iter(few.items()))
    return DataError(
        f"Split {split} has {'no' if least == 1 else f'fewer than {least}'} samples of {len(short_of)} of {len(classes)} classes: "
        f"{', '.join(short_of[:5])}. Add samples{shares}, or lower --least-per-class."
    )


def _other_shares(rows: pa.Table, splits: SplitSpec, classes: tuple[str, ...], least: int) -> str:
    """Words for the smallest of a few shares that would give every split enough of every class of this very dataset."""
    for share in LARGER:
        codes, rule = _split(rows, splits.model_copy(update={"held_out": share, "gate": share}), None, classes)
        if not _too_few(rows["label"].to_numpy(), codes, classes, least, rule):
            return f", draw other shares (--held-out {share} --gate {share} would do)"
    return ", draw other shares (--held-out, --gate)"


def thin_classes(snapshot: Snapshot, least: int = 5) -> list[str]:
    """Sentences on classes with so few held_out or gate samples that their share of an accuracy says little."""
    sentences = []
    for split in set(snapshot.counts) - {"train"}:
        start = snapshot.first(split)
        counts = np.bincount(snapshot.index.rows["label"][start : start + snapshot.counts[split]], minlength=len(snapshot.classes))
        thin = [f"{name} ({count})" for name, count in zip(snapshot.classes, counts, strict=True) if count < least]
        if thin:
            sentences.append(
                f"{split} has fewer than {least} samples of {len(thin)} of {len(counts)} classes, such as {', '.join(thin[:5])}"
            )
    return sorted(sentences)
