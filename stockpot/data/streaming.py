"""Reading a snapshot that the node's disk cannot hold: the same samples in the same order, straight from storage.

Each shard is fetched once an epoch through the s3fs door; at its end size and sha256 are checked, then webdataset's own tar iterator and
grouping read it, then the number of samples is checked, and only then is one of them used. The 8 shards of a group of the epoch plan are
in memory while the next group is fetched: plan for 16 to 24 shards of memory a trial.
"""

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from webdataset.tariterators import group_by_keys, tar_file_expander

from stockpot.data.epochs import EpochPlan
from stockpot.data.snapshots import Snapshot
from stockpot.data.stopping import until_failure
from stockpot.data.tars import input_extensions
from stockpot.errors import SnapshotBroken

FETCHED_AT_ONCE = 4


class StreamedBytes:
    """Encoded samples by id, for one pass over an epoch plan from a batch on. `count` is told the bytes and retries of every shard, in the
    thread that fetched it."""

    def __init__(self, snapshot: Snapshot, plan: EpochPlan, epoch: int, skip: int, count: Callable[[int, int], None]) -> None:
        self.snapshot, self.plan, self._count = snapshot, plan, count
        self._fetch = until_failure(self._shard)
        self._coming = self._needed(epoch, skip * plan.batch_size)
        self._groups: deque[dict[int, bytes]] = deque()

    @contextmanager
    def running(self) -> Iterator["StreamedBytes"]:
        """Fetch one group ahead while the block runs."""
        with ThreadPoolExecutor(FETCHED_AT_ONCE, "stockpot-stream") as self._pool:
            self._ahead = self._request()
            try:
                yield self
            finally:
                self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, sample: int) -> bytes:
        """The bytes of one sample; samples must be asked for in the plan's order."""
        while True:
            for group in reversed(self._groups):
                if sample in group:
                    return group[sample]
            arrived = [future.result() for future in self._ahead]
            self._ahead = self._request()
            self._groups.append({number: data for samples in arrived for number, data in samples.items()})

    def done_with(self, sample: int) -> None:
        """Forget the groups before the one that holds this sample, the last of a batch."""
        while len(self._groups) > 1 and sample not in self._groups[0]:
            self._groups.popleft()

    def _needed(self, epoch: int, skipped: int) -> Iterator[list[int]]:
        """Shards of each group of the epoch that is not skipped as a whole."""
        passed = 0
        for shards, ids in self.plan.groups(epoch):
            passed += len(ids)
            if passed > skipped:
                yield shards

    def _request(self) -> list[Future[dict[int, bytes]]]:
        return [self._pool.submit(self._fetch, shard) for shard in next(self._coming, ())]

    def _shard(self, shard: int) -> dict[int, bytes]:
        """Encoded samples of one shard that belong to the split; the whole shard is verified before any of it is parsed."""
        uri = self.snapshot.shard_uri(shard)
        start, stop = self.plan.ids(shard)
        ids = dict(zip(self.snapshot.index.keys(start, stop), range(start, stop), strict=True))
        data, retries = self.snapshot.read_shard(shard)
        self._count(len(data), retries)
        samples = group_by_keys(tar_file_expander([{"url": uri, "stream": io.BytesIO(data)}]))
        found = {ids[sample["__key__"]]: _input(sample) for sample in samples if sample.get("__key__") in ids}
        if len(found) != len(ids):
            raise SnapshotBroken(f"Shard {uri} gave {len(found)} of the {len(ids)} samples its index names; publish a new snapshot.")
        return found


def _input(sample: dict[str, Any]) -> bytes:
    return bytes(sample[input_extensions(sample)[0]])
