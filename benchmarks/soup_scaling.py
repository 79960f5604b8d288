"""How long averaging takes against the number of ingredients (2 to 72 of ViT-B/32 size) and against their size (an eighth to twice that),
and what dominates: the share of it that reading the bytes alone takes. Warm files; 8 different ones, named again beyond that.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.soup_average import read_bytes, vit_b_32
from stockpot.checkpoints import save_weights
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.weights import Weights, open_weights

COUNTS = (2, 4, 8, 16, 36, 72)
WIDTHS = (0.125, 0.5, 1.0, 2.0)
DIFFERENT = 8


def measure() -> dict[str, dict[str, Any]]:
    """`ratio` is the growth from the first point to the last over proportional growth: 1 is linear. `points` has every one."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as scratch:
        files = _write(Path(scratch), 1.0)
        by_count = {count: _point([files[number % DIFFERENT] for number in range(count)]) for count in COUNTS}
        by_size = {width: _point(files if width == 1 else _write(Path(scratch) / str(width), width)) for width in WIDTHS}
    return {"soup.time_by_ingredients": _figure(by_count, "ingredients"), "soup.time_by_size": _figure(by_size, "models of 353 MB")}


def _write(folder: Path, scale: float) -> list[Weights]:
    """Eight models with the tensors of a ViT-B/32, each longer or shorter by the scale."""
    rng = torch.Generator().manual_seed(0)
    files = []
    for number in range(DIFFERENT):
        path = folder / f"{number}.safetensors"
        shapes = {name: (max(1, int(shape[0] * scale)), *shape[1:]) for name, shape in vit_b_32().items()}
        files.append(open_weights(path, save_weights(path, {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()})))
    return files


def _point(files: list[Weights]) -> dict[str, float]:
    ours, read = _seconds(lambda: average(files)), _seconds(lambda: read_bytes([file.path for file in files]))
    return {
        "seconds": round(ours, 3),
        "reading_share": round(read / ours, 2),
        "gb": round(sum(f.path.stat().st_size for f in files) / 1e9, 2),
    }


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _figure(points: dict[float, dict[str, float]], unit: str) -> dict[str, Any]:
    first, *_, last = points.values()
    growth = last["seconds"] / first["seconds"] / (last["gb"] / first["gb"])
    return {
        "ratio": round(growth, 2), "unit": "growth over proportional growth", "peer": f"seconds against {unit}", "repeats": 3,
        "spread": [round(growth, 2)] * 2, "points": {str(at): point for at, point in points.items()},
    }  # fmt: skip


if __name__ == "__main__":
    for name, figure in measure().items():
        print(name, figure)
