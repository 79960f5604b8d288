"""Guards: a sweep is cooked once, from what is fit, and everything about it can be read back from the ledger."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from stockpot.checkpoints import load_weights, save_weights
from stockpot.config import MixingSpec, PinnedSnapshot, SoupSpec, Sweep
from stockpot.data import images
from stockpot.data.images import decode
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.data.splits import point
from stockpot.digests import canonical, file_digest
from stockpot.errors import BadRequest, SweepMissing, TooFewIngredients
from stockpot.evaluation import accuracy, logits, right
from stockpot.fields import Metric
from stockpot.ledger import tracking
from stockpot.ledger.connection import client, fetch_file
from stockpot.models.classifier import Classifier, build
from stockpot.models.folders import fingerprint, write_model
from stockpot.models.loading import load_state
from stockpot.outcomes import Accuracy, GreedyStep, Scores, SoupReport
from stockpot.release.explaining import reproduce
from stockpot.release.releasing import register
from stockpot.settings import TrialSettings
from stockpot.soup import table
from stockpot.soup.dishes import on_line, stock
from stockpot.soup.kitchen import Kitchen
from stockpot.soup.recipes.ensemble import greedy_ensemble
from stockpot.soup.recipes.greedy import ranked, shuffled
from stockpot.soup.recipes.interpolation import ALPHAS
from stockpot.soup.recipes.learned import mixture
from stockpot.soup.recipes.weights import open_weights
from stockpot.soup.soupability import gather
from stockpot.soup.souping import _greedy, cook
from stockpot.soup.statistics import calibration_error, temperature
from tests import tiny_sweep as tiny_sweep_module
from tests.tiny_sweep import Ground, finish_trial, finish_trials, tiny_sweep


def quiet(line: str) -> None:
    pass


@pytest.fixture
def sweep(ground: Ground, ledger: str) -> Sweep:
    return tiny_sweep(ground, f"souping-{uuid4().hex[:8]}")


def test_a_sweep_is_cooked_recorded_and_not_cooked_again(ground: Ground, sweep: Sweep, tmp_path: Path) -> None:
    singles = finish_trials(ground, sweep, tmp_path)
    lines: list[str] = []
    report = cook(sweep.id, flow_run_id="flow-7", say=lines.append)
    assert (
        report.scores["greedy"].held_out.correct
        >= report.scores["best_single"].held_out.correct
        == max(one.held_out.correct for one in singles)
    )
    assert report.scores["greedy"].held_out == [step.after for step in report.steps if step.kept][-1]
    assert [step.trial_id for step in report.steps] == sorted((one.trial_id for one in singles), key=rank_of(singles))
    assert len(report.trials) == 5
    (best,) = [point for point in report.trials if point.trial_id == report.best_single]
    model = build(ground.config)
    load_state(model, load_weights(tmp_path / f"trial-{best.index}" / "model.safetensors"))

    def own(snapshot: PinnedSnapshot, split: str = "test") -> Accuracy:
        seen = pixels(open_snapshot(snapshot), split, ground.config.preprocess)
        return accuracy(logits(model, seen.images, ground.config.preprocess), seen.labels)

    data = sweep.data
    assert data.test
    assert report.scores["best_single"] == Scores(
        held_out=own(data.snapshot, "held_out"),
        gate=own(data.snapshot, "gate"),
        test=own(data.test),
        shifts={"noisy": own(data.shifts["noisy"])},
    )
    assert best.scores.shifts == report.scores["best_single"].shifts
    assert {point.trial_id for point in report.trials if point.kept} == {*report.ingredients}
    assert tracking.read_report(sweep.id) == report
    assert "flow-7" in client().get_run(report.mlflow_run_id).data.tags.values()
    again: list[str] = []
    assert cook(sweep.id, say=again.append) == report
    assert len(again) == 1


def test_a_trial_that_computes_something_else_after_reloading_is_left_out(
    ground: Ground, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_trials(ground, sweep, tmp_path, only=[0, 1])

    def forged(folder: Path, model: Classifier) -> str:
        sha256 = write_model(folder, model)
        stored = fingerprint(model)
        other = stored.model_copy(update={"logits": tuple(tuple(value + 1 for value in row) for row in stored.logits)})
        (folder / "fingerprint.json").write_bytes(canonical(other))
        return sha256

    monkeypatch.setattr(tiny_sweep_module, "write_model", forged)
    (strange,) = finish_trials(ground, sweep, tmp_path, only=[2])
    report = cook(sweep.id, say=quiet)
    assert list(report.excluded) == [strange.trial_id]
    assert "The reloaded model is another one" in report.excluded[strange.trial_id]


def rank_of(singles: list) -> object:
    held_out = {one.trial_id: one.held_out.correct for one in singles}
    return lambda trial: (-held_out[trial], trial)


def test_the_run_holds_card_picture_gate_logits_and_the_soup(ground: Ground, sweep: Sweep, tmp_path: Path) -> None:
    singles = finish_trials(ground, sweep, tmp_path)
    report = cook(sweep.id, say=quiet)
    assert client().get_run(report.mlflow_run_id).data.tags["mlflow.parentRunId"] == tracking.open_sweep(sweep)
    assert tracking.read_picture(report).startswith(b"\x89PNG")
    assert "## Greedy decisions" in tracking.read_text(report.mlflow_run_id, "card.md")
    assert report.soup_sha256[:12] in tracking.read_text(report.mlflow_run_id, "report.html")
    logits = load_weights(fetch_file(report.mlflow_run_id, "gate_logits.safetensors", tmp_path))
    assert {name: len(tensor) for name, tensor in logits.items()} == dict.fromkeys(("labels", "best_single", "uniform", "greedy"), 30)
    folder = tmp_path / "model"
    from mlflow.artifacts import download_artifacts

    download_artifacts(artifact_uri=f"models:/{report.model_id}", dst_path=str(folder))
    (weights,) = folder.rglob("model.safetensors")
    assert file_digest(weights) == report.soup_sha256
    manifest, card = (json.loads((weights.parent / "recipe.json").read_bytes()), tracking.read_text(report.mlflow_run_id, "card.md"))
    assert manifest["ingredients"] == {one.trial_id: one.weights_sha256 for one in singles if one.trial_id in report.ingredients}
    assert (manifest["order"], manifest["dtype"]) == ([*report.ingredients], "float32")
    assert manifest["versions"].keys() >= {"stockpot", "python", "torch", "averaging"}
    digests = {"soup_sha256": report.soup_sha256, "snapshot_digest": sweep.data.snapshot.digest, "init_digest": sweep.init.digest,
               "transform_digest": singles[0].transform_digest}  # fmt: skip
    assert digests.items() <= manifest.items()
    assert all(f"`{told}" in card for told in digests.values())


def test_one_trial_ships_as_a_soup_of_one_and_the_card_says_so(ground: Ground, sweep: Sweep, tmp_path: Path) -> None:
    (only,) = finish_trials(ground, sweep, tmp_path, only=[2])
    report = cook(sweep.id, say=quiet)
    assert (report.ingredients, report.soup_sha256) == ((only.trial_id,), only.weights_sha256)
    assert "the best single model" in tracking.read_text(report.mlflow_run_id, "card.md")


def test_of_two_basins_the_best_single_models_is_cooked_where_the_request_draws_a_barrier(
    ground: Ground, ledger: str, tmp_path: Path
) -> None:
    """With the signs of its features and of its head turned a model says the same, and half way there it says nothing."""
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=2, soup=SoupSpec(recipe="uniform", barrier=0.05))
    finish_trials(ground, sweep, tmp_path, only=[0], noise=0.0)
    same = load_weights(tmp_path / "trial-0" / "model.safetensors")
    finish_trial(ground, sweep, 1, tmp_path, state=same | {name: -same[name] for name in ("body.proj", "head.weight")})
    report = cook(sweep.id, say=quiet)
    best, stranger = sorted(trial.id for trial in sweep.trials)  # both have the same score
    assert report.ingredients == (best,)
    told = r"another basin: half way to the best single model, .*, held_out falls to 3\d\.\d %, .* the request's `barrier` is 5\."
    assert re.search(told, report.excluded.pop(stranger))
    assert not report.excluded


@pytest.mark.slow
def test_where_nothing_improves_on_the_best_single_model_that_model_ships(ground: Ground, sweep: Sweep, tmp_path: Path) -> None:
    singles = finish_trials(ground, sweep, tmp_path, only=[0, 1, 2, 3], noise=30.0)  # strangers to each other
    good = min(singles, key=lambda one: (-one.held_out.correct, one.trial_id))
    report = cook(sweep.id, say=quiet)
    assert [step.kept for step in report.steps] == [True, False, False, False]
    assert (report.ingredients, report.soup_sha256, report.best_single) == ((good.trial_id,), good.weights_sha256, good.trial_id)
    assert report.scores["greedy"] == report.scores["best_single"]
    assert f"so the best single model, trial {good.trial_id}, ships" in tracking.read_text(report.mlflow_run_id, "card.md")
    assert reproduce(f"{report.model}/{register(report).version}").version.soup_sha256 == good.weights_sha256


def test_unfit_ingredients_are_left_out_with_their_reason(ground: Ground, sweep: Sweep, tmp_path: Path) -> None:
    good = finish_trials(ground, sweep, tmp_path, only=[0, 1])
    weights = load_weights(tmp_path / "trial-0" / "model.safetensors")
    finish_trial(ground, sweep, 2, tmp_path, state=weights | {"head.bias": torch.full((3,), float("nan"))})
    stranger = finish_trial(ground, sweep, 3, tmp_path)
    client().set_logged_model_tags(
        stranger.model_id, {"stockpot.ingredient": stranger.model_copy(update={"weights_sha256": "0" * 64}).model_dump_json()}
    )
    boasting = finish_trial(ground, sweep, 4, tmp_path)
    better = boasting.held_out.model_copy(update={"correct": boasting.held_out.seen})
    client().set_logged_model_tags(
        boasting.model_id, {"stockpot.ingredient": boasting.model_copy(update={"held_out": better}).model_dump_json()}
    )
    report = cook(sweep.id, say=quiet)
    assert {point.trial_id for point in report.trials} == {one.trial_id for one in good}
    reasons = [report.excluded[sweep.trials[index].id] for index in (2, 3, 4)]
    assert [
        word in reason for word, reason in zip(("`head.bias` holds a NaN", "sha256", "held-out logits give"), reasons, strict=True)
    ] == [True] * 3


def test_a_sweep_without_ingredients_is_refused_with_the_reason(sweep: Sweep) -> None:
    with pytest.raises(TooFewIngredients, match=r"Found 0 ingredients .* 1 are needed \(no trial has finished"):
        cook(sweep.id, say=quiet)


def test_an_unknown_sweep_is_refused(ledger: str) -> None:
    with pytest.raises(SweepMissing):
        cook("unknown", say=quiet)


def test_the_requested_recipe_ships(ground: Ground, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=3, soup=SoupSpec(recipe="uniform"))
    finish_trials(ground, sweep, tmp_path, noise=0.4, only=[0, 1])
    finish_trial(ground, sweep, 2, tmp_path, state=load_weights(tmp_path / "trial-0" / "model.safetensors"))
    report: SoupReport = cook(sweep.id, say=quiet)
    assert sorted(report.ingredients) == sorted(trial.id for trial in sweep.trials)
    assert report.duplicates == ((sweep.trials[0].id, sweep.trials[2].id),)
    logits = load_weights(fetch_file(report.mlflow_run_id, "gate_logits.safetensors", tmp_path))
    hits = {name: right(logits[name], logits["labels"]) for name in ("best_single", "uniform")}
    for label, told in enumerate(report.classes):
        of_class = logits["labels"] == label
        assert (told.seen, told.single, told.soup) == tuple(map(int, (of_class.sum(), *[(of_class & one).sum() for one in hits.values()])))
    assert any(told.single != told.soup for told in report.classes)


def test_what_the_request_asks_to_compare_is_shown_and_never_ships(ground: Ground, ledger: str, tmp_path: Path) -> None:
    everything = ("pruned", "learned", "learned_by_layer", "model_stock", "ensemble", "greedy_ensemble", "wise_ft", "angles", "midpoints")
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=3, soup=SoupSpec(compare=everything))
    finish_trials(ground, sweep, tmp_path)
    report = cook(sweep.id, say=quiet)
    assert set(report.scores) == {"best_single", "uniform", "greedy", *everything[:6]}
    assert set(report.scores) == set(report.calibration) == set(report.costs), "and each with its calibration and its cost"
    logits = load_weights(fetch_file(report.mlflow_run_id, "gate_logits.safetensors", tmp_path))
    for name in ("best_single", "uniform", "greedy"):
        found = report.calibration[name]
        told = [calibration_error(logits[name] / by, logits["labels"]) for by in (1, found.temperature)]
        assert [found.before, found.after] == told
    shown = list(csv.reader(tracking.read_text(report.mlflow_run_id, "comparison.csv").splitlines()))
    assert shown == [table.head(report), *table.rows(report)]
    assert all(all(row) for row in shown[1:]), "no cell is empty"
    assert report.scores["pruned"].held_out.correct >= report.scores["uniform"].held_out.correct
    assert set(report.alphas) == {"best_single", "uniform", "greedy"}
    for name, points in report.alphas.items():
        assert [point.alpha for point in points] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        assert points[-1].scores == report.scores[name]
        assert points[0].scores == report.alphas["greedy"][0].scores
    assert all(len(row) == 3 for row in report.angles.values())
    assert set(report.midpoints) == {trial.id for trial in sweep.trials} - {report.best_single}
    held_out = pixels(open_snapshot(sweep.data.snapshot), "held_out", ground.config.preprocess)
    rest_N = torch.tensor([point(key, "stockpot/mixing") >= 0.5 * 2**64 for key in held_out.keys])
    best = load_weights(tmp_path / f"trial-{[trial.id for trial in sweep.trials].index(report.best_single)}" / "held_out.safetensors")
    singles = {
        trial.id: load_weights(tmp_path / f"trial-{index}" / "held_out.safetensors")["logits"] for index, trial in enumerate(sweep.trials)
    }
    for name, some in (("ensemble", [*singles]), ("greedy_ensemble", greedy_ensemble(singles, torch.as_tensor(held_out.labels)))):
        assert report.scores[name].held_out == accuracy(torch.stack([singles[trial] for trial in some]).mean(0), held_out.labels)
    assert report.calibration["best_single"].temperature == pytest.approx(temperature(best["logits"], best["labels"]), rel=1e-3)
    assert report.unfitted["best_single"] == accuracy(best["logits"][rest_N], held_out.labels[rest_N.numpy()])
    assert set(report.unfitted) == {"best_single", "uniform", "greedy", "learned", "learned_by_layer"}
    assert {one.seen for one in report.unfitted.values()} == {int(rest_N.sum())} != {len(held_out.labels)}
    assert report.scores["learned"].held_out == report.unfitted["learned"]
    assert "Half way to" in tracking.read_text(report.mlflow_run_id, "card.md")
    assert report.ingredients == tuple(step.trial_id for step in report.steps if step.kept)


def test_a_learned_mixture_ships_with_its_shares_and_can_be_made_again(ground: Ground, ledger: str, tmp_path: Path) -> None:
    spec = SoupSpec(recipe="learned_by_layer", passes=2, replacement=True, visit_seed=1, mixing=MixingSpec(ingredients=2, batch_size=16))
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=3, soup=spec)
    finish_trials(ground, sweep, tmp_path)
    report = cook(sweep.id, say=quiet)
    assert {len(row) for row in report.shares.values()} == {2} == {len(report.ingredients)}
    assert report.held_out("learned_by_layer", "greedy") == (report.unfitted["learned_by_layer"], report.unfitted["greedy"])
    assert "on held_out (samples it was not fitted on)" in tracking.read_text(report.mlflow_run_id, "card.md")
    files = [
        open_weights(tracking.fetch_ingredient(one, tmp_path / one.trial_id) / "model.safetensors")
        for trial in report.ingredients
        for one in tracking.find_ingredients(sweep)
        if one.trial_id == trial
    ]
    assert save_weights(tmp_path / "again.safetensors", mixture(files, report.shares)) == report.soup_sha256


def test_an_ingredient_that_is_in_twice_makes_another_soup(ground: Ground, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=2)
    made = finish_trials(ground, sweep, tmp_path, noise=0.3)
    kitchen = Kitchen(sweep, gather(made, sweep.init, tmp_path / "pool"))
    one, two = (trial.id for trial in sweep.trials)
    once, twice = (kitchen.logits(kitchen.soup(trials), "held_out").clone() for trials in ([one, two], [one, two, two]))
    assert not torch.equal(once, twice)
    again = kitchen.logits(kitchen.soup([two, one]), "held_out")
    assert torch.equal(once, again), "the order of its ingredients is no part of a soup"


def test_learned_mixing_needs_samples_to_fit_on_and_samples_to_be_scored_on(ground: Ground, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=1)
    kitchen = Kitchen(sweep, gather(finish_trials(ground, sweep, tmp_path), sweep.init, tmp_path / "pool"))
    for share, told in ((1e-9, "takes 0 of"), (1 - 1e-9, "takes (.+) of \\1 held_out")):
        with pytest.raises(BadRequest, match=told):
            kitchen.learned(MixingSpec(share=share), by_layer=False)


def test_the_best_of_earlier_sweeps_join_and_the_record_says_where_they_are_from(ground: Ground, ledger: str, tmp_path: Path) -> None:
    model = f"souping-{uuid4().hex[:8]}"
    before = tiny_sweep(ground, model, trials=3, settings=TrialSettings(seed=7))
    old = finish_trials(ground, before, tmp_path / "old")
    client().set_logged_model_tags(  # what an ingredient says of itself elsewhere does not count: it is scored here
        old[0].model_id, {"stockpot.ingredient": old[0].model_copy(update={"held_out": Accuracy(correct=7, seen=7)}).model_dump_json()}
    )
    sweep = tiny_sweep(ground, model, trials=2, soup=SoupSpec(recipe="uniform", earlier=2, compare=("marginal",)))
    for new in finish_trials(ground, sweep, tmp_path / "new", noise=0.2):
        client().set_logged_model_tags(new.model_id, {"stockpot.ingredient": new.model_copy(update={"gpus": 2}).model_dump_json()})
    report = cook(sweep.id, say=quiet)
    assert len(report.origins) == 2
    assert set(report.origins.values()) == {before.id}
    assert old[0].trial_id in report.origins
    assert set(report.ingredients) == {trial.id for trial in sweep.trials} | set(report.origins)
    assert next(point.scores.held_out for point in report.trials if point.trial_id == old[0].trial_id) == old[0].held_out
    assert [point.trials for point in report.marginal] == [1, 2]
    assert [point.accelerator_hours for point in report.marginal] == [2 / 3600, 4 / 3600], "each trial took two GPUs a second"
    card = tracking.read_text(report.mlflow_run_id, "card.md")
    assert f"{old[0].trial_id} ({before.id})" in card
    assert f"torch {report.versions['torch']}" in card
    assert report.dtype == "float32"
    assert cook(sweep.id, say=quiet) == report


def test_a_score_is_found_again_for_the_same_weights_samples_preparation_and_metric_alone(
    ground: Ground, ledger: str, tmp_path: Path
) -> None:
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=2)
    pool, test = gather(finish_trials(ground, sweep, tmp_path), sweep.init, tmp_path / "pool"), sweep.data.test
    assert test
    one, two = pool.candidates
    dimmer = pool.config.model_copy(update={"preprocess": pool.config.preprocess.model_copy(update={"mean": (0.4, 0.4, 0.4)})})
    other_suite = sweep.data.model_copy(update={"shifts": {"noisy": test}})

    def passes(trials: list[str], split: str = "held_out", metric: Metric = "accuracy", **changed: object) -> int:
        """What a kitchen of its own looks at; `changed`: the sweep's data, or the pool's config."""
        request = sweep.request.model_copy(update={"soup": SoupSpec(metric=metric)})
        kitchen = Kitchen(
            sweep.model_copy(update={"request": request, "data": changed.get("data", sweep.data)}),
            replace(pool, config=changed.get("config", pool.config)),
        )
        dish, labels = kitchen.soup(trials), kitchen.splits[split].labels
        found, looked = kitchen.accuracy(dish, split), kitchen.stoves[0].samples
        assert found == accuracy(kitchen.logits(dish, split), labels, metric)
        return looked

    questions: list[tuple[tuple[object, ...], dict[str, object], int]] = [
        (([one, two],), {}, 60),
        (([two, one],), {}, 0),
        (([one],), {}, 60),
        (([one, two, two],), {}, 60),
        (([one, two], "gate"), {}, 30),
        (([one, two], "held_out", "macro_f1"), {}, 60),
        (([one, two],), {"config": dimmer}, 60),
        (([one, two], "shift/noisy"), {}, 30),
        (([one, two], "shift/noisy"), {"data": other_suite}, 30),
    ]
    for asked, changed, looked in questions:
        assert [passes(*asked, **changed) for _ in range(2)] == [looked, 0], asked  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_soup_that_was_interrupted_repeats_no_score(ground: Ground, ledger: str, tmp_path: Path) -> None:
    whole, cut = (
        tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", soup=SoupSpec(compare=("pruned",)), settings=TrialSettings(seed=seed))
        for seed in (1, 2)
    )
    for number, sweep in enumerate((whole, cut)):
        finish_trials(ground, sweep, tmp_path / str(number), noise=0.05 + number / 100)

    def stop(line: str) -> None:
        if line.startswith("greedy of"):
            raise ConnectionError("storage is gone")

    with pytest.raises(ConnectionError):
        cook(cut.id, say=stop)
    found = cook(cut.id, say=quiet)
    assert found.costs["greedy"].samples == 0 < cook(whole.id, say=quiet).costs["greedy"].samples
    assert set(found.calibration) == {"best_single", "uniform", "greedy", "pruned"}
    assert all(one.after >= 0 and one.temperature > 0 for one in found.calibration.values())
    assert "## Comparison" in tracking.read_text(found.mlflow_run_id, "card.md")


def test_two_devices_decide_as_one_and_no_image_is_decoded_twice(
    ground: Ground, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tiny_sweep(ground, f"souping-{uuid4().hex[:8]}", trials=4)
    best, *others = sorted(finish_trials(ground, sweep, tmp_path, only=[0, 1, 2]), key=lambda one: -one.held_out.correct)
    twin = finish_trial(ground, sweep, 3, tmp_path, state=load_weights(tmp_path / f"trial-{best.index}" / "model.safetensors"))
    pool = gather([best, *others, twin], sweep.init, tmp_path / "pool")
    singles = {trial: one.ingredient.held_out for trial, one in pool.candidates.items()}
    decoded: list[bytes] = []
    monkeypatch.setattr(images, "decode", lambda data: (decoded.append(data), decode(data))[1])
    found, used = [], []
    for devices in (["cpu"], ["cpu", "cpu"]):
        decoded.clear()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{len(devices)}"))
        kitchen = Kitchen(sweep, pool, devices)
        with kitchen.measured("greedy"):
            found.append(_greedy(sweep, singles, kitchen, quiet))
        cost = kitchen.costs["greedy"]
        used.append(cost.samples)
        assert all(stove.samples for stove in kitchen.stoves)
        assert cost.samples + cost.speculated == sum(stove.samples for stove in kitchen.stoves)
        kitchen.scores(kitchen.soup(list(singles)))
        assert len(decoded) == sum(len(split.labels) for split in kitchen.splits.values()) == 150
    assert found[0] == found[1]
    assert used[0] == used[1] == sum(step.examined for step in found[0][1:])

    def asked(**options: object) -> list[GreedyStep]:
        request = sweep.request.model_copy(update={"soup": SoupSpec.model_validate(options)})
        return _greedy(sweep.model_copy(update={"request": request}), singles, kitchen, quiet)

    assert [step.trial_id for step in asked(visit_seed=3)] == shuffled(singles, 3) != ranked(singles)
    assert [step.kept for step in found[0][:2]] == [True, False], "the same model again is no better"
    assert [step.kept for step in asked(accept="not_worse")[:2]] == [True, True], "and no worse"
    monkeypatch.setattr(kitchen, "by_averaged_logits", lambda _soup, left: sorted(left, reverse=True))
    first, *rest = ranked(singles)
    assert [step.trial_id for step in asked(order="averaged_logits", budget=2)] == [first, *sorted(rest, reverse=True)[:2]]
    assert len(asked(accept="not_worse", passes=2, replacement=True)) == 4 + 4

    trials, lines = list(singles), [on_line(kitchen, sweep.init, list(singles), alpha) for alpha in ALPHAS]
    other = sweep.init.model_copy(update={"digest": "another"})
    others = [
        stock(kitchen, other),
        on_line(kitchen, other, trials[:2], 0.2),
        *[kitchen.learned(MixingSpec(epochs=1), by_layer=by_layer) for by_layer in (False, True)],
        kitchen.soup(trials[:2]),
        kitchen.soup([*trials, trials[0]]),
        stock(kitchen, sweep.init),
        on_line(kitchen, sweep.init, trials[:2], 0.2),
    ]
    assert lines[-1].identity == kitchen.soup(trials).identity
    assert len({dish.identity for dish in [*lines, *others]}) == len(ALPHAS) + 8, "a score is kept under all that decides it"
