"""The epoch plan: every sample once, the same batches whatever the number of ranks, resumed by an integer, flat in the number of shards."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.data.epochs import EpochPlan, derive
from stockpot.errors import BadRequest

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(lambda counts: sum(counts) > 0)


def plan(counts: list[int], batch: int = 4, **extra: int) -> EpochPlan:
    return EpochPlan("digest", np.array(counts, np.int64), extra.pop("first", 100), 7, batch, **extra)


@given(SHARDS, st.integers(1, 9), st.integers(0, 3))
def test_every_sample_comes_exactly_once(counts: list[int], batch: int, epoch: int) -> None:
    one = plan(counts, batch)
    batches = list(one.batches(epoch))
    assert sorted(np.concatenate(batches).tolist()) == list(range(100, 100 + sum(counts)))
    assert len(batches) == one.steps
    assert one.planned == sum(counts)


@given(SHARDS, st.integers(1, 4), st.sampled_from([1, 2, 3, 4]), st.booleans())
def test_ranks_get_equally_many_batches_and_together_those_of_one(counts: list[int], share: int, world: int, drop: bool) -> None:
    batch = share * world
    if sum(counts) < batch:
        counts = [*counts, batch]
    alone = list(plan(counts, batch, drop_last=drop).batches(1))
    ranks = [plan(counts, batch, rank=rank, world=world, drop_last=drop) for rank in range(world)]
    read = [list(rank.batches(1)) for rank in ranks]
    assert len({len(batches) for batches in read}) == 1
    assert [len(batches) for batches in read] == [rank.steps for rank in ranks]
    assert [sum(map(len, batches)) for batches in read] == [rank.planned for rank in ranks]
    for step, parts in enumerate(zip(*read, strict=True)):
        assert len({len(part) for part in parts}) == 1
        together = sorted(np.concatenate(parts).tolist())
        assert together == sorted(alone[step].tolist())[: len(together)] or set(together) <= set(alone[step].tolist())


@given(SHARDS, st.integers(1, 5), st.integers(0, 20))
def test_skipping_goes_on_exactly_where_it_stopped(counts: list[int], batch: int, skip: int) -> None:
    one = plan(counts, batch)
    whole = [ids.tolist() for ids in one.batches(2)]
    assert [ids.tolist() for ids in one.batches(2, skip)] == whole[skip:]


def test_epochs_seeds_and_snapshots_differ_and_repeat() -> None:
    def order(**extra: object) -> list[int]:
        base = {"identity": "digest", "counts": np.full(9, 8), "first": 0, "seed": 1, "batch_size": 72} | extra
        return next(EpochPlan(**base).batches(int(base.pop("epoch", 0)))).tolist()  # type: ignore[arg-type]

    assert order() == order()
    assert len({tuple(order()), tuple(order(seed=2)), tuple(order(identity="other"))}) == 3
    one = plan([8] * 9, 72)
    assert next(one.batches(0)).tolist() != next(one.batches(1)).tolist()


def test_the_order_is_the_same_for_ever() -> None:
    assert next(plan([3, 4, 5], 12).batches(0)).tolist() == [109, 111, 108, 107, 102, 110, 101, 100, 105, 106, 103, 104]
    assert derive(1, 2, "x") == 7228438850507643864 != derive(12, "x")


def test_ten_thousand_shards_take_no_more_memory_than_ten_per_sample_read() -> None:
    def peak(shards: int) -> int:
        counts = np.full(shards, 50, np.int64)
        one = EpochPlan("digest", counts, 0, 0, 64)
        tracemalloc.start()
        for number, _ in enumerate(one.batches(0)):
            if number == 5:
                break
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(10_000) < peak(10) + 32 * 10_000  # three int64 a shard, nothing a sample


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(BadRequest, match="multiple of 3"):
        plan([5], 4, world=3)
    with pytest.raises(BadRequest, match="smaller batch"):
        plan([5], 8, drop_last=True)
