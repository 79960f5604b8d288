"""The table behind the demo's claim: six frozen seeds under three learning-rate schedules, in this process, without servers.

`python -m deployments.demo.control` recomputes `control.json` beside this file (about half an hour on two cores). A seed redraws the
splits, the base model and the sweep; the schedules share all of that. Same data, reader, trainer and recipe as the real flows.
"""

# N samples, C classes

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from deployments.demo.digits import publish_digits
from deployments.demo.pretraining import pretrain
from stockpot.config import BaseSpec, InitSpec, SoupSpec, SweepSpec
from stockpot.data.shards import Pixels, pixels
from stockpot.data.snapshots import Snapshot, open_snapshot, pin
from stockpot.evaluation import accuracy, logits
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.loading import load_state
from stockpot.outcomes import Accuracy
from stockpot.processes import end_with_parent
from stockpot.soup.recipes.examining import Verdict
from stockpot.soup.recipes.greedy import greedy, members, ranked
from stockpot.sweeps import draw
from stockpot.training import inits
from stockpot.training.course import fine_tune

SEEDS = (10, 11, 12, 13, 14, 15)
SCHEDULES = {"constant": ["constant"], "mixed": ["constant", "cosine"], "cosine": ["cosine"]}
REQUEST = Path(__file__).parents[1] / "requests" / "digits.yaml"
RESULT = Path(__file__).with_name("control.json")
MODELS = ("init", "mean_single", "best_single", "greedy", "uniform")

Weights = dict[str, Tensor]


def main() -> None:
    """Compute every seed, a process each, and write the table."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_be_modest) as pool:
        seeds = dict(zip(map(str, SEEDS), pool.map(run_seed, SEEDS), strict=True))
    RESULT.write_text(json.dumps(summary(seeds), indent=1) + "\n")


def _be_modest() -> None:
    """One thread a process, so that figures do not depend on the machine's cores; behind whatever else runs, and gone with who asked."""
    end_with_parent()
    torch.set_num_threads(1)
    os.nice(5)


def summary(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds of the test accuracy of every model and of greedy minus best single; and every seed."""
    table: dict[str, Any] = {"split": "test", "unit": "fraction", "mean": {}, "sd": {}, "seeds": seeds}
    for schedule in SCHEDULES:
        columns = {model: [seed[schedule][model]["test"] for seed in seeds.values()] for model in MODELS}
        columns["gain"] = [soup - best for soup, best in zip(columns["greedy"], columns["best_single"], strict=True)]
        table["mean"][schedule] = {name: round(statistics.fmean(values), 4) for name, values in columns.items()}
        table["sd"][schedule] = {name: round(statistics.stdev(values), 4) for name, values in columns.items() if len(values) > 1}
    return table


def run_seed(seed: int) -> dict[str, Any]:
    """Every schedule of one seed: test and held_out accuracies as fractions, and the trials in the greedy soup."""
    request = yaml.safe_load(REQUEST.read_text())
    with tempfile.TemporaryDirectory(prefix="stockpot-control-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        data = publish_digits(f"{folder}/digits", seed)
        arch, weights = pretrain(data, f"{folder}/base", seed)
        pinned = pin(data["snapshot"])
        base, spec = BaseSpec(arch=arch, weights=weights), InitSpec.model_validate(request["init"])
        config, init = inits.fetch(inits.prepare(base, spec, pinned, f"{folder}/store"))
        table = Table(config, init, open_snapshot(pinned), open_snapshot(pin(data["test"])), SoupSpec.model_validate(request["soup"]))
        return {schedule: table.sweep(_sweep(request, seed, choices)) for schedule, choices in SCHEDULES.items()}


def _sweep(request: dict[str, Any], seed: int, schedules: list[str]) -> SweepSpec:
    space = {**request["sweep"]["space"], "schedule": {"choice": schedules}}
    return SweepSpec.model_validate({**request["sweep"], "seed": seed, "space": space})


class Table:
    """One seed: everything its sweeps share."""

    def __init__(self, config: ModelConfig, init: Weights, main: Snapshot, test: Snapshot, soup: SoupSpec) -> None:
        self.preprocess = config.preprocess
        self.model: Classifier = build(config)
        self.init, self.main, self.soup = init, main, soup
        self.splits: dict[str, Pixels] = {
            "held_out": pixels(main, "held_out", self.preprocess),
            "test": pixels(test, "test", self.preprocess),
        }

    def score(self, weights: Weights, split: str) -> Accuracy:
        """Accuracy of these weights on a split."""
        load_state(self.model, weights)
        return accuracy(logits(self.model, self.splits[split].images, self.preprocess), self.splits[split].labels)

    def sweep(self, spec: SweepSpec) -> dict[str, Any]:
        """Train every trial, cook, and score on test."""
        trained: dict[str, Weights] = {}
        for index, settings in enumerate(draw(spec)):
            load_state(self.model, self.init)
            fine_tune(self.model, settings, self.main)
            trained[f"{index:02d}"] = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        held_out = {trial: self.score(weights, "held_out") for trial, weights in trained.items()}

        def examine(trials: Sequence[str], need: int) -> Verdict:  # noqa: ARG001  (looks at everything, whatever is needed)
            after = self.score(mean([trained[trial] for trial in trials]), "held_out")
            return Verdict(after, after.seen)

        soup = members(greedy(held_out, examine, self.soup.accept))
        models = {
            "init": self.init,
            "best_single": trained[ranked(held_out)[0]],
            "greedy": mean([trained[trial] for trial in soup]),
            "uniform": mean(list(trained.values())),
        }
        rows: dict[str, Any] = {
            name: {split: self.score(weights, split).value for split in self.splits} for name, weights in models.items()
        }
        singles = [self.score(weights, "test").value for weights in trained.values()]
        rows["mean_single"] = {"held_out": statistics.fmean(one.value for one in held_out.values()), "test": statistics.fmean(singles)}
        return {**rows, "ingredients": soup}


def mean(weights: Sequence[Weights]) -> Weights:
    """The plain average, summed in float64."""
    return {name: torch.stack([one[name].double() for one in weights]).mean(0).to(weights[0][name].dtype) for name in weights[0]}


if __name__ == "__main__":
    main()
