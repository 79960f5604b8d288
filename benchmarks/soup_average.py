"""Averaging 8 files of ViT-B/32 size (image tower and a 1000-class head, 154 float32 tensors, 353 MB each): ours against the reference's
arithmetic, timm's, mergekit's linear method, and reading the bytes once; and the memory it takes.

The peers' lines are restated here from what their scripts do (mlfoundations/model-soups `main.py`; timm `avg_checkpoints.py`); mergekit is
run itself, in a process of its own (it is LGPL and no dependency of ours, and its libraries are older). To get it, in the repository root:

    .venv/bin/uv pip install --python .venv/bin/python --target .stockpot/peers/mergekit --no-deps \\
        mergekit==0.1.5 'transformers>=5,<6' tokenizers huggingface-hub immutables accelerate peft datasets

All on warm files, peers and ours in turn; the ratio is of the medians, the spread is the range of the pairwise ratios. No figure but
`_written` includes writing the result to the disk, which for ours includes the sha256 of what is written. The limit is memory: a core
reads some 10 GB/s, so beside each peer stands `possible`, its time over that of reading every byte once.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks._memory import Watched
from stockpot.checkpoints import save_weights
from stockpot.digests import file_digest
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.weights import open_weights

FILES = 8
REPEATS = 5


def measure() -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as scratch:
        folder = Path(scratch)
        size, digests = _write(folder)
        peers: dict[str, Callable[[], object]] = {
            "soup.average_vs_reference": lambda: _reference(folder),
            "soup.average_vs_timm": lambda: _timm(folder),
            "soup.average_vs_read": lambda: _read(folder),
        }
        with _mergekit(folder) as merge:
            if merge:
                peers["soup.average_vs_mergekit"] = lambda: merge("arithmetic")
            found = _against(peers, lambda: _ours(folder, digests))
            if merge:
                found |= _against({"soup.average_vs_mergekit_written": lambda: merge("written")}, lambda: _ours_written(folder, digests))
        found |= _memory(folder, size)
    return found


def vit_b_32() -> dict[str, tuple[int, ...]]:
    """Names and shapes of an open_clip ViT-B/32 image tower and a 1000-class head."""
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (768,), "positional_embedding": (50, 768), "proj": (768, 512), "conv1.weight": (768, 3, 32, 32),
        "ln_pre.weight": (768,), "ln_pre.bias": (768,), "ln_post.weight": (768,), "ln_post.bias": (768,),
    }  # fmt: skip
    for block in range(12):
        parts = {
            "ln_1.weight": (768,), "ln_1.bias": (768,), "attn.in_proj_weight": (2304, 768), "attn.in_proj_bias": (2304,),
            "attn.out_proj.weight": (768, 768), "attn.out_proj.bias": (768,), "ln_2.weight": (768,), "ln_2.bias": (768,),
            "mlp.c_fc.weight": (3072, 768), "mlp.c_fc.bias": (3072,), "mlp.c_proj.weight": (768, 3072), "mlp.c_proj.bias": (768,),
        }  # fmt: skip
        shapes |= {f"transformer.resblocks.{block}.{name}": shape for name, shape in parts.items()}
    body = {f"body.{name}": shape for name, shape in shapes.items()}
    return body | {"head.weight": (1000, 512), "head.bias": (1000,)}


def _write(folder: Path) -> tuple[int, list[str]]:
    """The same files for everyone: safetensors, and pickles for the reference. Returns the bytes of one, and the sha256 of each,
    which the ledger knows of every ingredient."""
    digests = []
    rng = torch.Generator().manual_seed(0)
    for number in range(FILES):
        state = {name: torch.randn(shape, generator=rng).mul_(0.02) for name, shape in vit_b_32().items()}
        digests.append(save_weights(folder / f"{number}.safetensors", state))
        torch.save(state, folder / f"{number}.pt")
    return (folder / "0.safetensors").stat().st_size, digests


def _ours(folder: Path, digests: list[str]) -> dict[str, Tensor]:
    files = [open_weights(folder / f"{number}.safetensors", sha256) for number, sha256 in enumerate(digests)]
    try:
        return average(files)
    finally:
        for file in files:
            file.close()


def _ours_written(folder: Path, digests: list[str]) -> None:
    save_weights(folder / "out" / "ours.safetensors", _ours(folder, digests))


def _reference(folder: Path) -> dict[str, Tensor]:
    """Plain torch.load, one dictionary of new tensors per file."""
    soup: dict[str, Tensor] = {}
    for number in range(FILES):
        state = torch.load(folder / f"{number}.pt", map_location="cpu", weights_only=True)
        if number == 0:
            soup = {name: tensor * (1.0 / FILES) for name, tensor in state.items()}
        else:
            soup = {name: tensor * (1.0 / FILES) + soup[name] for name, tensor in state.items()}
    return soup


def _timm(folder: Path) -> dict[str, Tensor]:
    """Float64 accumulators in a dictionary, cast at the end."""
    total: dict[str, Tensor] = {}
    for number in range(FILES):
        for name, tensor in load_file(folder / f"{number}.safetensors").items():
            if name in total:
                total[name] += tensor.to(torch.float64)
            else:
                total[name] = tensor.to(torch.float64)
    return {name: tensor.div_(FILES).to(torch.float32) for name, tensor in total.items()}


@contextmanager
def _mergekit(folder: Path) -> Iterator[Callable[[str], None] | None]:
    """Asks the waiting process for one merge; None where mergekit is not installed."""
    place = Path(".stockpot/peers/mergekit").absolute()
    if not (place / "mergekit").exists():
        print("soup.average_vs_mergekit: not installed, not measured (see the module's docstring)", file=sys.stderr)
        yield None
        return
    files = [str(folder / f"{number}.safetensors") for number in range(FILES)]
    command = [sys.executable, str(Path(__file__).with_name("_mergekit.py")), str(folder / "out" / "mergekit"), *files]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(place)}, **pipes) as process:

        def ask(what: str) -> None:
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
            if not process.stdout.readline():
                raise RuntimeError(f"mergekit's process ended with exit code {process.wait()}; install it as the docstring says")

        process.stdout.readline()
        yield ask
        process.stdin.close()


def _read(folder: Path) -> None:
    read_bytes([folder / f"{number}.safetensors" for number in range(FILES)])


def read_bytes(paths: Sequence[Path]) -> None:
    """Every byte of every file once, into a reused buffer, on as many threads as the average has."""
    piece = 1 << 19

    def read(job: tuple[int, int, int]) -> None:
        fd, start, stop = job
        buffer = bytearray(piece)
        for at in range(start, stop, piece):
            os.preadv(fd, [buffer], at)

    fds = [os.open(path, os.O_RDONLY) for path in paths]
    size, threads = os.fstat(fds[0]).st_size, torch.get_num_threads()
    jobs = [(fd, size * part // threads, size * (part + 1) // threads) for fd in fds for part in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, jobs))
    for fd in fds:
        os.close(fd)


def _against(peers: dict[str, Callable[[], object]], ours: Callable[[], object]) -> dict[str, dict[str, Any]]:
    """Time of each peer over ours (for the limit: ours over it), in turn, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in [*peers, "ours"]}
    for repeat in range(REPEATS + 1):
        for name, run in [*peers.items(), ("ours", ours)]:
            began = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - began)
    found = {}
    for name in peers:
        limit = name.endswith("_vs_read")
        over, under = ("ours", name) if limit else (name, "ours")
        pairs = [one / other for one, other in zip(times[over], times[under], strict=True)]
        found[name] = {
            "ratio": round(statistics.median(times[over]) / statistics.median(times[under]), 2),
            "unit": "our time / its time" if limit else "peer time / our time",
            "peer": name.rpartition("_vs_")[2],
            "repeats": REPEATS,
            "spread": [round(min(pairs), 2), round(max(pairs), 2)],
            "seconds": round(statistics.median(times["ours"]), 3),
        }
        if not limit and (least := times.get("soup.average_vs_read")):
            found[name]["possible"] = round(statistics.median(times[name]) / statistics.median(least), 2)
    return found


def _memory(folder: Path, size: int) -> dict[str, dict[str, Any]]:
    """Peak growth of a fresh process while averaging 2 and 8 files, in models."""
    found: dict[int, dict[str, float]] = {}
    for files in (2, FILES):
        command = [sys.executable, "-m", "benchmarks.soup_average", "--memory", str(folder), str(files)]
        grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found[files] = {name: grown[name] / size for name in grown}
    return {
        f"soup.{kind}_models": {
            "ratio": round(found[FILES][key], 3), "unit": "models of memory", "peer": "one model", "repeats": 1,
            "spread": [round(found[2][key], 3), round(found[FILES][key], 3)],
        }
        for kind, key in (("private", "Anonymous"), ("resident", "Rss"))
    }  # fmt: skip


def _grown(folder: Path, files: int) -> dict[str, int]:
    """Bytes this process grows by at its peak; call it in a fresh one."""
    opened = [open_weights(path, file_digest(path)) for path in (folder / f"{number}.safetensors" for number in range(files))]
    with Watched() as memory:
        average(opened)
    return memory.grown


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print(json.dumps(_grown(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        for name, figure in measure().items():
            print(name, figure)
