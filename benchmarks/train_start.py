"""Where a trial's start goes, from its process' start to its first step.

`train.start_up`: CPU seconds in the parts that `spread` names, and on the clock in `on_the_clock`; both add up to the whole. The trial runs
as its flow does, against Prefect, MLflow and SeaweedFS on loopback, on a node with an empty cache and a tower of 2 million weights; a
larger one takes longer to fetch. Before it come the worker's own: its question for work every few seconds, and starting the process.
"""

import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks._ground import opened_trials
from benchmarks.train import ARCH, SETTINGS
from stockpot.config import Trial

REPEATS = 3
Parts = dict[str, list[float]]
"""CPU seconds and seconds on the clock, by part."""


def measure(repeats: int = REPEATS) -> dict[str, dict[str, Any]]:
    """Every figure by its name in the bench file: of the trial that took the least."""
    with opened_trials(repeats, ARCH, SETTINGS) as trials:
        runs = [started(trial) for trial in trials]
    totals = [sum(cpu for cpu, _ in run.values()) for run in runs]
    best = runs[totals.index(min(totals))]
    return {
        "train.start_up": {
            "ratio": min(totals),
            "unit": "CPU seconds from process start to the first step, the least of all repeats",
            "peer": f"import torch alone: {best['import torch'][0]:.2f}",
            "repeats": repeats,
            "spread": {part: round(cpu, 3) for part, (cpu, _) in best.items()},
            "on_the_clock": {part: round(clock, 3) for part, (_, clock) in best.items()},
            "of_each_repeat": [round(total, 2) for total in totals],
        }
    }


def started(trial: Trial) -> Parts:
    """The parts of a trial's start, in a process of its own, on a node that has read nothing yet."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": f"{os.environ['XDG_CACHE_HOME']}/{trial.id}"}
    call = [sys.executable, "-m", "benchmarks._started", trial.model_dump_json(), str(time.monotonic())]
    run = subprocess.run(call, env=environ, stdout=subprocess.PIPE, check=True, text=True)
    parts: Parts = json.loads(run.stdout.splitlines()[-1])
    return parts


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
