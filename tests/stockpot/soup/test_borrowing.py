"""Guards: a soup across datasets (Wortsman et al. 2022, appendix E). Bodies of another model's trials join under this model's frozen head,
are told, rebuilt to the bit and kept, and what may not be borrowed is left out, or refused, with its reason."""

import json
import re
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import torch
import yaml
from pydantic import ValidationError

from stockpot.checkpoints import load_weights
from stockpot.config import BaseSpec, DataSpec, GateSpec, InitSpec, PinnedData, RetrainRequest, SoupSpec, Sweep, SweepSpec
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot, shared_samples
from stockpot.data.splits import SplitSpec
from stockpot.errors import BadRequest, IngredientMismatch
from stockpot.evaluation import accuracy, logits
from stockpot.ledger import registry, tracking
from stockpot.models.classifier import ModelConfig, build
from stockpot.models.loading import load_state
from stockpot.outcomes import Borrowed
from stockpot.release import releasing
from stockpot.release.explaining import explain, reproduce
from stockpot.release.pruning import plan_removal
from stockpot.settings import TrialSettings
from stockpot.soup.borrowing import borrow_again, require_lenders, with_loans
from stockpot.soup.kitchen import Kitchen
from stockpot.soup.recipes.averaging import average
from stockpot.soup.soupability import gather
from stockpot.soup.souping import cook
from stockpot.sweeps import plan
from stockpot.training.inits import prepare
from stockpot.training.trials import run_trial
from tests.stockpot.training.test_inits import ARCH
from tests.tiny_sweep import CLIP, Ground, _store_init, finish_trial, finish_trials, on_ground, png, tiny_sweep

FROZEN = CLIP.model_copy(update={"frozen_head": True})
ANIMALS = ("lion", "bear")
BEASTS = FROZEN.model_copy(update={"classes": ANIMALS})
UNFIT = {
    "The heads of sweep .* were trained": {"frozen_head": False},
    "Its inputs are prepared another way": {"preprocess": FROZEN.preprocess.model_copy(update={"resize_mode": "squash"})},
    "It started from body": {"arch": FROZEN.arch | {"quick_gelu": True}},
}


def animals(folder: Path, first: int = 5000) -> PinnedData:
    """Pictures of two other classes; those of seeds below 150 are the colours' own."""
    samples = [Sample(f"a{number}", png(first + number, number % 2), number % 2) for number in range(60)]
    return PinnedData(
        snapshot=publish(f"{folder}/animals", "animals", ANIMALS, GivenSamples(samples), splits=SplitSpec(held_out=20, gate=10))
    )


def finished(data: PinnedData, config: ModelConfig, folder: Path) -> Sweep:
    """A finished sweep of another model, of one trial."""
    (folder / "init").mkdir(parents=True)
    ground = Ground(data=data, init=_store_init(data, config, folder / "init"), folder=str(folder), config=config)
    sweep = tiny_sweep(ground, f"lender-{uuid4().hex[:8]}", 1, settings=TrialSettings(seed=7))
    finish_trials(ground, sweep, folder)
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": 1})
    return sweep


def borrowing(own: Ground, lenders: dict[str, int], folder: Path) -> tuple[Sweep, Kitchen]:
    """A sweep of one trial that borrows, and its kitchen with the borrowed ones in it."""
    sweep = tiny_sweep(own, f"borrower-{uuid4().hex[:8]}", 1, SoupSpec(bodies_of=lenders))
    pool = gather(finish_trials(own, sweep, folder / "own"), sweep.init, folder / "pool")
    kitchen = Kitchen(sweep, pool)
    kitchen.pool = with_loans(pool, kitchen, sweep, folder / "loans")
    return sweep, kitchen


def doomed(model: str) -> set[str]:
    """Ingredients that `prune` would take."""
    return {one.about for one in plan_removal(model, keep_top=0, min_age_h=0).removable if one.kind == "ingredient"}


def test_a_body_joins_under_this_head_and_the_mean_is_that_of_such_models(ground: Ground, ledger: str, tmp_path: Path) -> None:
    own, theirs = on_ground(ground, FROZEN, tmp_path / "init"), finished(animals(tmp_path), BEASTS, tmp_path / "theirs")
    sweep, kitchen = borrowing(own, {theirs.request.model: 2}, tmp_path)
    joined, lent = kitchen.pool, [trial.id for trial in theirs.trials]
    assert joined.excluded == {}
    assert joined.origins == dict.fromkeys(lent, theirs.id)
    assert set(joined.candidates) == {sweep.trials[0].id, *lent}

    start = load_weights(joined.start.path)
    held_out = pixels(open_snapshot(own.data.snapshot), "held_out", FROZEN.preprocess)
    states = [load_weights(tmp_path / "own" / "trial-0" / "model.safetensors")]
    for index, trial in enumerate(lent):
        state = load_weights(tmp_path / "theirs" / f"trial-{index}" / "model.safetensors")
        states.append({name: start[name] if name.startswith("head.") else tensor for name, tensor in state.items()})
        model = build(FROZEN)
        load_state(model, states[-1])
        one = joined.candidates[trial].ingredient
        assert one.held_out == accuracy(logits(model, held_out.images, FROZEN.preprocess), held_out.labels)
        assert joined.borrowed[trial] == Borrowed(model=theirs.request.model, weights_sha256=one.weights_sha256)
        assert kitchen.check_reload(trial) is None
    for name, tensor in average([one.weights for one in joined.candidates.values()]).items():
        oracle = torch.stack([state[name].double() for state in states]).mean(dim=0)
        assert torch.allclose(tensor.double(), oracle, rtol=1e-6, atol=1e-7)
    joined.close()


@pytest.mark.slow
def test_a_body_that_may_not_be_borrowed_is_left_out_with_its_reason(ground: Ground, ledger: str, tmp_path: Path) -> None:
    own, data = on_ground(ground, FROZEN, tmp_path / "init"), animals(tmp_path)
    lenders = {
        reason: finished(data, BEASTS.model_copy(update=change), tmp_path / str(place))
        for place, (reason, change) in enumerate(UNFIT.items())
    }
    for reason, lender in lenders.items():
        with pytest.raises(BadRequest, match=f"names {lender.request.model}, and none of its ingredients fits. {reason}"):
            require_lenders(SoupSpec(bodies_of={lender.request.model: 1}), own.init)
    lenders["trained or ranked on"] = finished(animals(tmp_path / "same", 0), BEASTS, tmp_path / "seen")
    _, kitchen = borrowing(own, {lender.request.model: 1 for lender in lenders.values()}, tmp_path)
    for reason, lender in lenders.items():
        assert re.search(f"^Of model {lender.request.model}: .*{reason}", kitchen.pool.excluded[lender.trials[0].id])
    assert (kitchen.pool.borrowed, len(kitchen.pool.excluded)) == ({}, 4)
    kitchen.pool.close()


def test_a_frozen_head_that_moved_is_left_out(ground: Ground, ledger: str, tmp_path: Path) -> None:
    own = on_ground(ground, FROZEN, tmp_path / "init")
    sweep = tiny_sweep(own, f"moved-{uuid4().hex[:8]}", 1)
    torch.manual_seed(1)
    moved = finish_trial(own, sweep, 0, tmp_path, state=build(FROZEN).state_dict())
    pool = gather([moved], sweep.init, tmp_path / "pool", minimum=0)
    assert pool.excluded == {moved.trial_id: "Its `head.weight` is not the init's, whose head is frozen; run its trial again."}
    pool.close()


def test_what_cannot_be_borrowed_is_refused_in_the_request_or_before_a_gpu(ground: Ground, ledger: str, tmp_path: Path) -> None:
    def request(**parts: object) -> RetrainRequest:
        given = {"model": "mine", "store": "/store", "data": DataSpec(snapshot="/data"), "base": BaseSpec(arch="ViT-B-32"), **parts}
        return RetrainRequest.model_validate(given)

    frozen = InitSpec(head="zero_shot", freeze_head=True)
    assert request(init=frozen, soup=SoupSpec(bodies_of={"theirs": 4})).soup.bodies_of == {"theirs": 4}
    with pytest.raises(ValidationError, match=r"write `init\.freeze_head: true`"):
        request(soup=SoupSpec(bodies_of={"theirs": 4}))
    with pytest.raises(ValidationError, match="names mine itself"):
        request(init=frozen, soup=SoupSpec(bodies_of={"mine": 4}))
    own = on_ground(ground, FROZEN, tmp_path / "init")
    sweep = tiny_sweep(own, f"lender-{uuid4().hex[:8]}", 1)
    name = sweep.request.model
    finish_trials(own, sweep, tmp_path)
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": 1})
    require_lenders(SoupSpec(bodies_of={name: 1}), own.init)
    with pytest.raises(BadRequest, match=f"names {name}x, and the ledger has no finished trial of it; did you mean .*`{name}`"):
        require_lenders(SoupSpec(bodies_of={f"{name}x": 1}), own.init)


def test_a_sweep_that_borrows_nothing_keeps_its_id() -> None:
    assert "bodies_of" not in SoupSpec().model_dump(mode="json")
    spec = SoupSpec(bodies_of={"theirs": 4})
    assert SoupSpec.model_validate_json(spec.model_dump_json()) == spec


def test_shared_samples_are_found_by_what_they_show(ground: Ground, node: Path, tmp_path: Path) -> None:
    ours, apart, same = (open_snapshot(data.snapshot) for data in (ground.data, animals(tmp_path), animals(tmp_path / "same", 0)))
    assert shared_samples(ours, ("held_out", "gate"), apart, ("train", "held_out")) == 0
    mine = set(ours.index.column("digest", 60, 150).to_pylist())
    theirs = set(same.index.column("digest", 0, 50).to_pylist())
    assert shared_samples(ours, ("held_out", "gate"), same, ("train", "held_out", "test")) == len(mine & theirs) > 0


def across(folder: Path, spec: SweepSpec, model: str, data: PinnedData, soup: SoupSpec) -> Sweep:
    """A finished sweep with real trials: a zero-shot head from the dataset's own class names, frozen, over one CLIP body."""
    (folder / "config.json").write_text(json.dumps(ARCH))
    base, head = BaseSpec(arch=str(folder / "config.json")), InitSpec(head="zero_shot", freeze_head=True)
    init = prepare(base, head, data.snapshot, f"{folder}/store")
    require_lenders(soup, init)
    request = RetrainRequest(
        model=model, store=f"{folder}/store", data=DataSpec(snapshot=data.snapshot.uri), base=base, init=head, soup=soup, sweep=spec
    )
    sweep = plan(request, data, init)
    tracking.open_sweep(sweep)
    for trial in sweep.trials:
        run_trial(trial, say=lambda _line: None)
    tracking.close_sweep(sweep.id, "FINISHED", {"finished": len(sweep.trials)})
    return sweep


@pytest.mark.slow
def test_a_dataset_that_nobody_trained_on_gets_the_bodies_of_others(ground: Ground, ledger: str, tmp_path: Path) -> None:
    """The ready-made request `across_datasets`, whose sweep is its zero-shot init."""
    asked = yaml.safe_load((Path(__file__).parents[3] / "deployments" / "requests" / "across_datasets.yaml").read_text())
    settings = TrialSettings(batch_size=20, epochs=2, learning_rate=1e-3, warmup_steps=0)
    lender = f"lender-{uuid4().hex[:8]}"
    theirs = across(tmp_path, SweepSpec(trials=2, settings=settings), lender, animals(tmp_path), SoupSpec())
    mine = across(
        tmp_path, SweepSpec.model_validate(asked["sweep"]), f"untrained-{uuid4().hex[:8]}", ground.data, SoupSpec(bodies_of={lender: 4})
    )
    report = cook(mine.id, say=lambda _line: None)
    (init,) = mine.trials
    assert {step.trial_id for step in report.steps} == {init.id, *(trial.id for trial in theirs.trials)}
    assert report.scores["greedy"].held_out.correct >= tracking.find_ingredients(mine)[0].held_out.correct
    version = releasing.register(report)
    assert reproduce(f"{version.model}/{version.version}").version.soup_sha256 == report.soup_sha256


@pytest.mark.slow
def test_two_datasets_are_trained_apart_and_souped_told_rebuilt_and_kept(ground: Ground, ledger: str, tmp_path: Path) -> None:
    """The whole path with real trials: a zero-shot head from each dataset's own class names, frozen, over one CLIP body."""
    settings = TrialSettings(batch_size=20, epochs=2, learning_rate=1e-3, warmup_steps=0, ema_decays=(0.9,))
    trained = partial(across, tmp_path, SweepSpec(trials=2, settings=settings))
    names = [f"across-{uuid4().hex[:8]}" for _ in range(2)]
    theirs = trained(names[0], animals(tmp_path), SoupSpec())
    releasing.register(cook(theirs.id, say=lambda _line: None))
    lent = {name for trial in theirs.trials for name in trial.ingredient_ids}
    assert lent == doomed(names[0]), "nothing needs them"
    mine = trained(names[1], ground.data, SoupSpec(recipe="uniform", bodies_of={names[0]: 4}))
    assert theirs.init.body == mine.init.body != ""
    assert doomed(names[0]) == set(), "mine may borrow them"
    report = cook(mine.id, say=lambda _line: None)
    assert {name: one.model for name, one in report.borrowed.items()} == dict.fromkeys(lent, names[0])
    assert set(report.ingredients) == {name for trial in mine.trials for name in trial.ingredient_ids} | lent
    assert f"({names[0]}, sweep {theirs.id})" in tracking.read_text(report.mlflow_run_id, "card.md")
    version = releasing.register(report)
    releasing.gate(report, version, GateSpec(gate_tolerance=1.0, shift_tolerance=1.0))
    assert f"of sweep {theirs.id} of {names[0]}" in explain(names[1])
    assert reproduce(names[1]).version.soup_sha256 == report.soup_sha256
    assert doomed(names[0]) == set(), "mine is made of them"
    assert plan_removal(names[0], keep_top=0, min_age_h=0).forgets == ()
    registry.set_alias(names[1], "champion", None)
    assert doomed(names[0]) == lent, "and as a version without an alias it serves without them"
    assert plan_removal(names[0], keep_top=0, min_age_h=0).forgets == tuple(f"{name}/1" for name in sorted(names))

    name = min(lent)
    ingredient = tracking.find_ingredient(names[0], name)
    assert ingredient
    other = report.model_copy(update={"borrowed": {name: Borrowed(model=names[0], weights_sha256="0" * 64)}})
    with pytest.raises(IngredientMismatch, match="under the init's head, recorded was 000000000000"):
        borrow_again(ingredient, other, tmp_path / "again")
