"""Promise: the linear probe sees every sample of train once per node and base, whatever head is asked for; it is an optimum and not a run,
and takes memory by the piece."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from stockpot.config import BaseSpec, InitSpec
from stockpot.data.node_cache import locked
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.data.splits import SplitSpec
from stockpot.errors import ModelError, SkipBudgetExceeded
from stockpot.evaluation import features
from stockpot.training import inits, probing
from stockpot.training.probing import IGNORED, PROBE_SD, linear_probe, probed
from tests.stockpot.training.test_inits import ARCH
from tests.tiny_sweep import CLASSES, png


@pytest.fixture
def base(tmp_path) -> BaseSpec:
    (tmp_path / "config.json").write_text(json.dumps(ARCH))
    return BaseSpec(arch=str(tmp_path / "config.json"))


def head_of(base, snapshot, store, spec=None, **how):
    lines = []
    weights = inits.fetch(inits.prepare(base, spec or InitSpec(), snapshot, str(store), partial(probed, say=lines.append, **how)))[1]
    return torch.cat([weights["head.weight"], weights["head.bias"][:, None]], dim=1), lines


def test_another_head_over_the_same_base_costs_no_forward_pass(base, ground, node, tmp_path, monkeypatch):
    _, lines = head_of(base, ground.data.snapshot, tmp_path / "one")
    assert lines[0] == "features of train: 0 of 60 samples are on this node, the others are computed on cpu"
    assert lines[-1].startswith("linear probe: converged after ")
    monkeypatch.setattr(probing, "_forward", None)
    for spec in (InitSpec(templates=("a {} thing.",)), InitSpec(freeze_head=True)):
        _, lines = head_of(base, ground.data.snapshot, tmp_path / "one", spec)
        assert [line.split(":")[0] for line in lines] == ["linear probe"]
    with pytest.raises(TypeError):  # another body, so its features are others
        head_of(base, ground.data.snapshot, tmp_path / "one", InitSpec(seed=1))
    own = probing.features
    monkeypatch.setattr(probing, "features", lambda *given, **more: own(*given, **more) * (1 + 1e-6 * ("device" in more)))
    head_of(base, ground.data.snapshot, tmp_path / "one", InitSpec(templates=("one {}.",)))  # on a device that rounds otherwise
    monkeypatch.setattr(probing, "features", lambda *given, **more: own(*given, **more) * (1 + 1e-6))
    with pytest.raises(TypeError):  # the same body under a library that computes otherwise
        head_of(base, ground.data.snapshot, tmp_path / "one", InitSpec(templates=("an {}.",)))


def test_a_gpu_is_held_for_features_and_for_the_fit_but_not_while_another_process_computes(base, ground, node, tmp_path, monkeypatch):
    claims, held = [], []

    @contextmanager
    def claimed():
        claims.append(len(held))
        held.append("gpu")
        yield ("0",)
        held.pop()

    monkeypatch.setattr(probing, "claimed_gpus", claimed)
    head_of(base, ground.data.snapshot, tmp_path / "one")
    assert (claims, held) == ([0, 0], [])
    (lock,) = node.glob("features/*.lock")
    spec = InitSpec(templates=("a {} thing.",))
    with ThreadPoolExecutor(1) as other:
        with locked(lock):
            waiting = other.submit(head_of, base, ground.data.snapshot, tmp_path / "one", spec)
            assert wait([waiting], timeout=1).not_done
            assert claims == [0, 0]
        waiting.result()
    assert claims == [0, 0, 0]


def test_the_probe_is_the_same_to_the_bit_on_another_node(base, ground, monkeypatch, tmp_path):
    heads = []
    for node, reading in (("one", "auto"), ("two", "auto"), ("three", "streamed")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / node))
        heads.append(head_of(base, ground.data.snapshot, tmp_path / node, reading=reading)[0])
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


@pytest.mark.slow
def test_loader_workers_change_no_bit(base, ground, monkeypatch, tmp_path):
    heads = []
    for workers in (0, 2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(workers)))
        heads.append(head_of(base, ground.data.snapshot, tmp_path / str(workers), loader_workers=workers)[0])
    assert torch.equal(*heads)


def test_stored_features_are_those_of_the_evaluation(base, ground, node, tmp_path):
    init = inits.prepare(base, InitSpec(), ground.data.snapshot, f"{tmp_path}/store")
    model = inits.load(init)
    split = pixels(open_snapshot(ground.data.snapshot), "train", model.config.preprocess)
    (file,) = node.glob("features/*/rows.npy")
    assert np.allclose(np.load(file), features(model, split.images, model.config.preprocess), atol=1e-6)


@pytest.mark.slow
def test_unreadable_samples_are_left_out_as_a_trial_leaves_them_out(base, node, tmp_path):
    def published(name, *more):
        given = [*(Sample(f"s{number:03d}", png(number, number % 3), number % 3) for number in range(40)), *more]
        return publish(f"{tmp_path}/{name}", name, CLASSES, GivenSamples(given), splits=SplitSpec(held_out=0, gate=0), skip_fraction=0.1)

    whole, damaged = published("whole"), published("damaged", Sample("s0005", b"<html>", 1))
    with pytest.raises(SkipBudgetExceeded, match="sample 's0005' is not a readable image"):
        head_of(base, damaged, tmp_path / "store")
    found, _ = head_of(base, damaged, tmp_path / "store", skip_fraction=0.1)
    assert torch.allclose(found, head_of(base, whole, tmp_path / "store")[0], atol=1e-3)
    with pytest.raises(SkipBudgetExceeded, match="1 of 41 train samples are unreadable, `skip_fraction` allows 0 of all"):
        head_of(base, damaged, tmp_path / "elsewhere")  # the features are here by now


@pytest.mark.slow
def test_a_whole_batch_of_unreadable_samples_is_left_out_where_that_many_may_be(base, node, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "BATCH", 8)
    rotten = [Sample(f"s{number:04d}x", b"<html>" + bytes([number]), 1) for number in range(20)]
    given = [*(Sample(f"s{number + 30:04d}", png(number, number % 3), number % 3) for number in range(40)), *rotten]
    snapshot = publish(f"{tmp_path}/rot", "rot", CLASSES, GivenSamples(given), splits=SplitSpec(held_out=0, gate=0), skip_fraction=0.5)
    assert torch.isfinite(head_of(base, snapshot, tmp_path / "store", skip_fraction=0.4)[0]).all()
    (journal,) = node.glob("features/*/journal")
    assert len(json.loads(journal.read_text())[1]) == 20


@pytest.mark.parametrize(("unreadable", "allowed", "said"), [(3, 0.2, "3 of 10 train samples"), (10, 1.0, "None of the 10 train")])
def test_too_few_readable_samples_are_refused(unreadable, allowed, said):
    with pytest.raises(SkipBudgetExceeded, match=said):
        probing._require_readable(unreadable, 10, allowed)


def scattered(samples: int, width: int, classes: int):
    torch.manual_seed(0)
    rows = functional.normalize(torch.randn(samples, width), dim=1).numpy()
    return rows, np.arange(samples) % classes, torch.randn(classes, width), torch.zeros(classes)


def test_the_probe_is_an_optimum_wherever_it_starts_in_memory():
    rows, labels, start, bias = scattered(90, 6, 3)
    weight, offset = linear_probe(rows, labels, start, bias)
    pieces = linear_probe(rows, labels, start, bias, rows=7)
    assert torch.allclose(weight, pieces[0], atol=1e-3)
    head = torch.cat([weight, offset[:, None]], 1).double().requires_grad_()
    loss = functional.cross_entropy(functional.linear(torch.from_numpy(rows).double(), head[:, :-1], head[:, -1]), torch.from_numpy(labels))
    loss = loss + (head - torch.cat([start, bias[:, None]], 1)).square().sum() / (2 * PROBE_SD**2 * 90)
    loss.backward()
    assert head.grad.abs().max() < 1e-6


def test_the_order_of_samples_decides_nothing_and_their_number_does():
    rows, labels, start, bias = scattered(90, 6, 3)
    weight, offset = linear_probe(rows, labels, start, bias)
    order = np.random.default_rng(1).permutation(90)
    again = linear_probe(rows[order], labels[order], start, bias)
    assert torch.allclose(weight, again[0], atol=1e-3)
    assert torch.allclose(offset, again[1], atol=1e-3)
    padded, ignored = np.concatenate([rows, 9 * rows[:5]]), np.concatenate([labels, [IGNORED] * 5])
    assert torch.allclose(weight, linear_probe(padded, ignored, start, bias)[0], atol=1e-3)
    assert not torch.allclose(weight, linear_probe(rows[:45], labels[:45], start, bias)[0], atol=1e-1)


def test_the_unit_of_the_features_is_only_the_priors():
    rows, labels, _, bias = scattered(90, 6, 3)
    start = torch.zeros(3, 6)
    weight, offset = linear_probe(rows, labels, start, bias)
    scaled = linear_probe(50 * rows, labels, start, bias, unit=50.0)
    assert torch.allclose(weight, 50 * scaled[0], atol=1e-3)
    assert torch.allclose(offset, scaled[1], atol=1e-3)


def test_the_probe_is_the_logistic_regression_of_scikit_learn():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 200)
    rows = functional.normalize(torch.from_numpy(rng.normal(size=(200, 12)) + 0.8 * np.eye(4, 12)[labels]), dim=1).float().numpy()
    weight, bias = linear_probe(rows, labels, torch.zeros(4, 12), torch.zeros(4))
    oracle = LogisticRegression(C=PROBE_SD**2, fit_intercept=False, tol=1e-10, max_iter=20_000)
    oracle.fit(np.c_[rows, np.ones(200)], labels)  # our prior holds the offset too: a feature that is always one
    assert np.allclose(torch.cat([weight, bias[:, None]], 1), oracle.coef_, atol=2e-3)


def test_a_probe_on_unfit_features_is_refused():
    rows = (torch.randn(30, 4) * torch.tensor([1e-6, 1, 1, 1e9])).numpy()
    with pytest.raises(ModelError, match="linear probe's slope is"):
        linear_probe(rows, np.arange(30) % 3, torch.zeros(3, 4), torch.zeros(3))


def test_features_that_are_no_numbers_are_refused(base, ground, node, tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "features", lambda model, inputs, *_args, **_more: torch.full((len(inputs), 16), torch.nan))
    with pytest.raises(ModelError, match="features of train are no numbers"):
        head_of(base, ground.data.snapshot, tmp_path / "store")


@pytest.mark.slow
def test_a_probe_takes_memory_by_the_piece_not_by_the_sample(tmp_path):
    """0.46 GB of features, of which a quarter's worth of float64 (`ROOM`) is looked at together."""
    samples, width = 150_000, 768
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (samples, width))
    for at in range(0, samples, 10_000):
        part = np.random.default_rng(at).normal(size=(10_000, width))
        rows[at : at + 10_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    rows.flush()
    mapped, labels = np.load(tmp_path / "rows.npy", mmap_mode="r"), np.arange(samples) % 2
    linear_probe(mapped[:100], labels[:100], torch.zeros(2, width), torch.zeros(2))  # whatever torch needs once
    peak, over = [], threading.Event()

    def watch():
        while not over.wait(0.01):
            status = Path(f"/proc/{os.getpid()}/status").read_text()
            peak.append(int(status.split("RssAnon:")[1].split()[0]) * 1024)

    before = int(Path(f"/proc/{os.getpid()}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
    watcher = threading.Thread(target=watch)
    watcher.start()
    time.sleep(0.1)
    linear_probe(mapped, labels, torch.zeros(2, width), torch.zeros(2))
    over.set()
    watcher.join()
    assert max(peak) - before < 1.5 * probing.ROOM < samples * width * 4
