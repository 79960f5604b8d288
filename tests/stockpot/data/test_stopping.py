"""Whatever order a pool's failures are asked in, it is the first one that is told."""

from concurrent.futures import ThreadPoolExecutor

from stockpot.data.stopping import until_failure
from stockpot.errors import SnapshotBroken


def test_calls_behind_a_failed_one_are_not_begun_and_raise_what_it_raised() -> None:
    begun: list[int] = []

    def fetch(shard: int) -> int:
        begun.append(shard)
        if shard == 1:
            raise SnapshotBroken("Shard 1 was replaced.")
        return shard

    with ThreadPoolExecutor(1) as pool:
        wanted = until_failure(fetch)
        futures = [pool.submit(wanted, shard) for shard in range(4)]
    assert futures[0].result() == 0
    assert [str(future.exception()) for future in futures[1:]] == ["Shard 1 was replaced."] * 3
    assert begun == [0, 1]
