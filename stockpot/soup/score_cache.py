"""Scores already measured on this node, keyed by everything that decides them: weights and how often each, split, evaluation transform, and
what computes. A soup that was interrupted, or is cooked another way, repeats no forward pass.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch

from stockpot.digests import short
from stockpot.fields import Metric
from stockpot.outcomes import Accuracy
from stockpot.soup.recipes.examining import Verdict

ARITHMETIC = "float32 means in the order of sha256"
"""How weights are averaged: another way, other last bits, other scores."""


@dataclass(frozen=True)
class ScoreCache:
    """A folder with one small JSON file per score."""

    folder: Path
    device: str
    metric: Metric = "accuracy"

    def key(self, weights_sha256: Sequence[str], split_digest: str, split: str, transform_digest: str) -> str:
        """The identity of one score. `weights_sha256`: the averaged files, in any order; one averaged twice is named twice."""
        parts = [ARITHMETIC, sorted(weights_sha256), split_digest, split, transform_digest, self.device, torch.__version__]
        return short(parts if self.metric == "accuracy" else [*parts, self.metric])

    def get(self, key: str, need: int) -> Verdict | None:
        """A stored verdict that answers whether `need` correct answers are reached; None where none is whole."""
        try:
            stored = json.loads((self.folder / f"{key}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        verdict = Verdict(Accuracy(correct=stored["correct"], seen=stored["seen"], other=stored.get("other")), stored["examined"])
        exact = verdict.examined == verdict.accuracy.seen
        return verdict if exact or verdict.accuracy.correct < need else None

    def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict; a crash leaves either nothing or the whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{key}.{uuid4().hex[:8]}.part"
        part.write_text(json.dumps({**verdict.accuracy.model_dump(), "examined": verdict.examined}))
        part.rename(self.folder / f"{key}.json")
