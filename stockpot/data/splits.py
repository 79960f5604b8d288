"""Which sample is train, held_out or gate: a keyed hash of its group, so identical pictures stay together and additions move nothing.

The hash of a group is one point in [0, 2**64). held_out is [0, a), gate [a, b), train the rest; a and b are stored in the manifest, so
a dataset that grows keeps every old sample where it was. A fraction gives a = fraction * 2**64; an exact count gives the a that cuts
off that many samples of the data at hand.
"""

import hashlib
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stockpot.errors import DataError
from stockpot.fields import Closed

SPLITS = ("train", "held_out", "gate", "test")
"""Every split there is, in the order of the index."""

Share = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)]


class SplitSpec(Closed):
    """How to draw held_out and gate out of a dataset; what remains is train."""

    held_out: Share = Field(0.02, description="Exact number of samples (an integer) or fraction of the samples. The paper withholds 2 %.")
    gate: Share = Field(0.02, description="As held_out; judged once per challenger.")
    salt: str = Field("stockpot", description="Key of the hash: another salt, another draw.")
    group_by: str = Field("pixels", description="`pixels`: digest of the decoded image. Else the name of a field of each sample's json.")


class SplitRule(Closed):
    """The drawn rule, as the manifest holds it."""

    salt: str
    group_by: str
    held_out_below: int = Field(ge=0, le=2**64, description="Points below this are held_out.")
    gate_below: int = Field(ge=0, le=2**64, description="Points from held_out_below to below this are gate.")


def point(group: bytes | str, salt: str) -> int:
    """The place of a group on [0, 2**64)."""
    raw = group.encode() if isinstance(group, str) else group
    return int.from_bytes(hashlib.blake2b(salt.encode() + b"\0" + raw, digest_size=8).digest(), "big")


def draw(points_N: NDArray[np.uint64], spec: SplitSpec) -> SplitRule:
    """Fix the cuts for the points of all N samples. Samples of one group share a point and are never divided: an exact count that would
    divide a group is rounded up to the whole group."""
    ordered = np.sort(points_N)
    first = _cut(ordered, spec.held_out, 0, 0)
    begun = int(np.searchsorted(ordered, np.uint64(min(first, 2**64 - 1))))
    second = _cut(ordered, spec.gate, begun, first)
    return SplitRule(salt=spec.salt, group_by=spec.group_by, held_out_below=first, gate_below=second)


def assign(points_N: NDArray[np.uint64], rule: SplitRule) -> NDArray[np.int8]:
    """Split codes (places in `SPLITS`) of N points."""
    held_out = _below(points_N, rule.held_out_below)
    gate = _below(points_N, rule.gate_below) & ~held_out
    return np.where(held_out, 1, np.where(gate, 2, 0)).astype(np.int8)


def wanted(rule: SplitRule) -> list[int]:
    """Split codes that the rule is to fill."""
    return [0, *[1] * (rule.held_out_below > 0), *[2] * (rule.gate_below > rule.held_out_below)]


def _cut(ordered: NDArray[np.uint64], share: float, begun: int, begun_at: int) -> int:
    if isinstance(share, float):
        return min(2**64, begun_at + int(share * 2**64))
    if begun + share >= len(ordered):
        raise DataError(
            f"{begun + share:,} samples are asked for held_out and gate, the dataset has {len(ordered):,}: nothing is left to train on."
        )
    return int(ordered[begun + share - 1]) + 1 if share else begun_at


def _below(points_N: NDArray[np.uint64], cut: int) -> NDArray[np.bool_]:
    return np.ones(len(points_N), bool) if cut >= 2**64 else points_N < np.uint64(cut)
