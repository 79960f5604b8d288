"""litdata and mosaicml-streaming over local shards, each in a process of its own: both change what they are imported into, and neither is a
dependency. They are looked for in `.stockpot/peers`, which this fills (some 90 MB; `--no-deps`, as the second pins an older numpy):

    .venv/bin/uv pip install --target .stockpot/peers --no-deps litdata mosaicml-streaming lightning_utilities brotli python-snappy \\
        cramjam zstd xxhash catalogue "transformers<5" "tokenizers<0.23" "huggingface-hub<1"

A peer's process packs the photos, says `ready`, and reads one epoch for every `epoch` on its input, answering with the seconds.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks._photos import photos
from benchmarks._readers import BATCH, WORKERS, Loaded, image_of

FOLDER = Path(".stockpot/peers").absolute()


class Peer:
    """A peer's process; `there` is False where the peer is not installed."""

    def __init__(self, module: str, count: int) -> None:
        self.there = (FOLDER / module).is_dir()
        if not self.there:
            print(f"{module} is not installed, so it is not measured; benchmarks/_peers.py says how", file=sys.stderr)
            return
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._peers", module, str(count)],
            env=os.environ | {"PYTHONPATH": str(FOLDER)}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._heard("ready")

    def epoch(self) -> float:
        """Seconds of one epoch."""
        assert self.process.stdin
        print("epoch", file=self.process.stdin, flush=True)
        return float(self._heard("seconds").split()[1])

    def close(self) -> None:
        """End the process."""
        if self.there:
            assert self.process.stdin
            print("end", file=self.process.stdin, flush=True)  # closing it is not enough: processes forked since hold it too
            self.process.wait()

    def _heard(self, word: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word):
                return line
        raise RuntimeError(f"a peer ended before it said {word!r}")


def litdata(folder: Path, count: int) -> Any:
    """A loader over litdata chunks."""
    import litdata
    from litdata.streaming.writer import BinaryWriter

    class Pictures(litdata.StreamingDataset):  # type: ignore[misc]  # untyped, and no dependency
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return image_of(sample["jpg"]), sample["label"]

    writer = BinaryWriter(str(folder), chunk_bytes="16MB")
    for number, photo in enumerate(photos(count)):
        writer.add_item(number, {"jpg": photo.data, "label": photo.label})
    writer.done()
    writer.merge()
    return litdata.StreamingDataLoader(Pictures(str(folder), shuffle=False), batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)


def streaming(folder: Path, count: int) -> Any:
    """A loader over mosaicml-streaming's MDS shards."""
    from streaming import MDSWriter, StreamingDataset

    class Pictures(StreamingDataset):  # type: ignore[misc]  # untyped, and no dependency
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return image_of(sample["jpg"]), sample["label"]

    with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "label": "int"}, size_limit=16 * 2**20) as writer:
        for photo in photos(count):
            writer.write({"jpg": photo.data, "label": photo.label})
    dataset = Pictures(local=str(folder / "mds"), shuffle=False, batch_size=BATCH)
    return DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)


def main(module: str, count: int) -> None:
    """Read an epoch for every `epoch` on standard input."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="stockpot-peer-") as folder:
        reader = Loaded()
        reader.loader = {"litdata": litdata, "streaming": streaming}[module](Path(folder), count)
        print("ready", flush=True)
        while sys.stdin.readline() == "epoch\n":
            print("seconds", reader.epoch(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
