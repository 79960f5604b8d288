"""Looking at samples before they enter a snapshot: every problem is collected with its shard and sample, and reported at once."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from stockpot.data.images import Undecodable
from stockpot.data.indexing import SCHEMA
from stockpot.data.preparing import content_digest
from stockpot.data.skipping import may_skip
from stockpot.errors import DataError, counted

UNREADABLE = "unreadable sample"

KEPT = 20
"""Examples kept of each kind of problem; all are counted."""

ROWS = pa.schema([*(column for column in SCHEMA if column.name != "split"), ("group", pa.binary()), ("readable", pa.bool_())])
"""What is known of a sample before the splits are drawn."""


class Problem(NamedTuple):
    """One thing wrong with one sample or shard."""

    kind: str
    shard: str
    sample: str
    detail: str

    def __str__(self) -> str:
        place = f"shard {self.shard}" + (f", sample {self.sample!r}" if self.sample else "")
        return f"{place}: {self.kind}, {self.detail}"


class ProblemsFound(DataError):
    """A source cannot become a snapshot; `problems` holds all of them."""

    def __init__(self, message: str, problems: "Problems") -> None:
        super().__init__(message)
        self.problems = problems


@dataclass
class Problems:
    """Everything found so far."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Problem]] = field(default_factory=lambda: defaultdict(list))
    ignored: Counter[str] = field(default_factory=Counter)
    """Members that are no part of a sample, by kind: said, but no problem."""

    def add(self, kind: str, shard: str, sample: str, detail: str) -> None:
        """Count one problem."""
        self.counts[kind] += 1
        if len(self.examples[kind]) < KEPT:
            self.examples[kind].append(Problem(kind, shard, sample, detail))

    def merge(self, other: "Problems") -> None:
        """Add what was found in another shard."""
        self.counts.update(other.counts)
        self.ignored.update(other.ignored)
        for kind, examples in other.examples.items():
            self.examples[kind] = (self.examples[kind] + examples)[:KEPT]

    def left_out(self) -> list[str]:
        """Sentences on what is no part of a sample."""
        return [f"left out: {counted(count, 'member')} ({kind})" for kind, count in self.ignored.most_common()]

    def plain(self) -> dict[str, Any]:
        """As JSON values; `Problems.from_plain` reads them back."""
        return {"counts": self.counts, "examples": dict(self.examples), "ignored": self.ignored}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Problems":
        """The inverse of `plain`."""
        read = cls(Counter(plain["counts"]), ignored=Counter(plain["ignored"]))
        read.examples.update({kind: [Problem(*example) for example in examples] for kind, examples in plain["examples"].items()})
        return read

    def add_duplicates(self, rows: pa.Table, shard_names: list[str]) -> None:
        """Keys that occur more than once, anywhere in the dataset."""
        grouped = rows.select(["key", "shard"]).group_by("key").aggregate([("shard", "min"), ("shard", "max"), ("key", "count")])
        for row in grouped.filter(pc.greater(grouped["key_count"], 1)).to_pylist():
            first, last = shard_names[row["shard_min"]], shard_names[row["shard_max"]]
            self.add("duplicate key", first, row["key"], f"found {row['key_count']} times, the last in shard {last}; keys must be unique")

    def raise_unless_within(self, skip_fraction: float, samples: int) -> int:
        """Raise `ProblemsFound` for anything but unreadable samples within the budget; returns their number."""
        unreadable = self.counts[UNREADABLE]
        total = sum(self.counts.values())
        if total == unreadable and may_skip(unreadable, samples, skip_fraction):
            return unreadable
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.counts.most_common())
        first = next(example for kind, _ in self.counts.most_common() for example in self.examples[kind])
        needed = f"at most {skip_fraction:g} of them" if skip_fraction else "0"
        way_out = "Mend or remove what is named"
        if total == unreadable:
            way_out += f", or let so many stay in, as train: --skip-fraction {math.ceil(1000 * total / samples) / 1000:g}"
        found = f"{counted(total, 'problem')} in {counted(samples, 'sample')}"
        raise ProblemsFound(f"Found {found} ({kinds}), needed {needed}. First: {first}. {way_out}.", self)


@dataclass(frozen=True)
class Candidate:
    """A sample whose image or tokens lie at `offset` of a shard."""

    key: str
    offset: int
    data: bytes
    label: int
    fields: Mapping[str, Any]
    origin: str = ""

    @property
    def known_as(self) -> str:
        """What a person finds it by."""
        return self.origin or self.key


@dataclass(frozen=True)
class Examiner:
    """Turns the samples of a shard into rows, noting what is wrong with them."""

    classes: tuple[str, ...] | None
    group_by: str = "pixels"

    def rows(self, shard: int, name: str, candidates: list[Candidate], pool: ThreadPoolExecutor, problems: Problems) -> pa.Table:
        """Rows of the shard at place `shard` of the manifest, in the given order. They are decoded in the pool."""
        digests = list(pool.map(_digest, (candidate.data for candidate in candidates)))
        return pa.Table.from_pylist(
            [self._row(shard, name, sample, seen, problems) for sample, seen in zip(candidates, digests, strict=True)], schema=ROWS
        )

    def _row(self, shard: int, name: str, sample: Candidate, seen: bytes | str, problems: Problems) -> dict[str, Any]:
        if sample.label < 0 or (self.classes and sample.label >= len(self.classes)):
            highest = len(self.classes) - 1 if self.classes else "the number of classes"
            problems.add("label out of range", name, sample.known_as, f"label {sample.label} is outside 0..{highest}")
        if isinstance(seen, str):
            problems.add(UNREADABLE, name, sample.known_as, seen)
        digest = hashlib.sha256(sample.data).digest() if isinstance(seen, str) else seen
        return {
            "key": sample.key, "shard": shard, "offset": sample.offset, "size": len(sample.data), "label": sample.label,
            "digest": digest, "group": self._group(digest, sample, name, problems), "readable": not isinstance(seen, str),
        }  # fmt: skip

    def _group(self, digest: bytes, sample: Candidate, name: str, problems: Problems) -> bytes:
        if self.group_by == "pixels":
            return digest
        if self.group_by not in sample.fields:
            problems.add(
                "missing group field", name, sample.known_as, f"its json has no `{self.group_by}`, which the splits are grouped by"
            )
        return str(sample.fields.get(self.group_by)).encode()


def _digest(data: bytes) -> bytes | str:
    try:
        return content_digest(data)
    except Undecodable as reason:
        return str(reason)
