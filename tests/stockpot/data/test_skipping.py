"""Publishing, training and the linear probe let the same number of samples go unread: as many as the share says, and not one more."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.data.examination import UNREADABLE, Problems, ProblemsFound
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.shards import TrainReader
from stockpot.data.skipping import may_skip
from stockpot.data.snapshots import open_snapshot
from stockpot.errors import SkipBudgetExceeded
from stockpot.training import probing
from tests.tiny_data import CLASSES, PREPROCESS, samples

COUNTS = st.integers(1, 10**9)


@given(COUNTS, st.integers(0, 10_000))
def test_a_share_as_it_is_written_lets_through_as_many_as_exact_arithmetic(count: int, parts: int) -> None:
    share, most = parts / 10_000, int(Fraction(parts, 10_000) * count)
    assert may_skip(most, count, share)
    assert not may_skip(most + 1, count, share)


@given(COUNTS.flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_the_share_of_what_was_found_lets_it_through(found: tuple[int, int]) -> None:
    assert may_skip(*found, found[0] / found[1])


@pytest.mark.parametrize(("unreadable", "in_budget"), [(29, True), (30, False)])
def test_publishing_training_and_the_probe_draw_the_line_at_one_sample(node, tmp_path, unreadable: int, in_budget: bool) -> None:
    """0.29 * 100 is 28.999999999999996."""
    rotten = [Sample(f"bad{number}", b"<html>", number % 3) for number in range(unreadable)]
    source = GivenSamples([*samples(100 - unreadable), *rotten])
    problems = Problems()
    for one in rotten:
        problems.add(UNREADABLE, "00000", one.key, "is not a readable image")
    reader = TrainReader(
        open_snapshot(publish(str(tmp_path), "some", CLASSES, source, splits="train", skip_fraction=0.3)),
        preprocess=PREPROCESS, augment=None, batch_size=100, seed=0, skip_fraction=0.29,
    )  # fmt: skip
    for draws, refusal in (
        (lambda: problems.raise_unless_within(0.29, 100), ProblemsFound),
        (lambda: list(reader.batches(0)), SkipBudgetExceeded),
        (lambda: probing._require_readable(unreadable, 100, 0.29), SkipBudgetExceeded),
    ):
        if in_budget:
            draws()
        else:
            with pytest.raises(refusal, match=r"30 .*100 .* 0\.29 of"):
                draws()
