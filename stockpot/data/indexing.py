"""The index of a snapshot: a parquet file beside the manifest, and on each node a memory-mapped table of its hot columns.

Rows are sorted by (split in the order of `SPLITS`, shard, offset), so a sample's id is its row number, a split is a range of rows, and
the samples of one shard in one split are a range too. Readers therefore hold no list of samples, whatever the dataset's size.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stockpot.data.node_cache import written
from stockpot.errors import SnapshotBroken

HOT = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
"""What reading one sample needs: the shard's place in the manifest, the image's bytes in it, the label."""

GROUP_ROWS = 2**16
"""Rows of a parquet row group: what one look-up of keys reads."""

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("shard", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("label", pa.int32()),
        pa.field("digest", pa.binary(32)),
        pa.field("split", pa.int8()),
    ]
)


@dataclass(frozen=True)
class Index:
    """Rows of a snapshot's samples, by id."""

    parquet: pa.MemoryMappedFile
    """Mapped, so that it is there for as long as the index, whatever becomes of the node cache."""
    rows: NDArray[np.void]

    @classmethod
    def open(cls, parquet: Path, samples: int) -> "Index":
        """Map the hot columns, writing them beside the parquet file on the first use on this node."""
        hot = parquet.with_suffix(".rows.npy")
        if not hot.exists():
            _write_hot(parquet, hot)
        rows = np.load(hot, mmap_mode="r")
        if len(rows) != samples:
            raise SnapshotBroken(f"The index {parquet.name} has {len(rows):,} rows, the manifest says {samples:,} samples.")
        return cls(pa.memory_map(str(parquet)), rows)

    def keys(self, start: int, stop: int) -> list[str]:
        """Keys of a range of ids; only the row groups that hold them are read."""
        return [str(key) for key in self.column("key", start, stop).to_pylist()]

    def column(self, name: str, start: int, stop: int) -> pa.ChunkedArray:
        """A cold column (`key`, `digest`) over a range of ids."""
        first, last = start // GROUP_ROWS, max(start, stop - 1) // GROUP_ROWS
        with pq.ParquetFile(self.parquet) as file:
            table = file.read_row_groups(list(range(first, last + 1)), columns=[name])
        return table[name].slice(start - first * GROUP_ROWS, stop - start)


def write_parquet(table: pa.Table, path: Path) -> pa.Table:
    """Sort the rows into index order and write them; returns the sorted table. Equal rows give equal bytes (of one pyarrow version)."""
    ordered = table.take(pc.sort_indices(table, sort_keys=[("split", "ascending"), ("shard", "ascending"), ("offset", "ascending")]))
    pq.write_table(ordered.combine_chunks(), path, compression="zstd", row_group_size=GROUP_ROWS, store_schema=False)
    return ordered


def _write_hot(parquet: Path, hot: Path) -> None:
    table = pq.read_table(parquet, columns=list(HOT.names or ()))
    rows = np.empty(table.num_rows, HOT)
    for name in HOT.names or ():
        rows[name] = table[name].to_numpy()
    with written(hot):
        handle, temporary = tempfile.mkstemp(dir=hot.parent, prefix=f"{parquet.stem}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, rows)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(hot)
        finally:
            Path(temporary).unlink(missing_ok=True)
