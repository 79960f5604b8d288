"""Looking at samples before they enter a snapshot: every problem is collected with its shard and sample, and reported at once."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from stockpot.errors import DataError
from stockpot.images import Undecodable, decode

UNREADABLE = "unreadable image"

ROWS = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("shard", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("label", pa.int32()),
        pa.field("digest", pa.binary(32)),
        pa.field("group", pa.binary()),
        pa.field("readable", pa.bool_()),
    ]
)
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
    """Everything found so far; at most `KEPT` examples of a kind are kept, all are counted."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Problem]] = field(default_factory=lambda: defaultdict(list))

    KEPT = 20

    def add(self, kind: str, shard: str, sample: str, detail: str) -> None:
        """Count one problem."""
        self.counts[kind] += 1
        if len(self.examples[kind]) < self.KEPT:
            self.examples[kind].append(Problem(kind, shard, sample, detail))

    def add_duplicates(self, rows: pa.Table, shard_names: list[str]) -> None:
        """Keys that occur more than once, anywhere in the dataset."""
        grouped = rows.select(["key", "shard"]).group_by("key").aggregate([("shard", "min"), ("shard", "max"), ("key", "count")])
        for row in grouped.filter(pa.compute.greater(grouped["key_count"], 1)).to_pylist():
            first, last = shard_names[row["shard_min"]], shard_names[row["shard_max"]]
            self.add("duplicate key", first, row["key"], f"found {row['key_count']} times, the last in shard {last}; keys must be unique")

    def raise_unless_within(self, skip_fraction: float, samples: int) -> int:
        """Raise `ProblemsFound` for anything but unreadable images within the budget; returns their number."""
        unreadable = self.counts[UNREADABLE]
        total = sum(self.counts.values())
        if total == unreadable and unreadable <= skip_fraction * samples:
            return unreadable
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.counts.most_common())
        first = next(iter(example for kind, _ in self.counts.most_common() for example in self.examples[kind]))
        raise ProblemsFound(f"The source has {total:,} problems in {samples:,} samples ({kinds}), 0 are needed. First: {first}.", self)


@dataclass(frozen=True)
class Examiner:
    """Turns one sample into its row, noting what is wrong with it."""

    classes: tuple[str, ...]
    problems: Problems
    group_by: str = "pixels"

    def row(
        self, shard: int, shard_name: str, key: str, offset: int, image: bytes, label: int, fields: Mapping[str, Any], extension: str
    ) -> dict[str, Any]:
        """The row of a sample whose image bytes lie at `offset` of its shard."""
        if not 0 <= label < len(self.classes):
            self.problems.add("label out of range", shard_name, key, f"label {label} is outside 0..{len(self.classes) - 1}")
        digest, readable = self._digest(image, shard_name, f"{key}.{extension}")
        return {
            "key": key, "shard": shard, "offset": offset, "size": len(image), "label": label,
            "digest": digest, "group": self._group(digest, fields, shard_name, key), "readable": readable,
        }  # fmt: skip

    def _digest(self, image: bytes, shard: str, name: str) -> tuple[bytes, bool]:
        try:
            pixels = decode(image)
        except Undecodable as reason:
            self.problems.add(UNREADABLE, shard, name, str(reason))
            return hashlib.sha256(image).digest(), False
        return pixel_digest(pixels.numpy()), True

    def _group(self, digest: bytes, fields: Mapping[str, Any], shard: str, key: str) -> bytes:
        if self.group_by == "pixels":
            return digest
        if self.group_by not in fields:
            self.problems.add("missing group field", shard, key, f"its json has no `{self.group_by}`, which the splits are grouped by")
        return str(fields.get(self.group_by)).encode()


def pixel_digest(pixels_3HW: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """sha256 of the decoded image and its shape: equal for the same picture in another file format."""
    return hashlib.sha256(repr(pixels_3HW.shape).encode() + np.ascontiguousarray(pixels_3HW).tobytes()).digest()


def table_lines(problems: Problems) -> Iterable[tuple[str, str, str, str, int]]:
    """Rows of the report: problem, shard, sample, detail, count of that kind."""
    for kind, count in problems.counts.most_common():
        for example in problems.examples[kind]:
            yield kind, example.shard, example.sample, example.detail, count
