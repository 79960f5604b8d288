"""mergekit's linear method as a process that waits to be asked, so that its older libraries never meet ours: `arithmetic` or `written` on
its input is one merge, the seconds it took are one line of its output. See `benchmarks/soup_average.py` for how to get it.

    python benchmarks/_mergekit.py OUT FILE...
"""

import sys
import time
from typing import Any

import torch
from mergekit.graph import Executor  # type: ignore[import-not-found]  # no dependency: installed by hand, see above
from mergekit.options import MergeOptions  # type: ignore[import-not-found]  # no dependency: installed by hand, see above
from mergekit.scripts import merge_raw_pytorch as raw  # type: ignore[import-not-found]  # no dependency: installed by hand, see above


def merge(config: Any, out: str, *, written: bool) -> float:
    """Seconds of its own plan and executor, in raw mode; without the writing its tensor tasks are executed and the results kept."""
    began = time.perf_counter()
    raw.SimpleLoaderCache._instance = None
    tasks = raw.plan_flat_merge(config, out, False, False, MergeOptions())
    if written:
        Executor(tasks, math_device="cpu", storage_device="cpu").execute()
    else:
        tensors = [task.tensor_task for task in tasks if hasattr(task, "tensor_task")]
        kept = dict(Executor(tensors, math_device="cpu", storage_device="cpu").run(quiet=True))
        assert len(kept) == len(tensors)
    return time.perf_counter() - began


if __name__ == "__main__":
    torch.set_num_threads(2)
    models = [{"model": file, "parameters": {"weight": 1.0}} for file in sys.argv[2:]]
    given = raw.RawPyTorchMergeConfig.model_validate({"merge_method": "linear", "models": models, "dtype": "float32"})
    print("ready", flush=True)
    for line in sys.stdin:
        print(merge(given, sys.argv[1], written=line.strip() == "written"), flush=True)
