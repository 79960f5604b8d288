"""One trial from its process' start to its first step, as the flow `finetune` runs it; prints the CPU seconds, and those on the clock, of
each part. A part ends where something named here returns and begins where the one before it ended: together they leave nothing out.

    python -m benchmarks._started TRIAL BEGAN      BEGAN: the monotonic clock just before the process was started
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

LAST = [0.0, float(sys.argv[2])]
PARTS: dict[str, list[float]] = {}
IMPORTS = {
    "torch": "import torch",
    "stockpot.data.shards": "import torchvision, s3fs and the data plane",
    "stockpot.ledger.trial_log": "import mlflow",
    "stockpot.models.classifier": "import open_clip, timm and transformers",
    "stockpot.training.trials": "import the rest of a trial",
}


def ended(part: str) -> None:
    """Count what has passed since the last end to this part."""
    now = [time.process_time(), time.monotonic()]
    PARTS[part] = [sum(each) for each in zip(PARTS.get(part, [0.0, 0.0]), now, [-last for last in LAST], strict=True)]
    LAST[:] = now


def ending(owner: Any, name: str, part: str, then: Callable[[], None] = lambda: None) -> None:
    """Let a part end whenever that function of a module or a class returns; `then` is called after it."""
    real: Callable[..., Any] = getattr(owner, name)

    def function(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        ended(part)
        then()
        return found

    setattr(owner, name, function)


def watch() -> None:
    """Let the parts of a trial end where they do."""
    from stockpot.training import course, inits, optimisation, trials
    from stockpot.training.moving_parts import Training

    ending(trials, "_finished", "MLflow: is it finished already")
    ending(inits, "fetch", "fetch the init, check its digest and logits")
    ending(trials, "open_snapshot", "open the snapshot")
    ending(trials, "Attempt", "claim the trial")
    ending(trials.TrialLog, "__enter__", "MLflow: open the run")
    ending(trials.TrialLog, "params", "MLflow: open the run")
    ending(course, "load_state", "build the model")
    ending(course, "open_snapshot", "open the snapshot")
    ending(Training, "__init__", "reader and optimiser")
    ending(optimisation, "learning_rate", "first batch")  # asked for as soon as a batch is there
    ending(Training, "advance", "first step", then=report)


def report() -> NoReturn:
    """Print the parts; nothing after the first step is of interest."""
    print(json.dumps(PARTS), flush=True)
    os._exit(0)


def main() -> None:
    """The flow, whose task claims the GPUs before it imports what a trial needs."""
    import tasks.finetuning
    from flows.finetune import finetune
    from stockpot.config import Trial

    claimed_gpus = tasks.finetuning.claimed_gpus

    @contextmanager
    def claimed(count: int) -> Iterator[tuple[str, ...]]:
        ended("Prefect: begin the flow and its task")
        for module, part in IMPORTS.items():
            importlib.import_module(module)
            ended(part)
        watch()
        with claimed_gpus(count) as held:
            yield held

    tasks.finetuning.claimed_gpus = claimed
    trial = Trial.model_validate_json(sys.argv[1])
    ended("import Prefect and the flow")
    finetune(trial)


if __name__ == "__main__":
    ended("Python")
    main()
