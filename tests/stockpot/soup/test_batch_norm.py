"""Guards: BatchNorm statistics are averaged unless a request asks for them to be estimated again; then soups and single models get those of
the training samples, everything says so, and the version can be rebuilt."""

from pathlib import Path
from uuid import uuid4

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from stockpot.config import BaseSpec, DataSpec, GateSpec, Init, PinnedData, RetrainRequest, SoupSpec
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.data.splits import SplitSpec
from stockpot.errors import RegistryError, SkipBudgetExceeded
from stockpot.evaluation import normalise
from stockpot.ledger import registry, tracking
from stockpot.models.folders import read_model
from stockpot.outcomes import SoupReport
from stockpot.release import releasing
from stockpot.release.explaining import reproduce
from stockpot.soup import settling
from stockpot.soup.recipes.batch_norm import norms, reestimate, statistics
from stockpot.soup.settling import settling_samples
from stockpot.soup.souping import cook
from stockpot.sweeps import plan
from tests.tiny_sweep import CLASSES, NORM, PREPROCESS, Ground, finish_trials, norm_tower, on_ground, png, tiny_sweep


def batches(count: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 16, 16, generator=rng) * 2 + 1 for _ in range(count)]


def test_statistics_are_the_mean_over_batches_in_float64_and_dropout_takes_no_part() -> None:
    torch.manual_seed(0)
    tower = norm_tower().train()
    images = batches(3)
    reestimate(tower, images)
    first = [tower[0](one).double() for one in images]
    mean = torch.stack([one.mean((0, 2, 3)) for one in first]).mean(0)
    variance = torch.stack([one.transpose(0, 1).flatten(1).var(1) for one in first]).mean(0)
    torch.testing.assert_close(tower[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tower[1].running_var.double(), variance, rtol=1e-5, atol=1e-6)
    assert not tower.training
    again = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    reestimate(tower, images)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tower.state_dict().items())


def test_without_dropout_it_is_what_torch_does() -> None:
    torch.manual_seed(0)
    ours = norm_tower()
    ours[3] = nn.Identity()
    theirs = nn.Sequential(*ours)
    reestimate(ours, batches(4))
    found = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    update_bn(batches(4), theirs)
    assert all(torch.equal(tensor, found[name]) for name, tensor in theirs.state_dict().items())
    assert ours[1].momentum == nn.BatchNorm2d(8).momentum


def test_the_statistics_have_names_and_other_models_have_none() -> None:
    assert set(norms(norm_tower())) == {"1", "6"}
    assert statistics(norm_tower()) == {f"{at}.{part}" for at in (1, 6) for part in ("running_mean", "running_var", "num_batches_tracked")}
    assert statistics(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))) == set()


def test_a_sample_the_request_lets_be_unreadable_is_left_out(node: Path, tmp_path: Path) -> None:
    given = [*(Sample(f"s{number}", png(number, number % 3), number % 3) for number in range(63)), Sample("bad", b"<html>", 0)]
    rule = SplitSpec(held_out=0, gate=0)
    data = PinnedData(snapshot=publish(str(tmp_path), "some", CLASSES, GivenSamples(given), splits=rule, skip_fraction=0.1))
    init = Init(uri=f"{tmp_path}/init", digest="b" * 64)

    def settled(**reading: object) -> int:
        asked = DataSpec(snapshot=data.snapshot.uri, **reading)
        base, soup = BaseSpec(arch="own"), SoupSpec(batch_norm_samples=64)
        request = RetrainRequest(model="some", store=str(tmp_path), data=asked, base=base, soup=soup)
        return sum(map(len, settling_samples(plan(request, data, init), PREPROCESS)))

    with pytest.raises(SkipBudgetExceeded, match="sample 'bad' is not a readable image"):
        settled(reading="streamed")
    assert settled(skip_fraction=0.1, reading="streamed") == 63
    assert not [path for path in node.rglob("*.tar") if path.is_file()]
    assert settled(skip_fraction=0.1, reading="cached") == 63
    assert [path for path in node.rglob("*.tar") if path.is_file()]


@pytest.fixture
def cooked(ground: Ground, ledger: str, tmp_path: Path) -> dict[bool, SoupReport]:
    """The uniform soup of two trials with BatchNorm, averaged and estimated."""
    under, model = on_ground(ground, NORM, tmp_path / "init"), f"norm-{uuid4().hex[:8]}"
    reports = {}
    for estimated in (False, True):
        spec = SoupSpec(recipe="uniform", batch_norm_samples=64 if estimated else None, compare=("wise_ft",))
        sweep = tiny_sweep(under, model, 2, spec)
        if not estimated:
            finish_trials(under, sweep, tmp_path)
        reports[estimated] = cook(sweep.id, say=[].append)
    return reports


@pytest.mark.slow
def test_soups_and_singles_get_the_statistics_of_training_samples(
    cooked: dict[bool, SoupReport], ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged, estimated = cooked[False], cooked[True]
    assert (averaged.batch_norm_samples, estimated.batch_norm_samples) == (None, 60), "all of train, which is less than 64"
    assert averaged.soup_sha256 != estimated.soup_sha256
    assert "statistics estimated on 60 training samples" in tracking.read_text(estimated.mlflow_run_id, "card.md")
    assert "BatchNorm" not in tracking.read_text(averaged.mlflow_run_id, "card.md")

    version = releasing.register(estimated)
    model = read_model(registry.fetch_version(version, tmp_path / "version"))
    train = pixels(open_snapshot(ground.data.snapshot), "train", PREPROCESS)
    images = normalise(torch.from_numpy(train.images.copy()), PREPROCESS)
    before_norm = model.body[0](images).detach()
    torch.testing.assert_close(model.body[1].running_mean, before_norm.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)

    for point in estimated.trials:
        (alone,) = [one for one in averaged.trials if one.trial_id == point.trial_id]
        assert point.scores != alone.scores, "a single model is judged with statistics estimated as the soup's are"
    assert {point.scores.held_out for point in estimated.trials} >= {estimated.scores["best_single"].held_out}

    releasing.gate(estimated, version, GateSpec())
    assert reproduce(estimated.model).version.version == version.version
    monkeypatch.setattr(settling, "BATCH", 7)
    with pytest.raises(RegistryError, match=r"another `body\.1\."):
        reproduce(estimated.model)


@pytest.mark.slow
def test_a_model_without_batch_norm_is_left_alone(ground: Ground, ledger: str, tmp_path: Path) -> None:
    sweep = tiny_sweep(ground, f"norm-{uuid4().hex[:8]}", 2, SoupSpec(batch_norm_samples=64))
    (sample, *_) = settling_samples(sweep, PREPROCESS)
    assert (len(sample), sample.dtype) == (60, torch.uint8)
    finish_trials(ground, sweep, tmp_path)
    assert cook(sweep.id, say=[].append).batch_norm_samples is None
