"""Splits by keyed hash: exact counts are exact, groups stay together, growing a dataset moves nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.data.splits import SplitSpec, assign, draw, point
from stockpot.errors import DataError


def points(count: int, salt: str = "s", start: int = 0) -> np.ndarray:
    return np.array([point(f"group-{number}", salt) for number in range(start, start + count)], np.uint64)


@given(st.integers(3, 300), st.data())
def test_exact_counts_are_exact(count: int, data: st.DataObject) -> None:
    held_out = data.draw(st.integers(0, count - 2))
    gate = data.draw(st.integers(0, count - 1 - held_out))
    drawn = points(count)
    codes = assign(drawn, draw(drawn, SplitSpec(held_out=held_out, gate=gate)))
    assert np.bincount(codes, minlength=3).tolist() == [count - held_out - gate, held_out, gate]


@given(st.integers(3, 200), st.integers(0, 200), st.one_of(st.integers(0, 1), st.floats(0, 0.4)), st.floats(0, 0.4))
def test_adding_samples_never_moves_an_old_one(count: int, more: int, held_out: float, gate: float) -> None:
    old = points(count)
    rule = draw(old, SplitSpec(held_out=held_out, gate=gate))
    assert assign(points(count + more), rule)[:count].tolist() == assign(old, rule).tolist()


def test_a_group_is_never_divided() -> None:
    drawn = np.repeat(points(40), 5)
    codes = assign(drawn, draw(drawn, SplitSpec(held_out=18, gate=0.2)))
    assert all(len(set(group)) == 1 for group in codes.reshape(40, 5).tolist())
    assert (codes == 1).sum() == 20  # 18 would divide a group of five: rounded up to whole groups


def test_a_fraction_is_close_and_another_salt_is_another_draw() -> None:
    one, other = points(4000), points(4000, salt="t")
    rule = SplitSpec(held_out=0.1, gate=0.0)
    assert abs((assign(one, draw(one, rule)) == 1).mean() - 0.1) < 0.02
    assert (assign(one, draw(one, rule)) != assign(other, draw(other, rule))).any()


def test_asking_for_everything_leaves_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="nothing is left to train on"):
        draw(points(10), SplitSpec(held_out=6, gate=4))
