"""Which ingredients may be averaged. Every one is in, or out with a reason; a soup of strangers is refused, not cooked.

In: recorded files whole and unchanged, the sweep's init, that init's keys, shapes, types and ties, its model config (activation,
preprocessing and classes included), finite weights, and finite held-out logits that give the recorded accuracy. And where the request
draws a `barrier`, in one basin with the best single model: `basins`.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stockpot.checkpoints import load_weights, save_weights
from stockpot.config import Init
from stockpot.errors import IngredientMismatch, ModelError, TooFewIngredients
from stockpot.evaluation import accuracy
from stockpot.fields import Metric
from stockpot.ledger import tracking
from stockpot.models.classifier import ModelConfig
from stockpot.outcomes import Accuracy, Borrowed, Ingredient, ModelVersion
from stockpot.soup.recipes.averaging import first_non_finite, read_tensor
from stockpot.soup.recipes.weights import Weights, difference, open_weights
from stockpot.training import inits

# N samples of held_out, C classes

FETCHERS = 4
"""Ingredients on their way from storage at once: the next are fetched while one is examined."""


@dataclass(frozen=True)
class Candidate:
    """An ingredient on this node, fit for averaging."""

    ingredient: Ingredient
    weights: Weights
    config: ModelConfig
    logits: Tensor
    """Of held_out, float32 (N, C), as the trial recorded them."""


@dataclass(frozen=True)
class Pool:
    """What a sweep has to cook with."""

    start: Weights
    """The init all candidates started from."""
    config: ModelConfig
    """Its model config, which is theirs."""
    candidates: dict[str, Candidate]
    excluded: dict[str, str]
    """Trial id to the reason."""
    origins: dict[str, str] = field(default_factory=dict)
    """Candidates from elsewhere, earlier sweeps, other models and the champion, to the sweep each came from."""
    borrowed: dict[str, Borrowed] = field(default_factory=dict)
    """Those of other models."""
    champion: ModelVersion | None = None
    """The version that joined."""
    minimum: int = 1
    """The sweep's own candidates that must be left."""

    @property
    def held_out(self) -> dict[str, Accuracy]:
        """Each candidate's own held-out accuracy."""
        return {trial: one.ingredient.held_out for trial, one in self.candidates.items()}

    @property
    def duplicates(self) -> tuple[tuple[str, ...], ...]:
        """Candidates with the same weights to the bit, in groups of two and more."""
        groups: dict[str, list[str]] = {}
        for trial, one in self.candidates.items():
            groups.setdefault(one.ingredient.weights_sha256, []).append(trial)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    def close(self) -> None:
        """Close the weight files."""
        for weights in (self.start, *[one.weights for one in self.candidates.values()]):
            weights.close()

    def without(self, doubts: dict[str, str]) -> "Pool":
        """The pool less some candidates, each with its reason. Raises `TooFewIngredients` when too few of the sweep's own are left."""
        kept = {trial: one for trial, one in self.candidates.items() if trial not in doubts}
        for trial in self.candidates.keys() - kept.keys():
            self.candidates[trial].weights.close()
        champion = None if self.champion and self.champion.ingredient_id in doubts else self.champion
        return _enough(replace(self, candidates=kept, excluded=self.excluded | doubts, champion=champion))

    def rescored(self, trial: str, logits_NC: Tensor, labels_N: np.ndarray, transform_digest: str) -> "Pool":
        """The pool with one candidate judged on these held-out samples instead of those it recorded."""
        one = self.candidates[trial]
        score = {"held_out": accuracy(logits_NC, labels_N), "transform_digest": transform_digest}
        judged = replace(one, ingredient=one.ingredient.model_copy(update=score), logits=logits_NC)
        return replace(self, candidates=self.candidates | {trial: judged})

    def measured(self, metric: Metric, labels_N: np.ndarray) -> "Pool":
        """The pool with every candidate's accuracy beside what the request ranks by, from its logits."""
        return replace(
            self,
            candidates={
                trial: replace(one, ingredient=one.ingredient.model_copy(update={"held_out": accuracy(one.logits, labels_N, metric)}))
                for trial, one in self.candidates.items()
            },
        )


def gather(ingredients: list[Ingredient], init: Init, folder: Path, *, origins: dict[str, str] | None = None, minimum: int = 1) -> Pool:
    """Fetch and examine every ingredient. The init, which they all started from, says what their keys, shapes, types, ties and config are.

    origins: those of earlier sweeps among them, to the sweep of each. Raises `TooFewIngredients`, with every reason, when fewer than
    `minimum` of the others are fit.
    """
    candidates: dict[str, Candidate] = {}
    excluded: dict[str, str] = {}
    with ExitStack() as opened:  # a file left open keeps its room on the disk, also after the folder is removed
        start, config = open_init(init, folder)
        opened.callback(start.close)
        with ThreadPoolExecutor(FETCHERS) as fetchers:
            found = fetchers.map(lambda one: _examined(one, init, folder / one.trial_id, opened), ingredients)
            for ingredient, candidate in zip(ingredients, found, strict=True):
                try:
                    if isinstance(candidate, str):
                        raise IngredientMismatch(candidate)
                    require_alike(candidate.weights, candidate.config, start, config)
                    require_head(candidate.weights, config, start)
                    candidates[ingredient.trial_id] = candidate
                except IngredientMismatch as error:
                    excluded[ingredient.trial_id] = str(error)
        opened.pop_all()
    return _enough(Pool(start, config, candidates, excluded, origins or {}, minimum=minimum))


def check_accuracy(candidate: Candidate, labels_N: np.ndarray, transform_digest: str) -> str | None:
    """Why a candidate's recorded accuracy cannot be trusted on these labels; None when it can."""
    ingredient = candidate.ingredient
    if ingredient.transform_digest != transform_digest:
        return f"It was scored on images prepared another way ({ingredient.transform_digest}, the sweep's is {transform_digest})."
    if len(candidate.logits) != len(labels_N):
        return f"It has {len(candidate.logits)} held-out logits, the split has {len(labels_N)} samples."
    if silent := int((~candidate.logits.isfinite().all(dim=1)).sum()):
        return f"It has no answer to {silent} of {len(labels_N)} held-out samples: its logits there are no numbers."
    found = accuracy(candidate.logits, labels_N)
    return (
        None
        if found == ingredient.held_out
        else f"Its held-out logits give {found.correct} right, recorded were {ingredient.held_out.correct}."
    )


def _examined(ingredient: Ingredient, init: Init, folder: Path, opened: ExitStack) -> Candidate | str:
    """The candidate, or why it is none. opened: is to close its file, unless all is well."""
    try:
        candidate = _examine(ingredient, init, folder)
        opened.callback(candidate.weights.close)
        return candidate
    except (IngredientMismatch, ModelError) as error:
        return str(error)


def _examine(ingredient: Ingredient, init: Init, folder: Path) -> Candidate:
    require_init(ingredient.init_digest, init)
    tracking.fetch_ingredient(ingredient, folder)
    weights, config = open_model(folder, ingredient.weights_sha256)
    with ExitStack() as opened:
        opened.callback(weights.close)
        logits = load_weights(folder / "held_out.safetensors").get("logits")
        if logits is None or not bool(logits.isfinite().all()):
            what = "no `logits`" if logits is None else "logits that are no numbers"
            raise IngredientMismatch(f"Its held_out.safetensors holds {what}; run its trial again.")
        opened.pop_all()
    return Candidate(ingredient, weights, config, logits)


def require_init(init_digest: str, init: Init) -> None:
    """Raises `IngredientMismatch` unless something started from this init."""
    if init_digest != init.digest:
        raise IngredientMismatch(f"It started from init {init_digest[:12]}, the sweep's is {init.digest[:12]}: only one init averages.")


def open_init(init: Init, folder: Path) -> tuple[Weights, ModelConfig]:
    """An init's weights, fetched into `folder`, and its config. Raises `ModelError` when it is not what it was."""
    config, state = inits.fetch(init)
    sha256 = save_weights(folder / "init.safetensors", state)
    return open_weights(folder / "init.safetensors", sha256), config


def open_model(folder: Path, sha256: str) -> tuple[Weights, ModelConfig]:
    """The weights, all of them numbers, and the config of a model that was fetched and compared with this sha256. Raises
    `IngredientMismatch`."""
    weights = open_weights(folder / "model.safetensors", sha256)
    if name := first_non_finite(weights):
        weights.close()
        raise IngredientMismatch(f"`{name}` holds a NaN or an infinity; run its trial again with a lower learning rate.")
    return weights, ModelConfig.model_validate_json((folder / "model.json").read_bytes())


def require_alike(weights: Weights, config: ModelConfig, start: Weights, started: ModelConfig) -> None:
    """Raises `IngredientMismatch` unless weights and config are such as the init's."""
    found = difference(weights, start)
    if config != started:
        mine, theirs = config.model_dump(), started.model_dump()
        found = found or f"its model config has another {', '.join(name for name in mine if mine[name] != theirs[name])}"
    if found:
        weights.close()
        raise IngredientMismatch(f"It does not fit the init it says it started from: {found}.")


def require_head(weights: Weights, config: ModelConfig, start: Weights) -> None:
    """Raises `IngredientMismatch` where the init's head is frozen and this is another: only under one head bodies are borrowed."""
    for name in ("head.weight", "head.bias") if config.frozen_head else ():
        if not torch.equal(read_tensor(weights, name), read_tensor(start, name)):
            weights.close()
            raise IngredientMismatch(f"Its `{name}` is not the init's, whose head is frozen; run its trial again.")


def _enough(pool: Pool) -> Pool:
    own = len(pool.candidates.keys() - pool.origins.keys())
    if own < pool.minimum:
        pool.close()
        told = "; ".join(f"{trial}: {reason}" for trial, reason in pool.excluded.items()) or "no trial has finished"
        raise TooFewIngredients(
            f"Found {own} ingredients of the sweep that are fit for a soup, {pool.minimum} are needed ({told}); run the trials that are "
            "missing or unfit again, or ask for a smaller `minimum`."
        )
    return pool
