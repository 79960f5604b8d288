"""Reading a snapshot that the node's disk cannot hold: the same samples in the same order, straight from storage.

Each shard is fetched once an epoch through the s3fs door; at its end size and sha256 are checked, then webdataset's own tar iterator and
grouping read it, then the number of samples is checked, and only then is one of them used. The 8 shards of a group of the epoch plan are in
memory while the next group is fetched: plan for 16 to 24 shards of memory a trial.
"""

import hashlib
import io
import queue
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import webdataset as wds

from stockpot import storage
from stockpot.epochs import EpochPlan
from stockpot.errors import SnapshotBroken, StockpotError
from stockpot.snapshots import Snapshot, require_content
from stockpot.tars import IMAGES

FETCHED_AT_ONCE = 4


class StreamedBytes:
    """Encoded images by sample id, for one pass over an epoch plan."""

    def __init__(self, snapshot: Snapshot, plan: EpochPlan, epoch: int, skip: int) -> None:
        self.snapshot, self.plan, self.epoch = snapshot, plan, epoch
        self.skip_samples = skip * plan.batch_size
        self.counts: Counter[str] = Counter()
        self._groups: deque[dict[int, bytes]] = deque()
        self._arriving: queue.Queue[dict[int, bytes] | BaseException] = queue.Queue(maxsize=1)
        self._stopped, self._lock = threading.Event(), threading.Lock()

    @contextmanager
    def running(self) -> Iterator["StreamedBytes"]:
        """Fetch ahead in the background while the block runs."""
        thread = threading.Thread(target=self._run, name="stockpot-stream", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stopped.set()
            while thread.is_alive():
                if not self._arriving.empty():
                    self._arriving.get_nowait()
                thread.join(0.05)

    def read(self, sample: int) -> bytes:
        """The bytes of one sample; samples must be asked for in the plan's order."""
        while True:
            for group in reversed(self._groups):
                if sample in group:
                    return group[sample]
            arrived = self._arriving.get()
            if isinstance(arrived, BaseException):
                raise arrived
            self._groups.append(arrived)

    def done_with(self, sample: int) -> None:
        """Forget the groups before the one that holds the last sample of a batch."""
        while len(self._groups) > 1 and sample not in self._groups[0]:
            self._groups.popleft()

    def _run(self) -> None:
        try:
            passed = 0
            with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool:
                for shards, ids in self.plan.groups(self.epoch):
                    passed += len(ids)
                    if passed <= self.skip_samples:
                        continue
                    self._put({sample: data for part in pool.map(self._shard, shards) for sample, data in part.items()})
                    if self._stopped.is_set():
                        return
        except StockpotError as error:
            self._put(error)

    def _put(self, arrived: dict[int, bytes] | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._arriving.put(arrived, timeout=0.2)
                return
            except queue.Full:
                continue

    def _shard(self, shard: int) -> dict[int, bytes]:
        """Samples of one shard that belong to the split; the whole shard is verified before any of it is parsed."""
        entry, uri = self.snapshot.manifest.shards[shard], self.snapshot.shard_uri(shard)
        start, stop = self.plan.ids(shard)
        ids = dict(zip(self.snapshot.index.keys(start, stop), range(start, stop), strict=True))
        data = bytearray()
        fetched = storage.fetch(uri, data.extend, etag=entry.etag)
        require_content(uri, entry, len(data), hashlib.sha256(data).hexdigest())
        with self._lock:
            self.counts.update(bytes_from_storage=len(data), retries=fetched.retries)
        samples = wds.group_by_keys(wds.tar_file_expander([{"url": uri, "stream": io.BytesIO(data)}]))
        found = {ids[sample["__key__"]]: _image(sample) for sample in samples if sample["__key__"] in ids}
        if len(found) != len(ids):
            raise SnapshotBroken(f"Shard {uri} gave {len(found)} of the {len(ids)} samples its index names; publish a new snapshot.")
        return found


def _image(sample: dict[str, Any]) -> bytes:
    return next(bytes(data) for name, data in sample.items() if name in IMAGES)
