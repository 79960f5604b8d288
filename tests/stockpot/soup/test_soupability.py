"""Guards: whatever happened to an ingredient's stored files, it is named with the reason and counted, and never averaged; and too few that
are left make no soup. The files are real, in a real ledger, and broken there."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from stockpot.checkpoints import load_weights, save_weights
from stockpot.config import SoupSpec, Sweep
from stockpot.digests import canonical, digest, file_digest
from stockpot.errors import ServerUnreachable, TooFewIngredients
from stockpot.ledger import tracking
from stockpot.ledger.connection import client
from stockpot.models.classifier import ModelConfig
from stockpot.outcomes import Ingredient
from stockpot.settings import TrialSettings
from stockpot.soup.soupability import check_accuracy, gather
from stockpot.soup.souping import cook
from tests.tiny_sweep import NORM, Ground, finish_trial, finish_trials, on_ground, tiny_sweep


def store(ingredient: Ingredient, path: Path) -> None:
    """Replace a file of an ingredient in the ledger."""
    get_artifact_repository(client().get_logged_model(ingredient.model_id).artifact_location).log_artifact(str(path))


def change(ingredient: Ingredient, folder: Path, name: str, edit: Callable[[bytes], bytes]) -> None:
    path = folder / f"trial-{ingredient.index}" / name
    path.write_bytes(edit(path.read_bytes()))
    store(ingredient, path)


def record_again(ingredient: Ingredient, folder: Path, name: str, **other: object) -> None:
    """Store a changed file, and let the record say so: only its content can give it away."""
    path = folder / f"trial-{ingredient.index}" / name
    store(ingredient, path)
    record = ingredient.model_copy(update={"files": ingredient.files | {name: file_digest(path)}, **other})
    client().set_logged_model_tags(ingredient.model_id, {"stockpot.ingredient": record.model_dump_json()})


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def broken(ground: Ground, sweep: Sweep, folder: Path) -> dict[str, str]:
    """Nine trials of a sweep of eleven, each broken in another way: id to what must be said of it."""
    flip, cut, gone, lost, numbers, unfounded, other_config, other_shapes, other_init = finish_trials(ground, sweep, folder, only=range(9))
    change(flip, folder, "model.safetensors", flipped)
    change(cut, folder, "model.safetensors", lambda data: data[: len(data) // 2])
    get_artifact_repository(client().get_logged_model(gone.model_id).artifact_location).delete_artifacts("held_out.safetensors")
    client().delete_logged_model(lost.model_id)

    logits = load_weights(folder / "trial-4" / "held_out.safetensors")
    logits["logits"][7, 1] = float("nan")
    save_weights(folder / "trial-4" / "held_out.safetensors", logits)
    record_again(numbers, folder, "held_out.safetensors")
    save_weights(folder / "trial-5" / "held_out.safetensors", {"labels": logits["labels"]})
    record_again(unfounded, folder, "held_out.safetensors")

    config = folder / "trial-6" / "model.json"
    config.write_bytes(
        canonical(ModelConfig.model_validate_json(config.read_bytes()).model_copy(update={"classes": ("blue", "green", "red")}))
    )
    record_again(other_config, folder, "model.json")
    weights = folder / "trial-7" / "model.safetensors"
    state = load_weights(weights)
    sha256 = save_weights(weights, state | {"head.weight": torch.zeros(3, 9)})
    record_again(other_shapes, folder, "model.safetensors", weights_sha256=sha256)
    record_again(other_init, folder, "card.json", init_digest=digest("another init"))
    return {
        flip.trial_id: "its weights have sha256",
        cut.trial_id: "its weights have sha256",
        gone.trial_id: "held_out.safetensors is missing",
        lost.trial_id: "is gone",
        numbers.trial_id: "logits that are no numbers",
        unfounded.trial_id: "no `logits`",
        other_config.trial_id: "its model config has another classes",
        other_shapes.trial_id: "`head.weight` is float32 [3, 9] in it and float32 [3, 8]",
        other_init.trial_id: "It started from init",
    }


def test_a_ledger_that_goes_away_leaves_no_file_open(ground: Ground, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the room on the disk that an open file keeps; whether the others are on their way by then, or examined."""
    sweep = tiny_sweep(ground, f"away-{uuid4().hex[:8]}", 3)
    ingredients, fetch, place = finish_trials(ground, sweep, tmp_path), tracking.fetch_ingredient, tmp_path / "pool"

    def open_files() -> int:
        return sum(path.is_symlink() and str(path.readlink()).startswith(str(place)) for path in Path("/proc/self/fd").iterdir())

    def away(lost: Ingredient, ingredient: Ingredient, folder: Path) -> Path:
        if ingredient == lost:
            raise ServerUnreachable("gone")
        return fetch(ingredient, folder)

    with closing(gather(ingredients, sweep.init, place)):
        assert open_files() >= 3
    for lost in (ingredients[0], ingredients[2]):
        monkeypatch.setattr(tracking, "fetch_ingredient", partial(away, lost))
        with pytest.raises(ServerUnreachable):
            gather(ingredients, sweep.init, place)
        assert not open_files()


def test_every_broken_ingredient_is_named_counted_and_left_out(ground: Ground, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, f"broken-{uuid4().hex[:8]}", 11)
    told = broken(ground, sweep, tmp_path)
    known = [one for one in tracking.find_ingredients(sweep) if one.trial_id in told]
    lost = [trial for trial, words in told.items() if words == "is gone"]
    assert [one for one in told if one not in {one.trial_id for one in known}] == lost, "what is gone before it is looked for is not found"
    whole = [finish_trial(ground, sweep, index, tmp_path) for index in (9, 10)]
    pool = gather([*known, *whole], sweep.init, tmp_path / "pool")
    assert set(pool.candidates) == {one.trial_id for one in whole}
    assert pool.excluded.keys() == told.keys() - set(lost)
    assert [trial for trial, reason in pool.excluded.items() if told[trial] not in reason] == []
    one = pool.candidates[whole[0].trial_id]
    labels_N, digest = load_weights(tmp_path / "trial-9" / "held_out.safetensors")["labels"].numpy(), one.ingredient.transform_digest
    assert check_accuracy(one, labels_N, digest) is None
    assert "scored on images prepared another way" in str(check_accuracy(one, labels_N, "another"))
    assert f"It has {len(labels_N)} held-out logits, the split has {len(labels_N) - 1}" in str(check_accuracy(one, labels_N[1:], digest))
    mute = replace(one, logits=one.logits.index_fill(0, torch.tensor([3, 5]), float("nan")))
    assert f"It has no answer to 2 of {len(labels_N)}" in str(check_accuracy(mute, labels_N, digest))
    with pytest.raises(TooFewIngredients, match="Found 2 ingredients of the sweep that are fit for a soup, 3 are needed") as refused:
        replace(pool, minimum=3).without({})
    assert [trial for trial in pool.excluded if trial not in str(refused.value)] == []


@pytest.mark.slow
def test_an_ingredient_that_vanishes_while_it_is_fetched_is_left_out(ground: Ground, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, f"broken-{uuid4().hex[:8]}", 2)
    whole, lost = finish_trials(ground, sweep, tmp_path)
    client().delete_logged_model(lost.model_id)
    pool = gather([whole, lost], sweep.init, tmp_path / "pool")
    assert f"its LoggedModel {lost.model_id} is gone" in pool.excluded[lost.trial_id]


@pytest.mark.slow
def test_earlier_sweeps_do_not_make_up_for_the_sweeps_own(ground: Ground, ledger: str, tmp_path: Path) -> None:
    under = on_ground(ground, NORM, tmp_path / "init")
    model = f"broken-{uuid4().hex[:8]}"
    before = tiny_sweep(under, model, 2, settings=TrialSettings(seed=7))
    finish_trials(under, before, tmp_path / "before")
    sweep = tiny_sweep(under, model, 2, SoupSpec(earlier=2, minimum=2))
    finish_trials(under, sweep, tmp_path, only=[0])
    with pytest.raises(TooFewIngredients, match="Found 1 ingredients"):
        cook(sweep.id, say=[].append)
