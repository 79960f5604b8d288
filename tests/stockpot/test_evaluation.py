"""Promise: every sample counts once, on any number of ranks; counts are exact, and the model is left as it was found."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stockpot.evaluation import Ranks, accuracy, logits, normalise, share
from stockpot.preparation import Preprocess
from tests.waiting import PATIENCE_S

PREPROCESS = Preprocess(size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))


class Flat(nn.Module):
    """Linear on pixels, with a dropout that evaluation must switch off."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(0.5), nn.Linear(48, 3)

    def forward(self, images):
        return self.linear(self.dropout(images.flatten(1)))


def test_normalising_is_the_formula():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PREPROCESS.mean, PREPROCESS.std))
    assert torch.allclose(normalise(images, PREPROCESS), (images / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_every_image_once_in_order_whatever_the_batch(batch_size):
    torch.manual_seed(0)
    model, images = Flat(), np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4), np.uint8)
    model.train()
    found = logits(model, images, PREPROCESS, batch_size=batch_size)
    expected = model.linear(normalise(torch.from_numpy(images), PREPROCESS).flatten(1))
    assert found.shape == (7, 3)
    assert torch.allclose(found, expected, atol=1e-5)
    assert model.training


def test_accuracy_counts():
    score = accuracy(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), np.array([1, 1, 0]))
    assert (score.correct, score.seen) == (2, 3)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="2 rows of logits for 3 labels"):
        accuracy(torch.zeros(2, 2), np.zeros(3))


@given(samples=st.integers(1, 2000), world=st.integers(1, 70), batch_size=st.integers(1, 300))
def test_the_ranks_share_every_sample_once_in_whole_batches(samples, world, batch_size):
    shares = [share(samples, rank, world, batch_size) for rank in range(world)]
    assert [sample for one in shares for sample in one] == list(range(samples))
    assert all(one.start % batch_size == 0 for one in shares if one)
    batches = [-(-len(one) // batch_size) for one in shares]
    assert max(batches) - min(batches) <= 1
    assert shares[0]


class Threads:
    """Ranks as threads of this process, and their sum."""

    def __init__(self, world: int) -> None:
        self.world, self.given, self.barrier = world, {}, Barrier(world, timeout=PATIENCE_S)

    def all_reduce(self, rank: int):
        def run(tensor: Tensor) -> None:
            self.given[rank] = tensor.clone()
            self.barrier.wait()
            tensor.copy_(sum(self.given[other] for other in range(self.world)))
            self.barrier.wait()

        return run

    def run(self, function) -> list[Tensor]:
        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(lambda rank: function(Ranks(rank, self.world, self.all_reduce(rank))), range(self.world)))


@settings(max_examples=25)
@given(samples=st.integers(1, 40), world=st.integers(1, 6), batch_size=st.integers(1, 9))
def test_several_ranks_get_the_logits_of_one_to_the_last_bit(samples, world, batch_size):
    torch.manual_seed(samples)
    model, images = Flat().eval(), np.random.default_rng(samples).integers(0, 256, (samples, 3, 4, 4), np.uint8)
    alone = logits(model, images, PREPROCESS, batch_size=batch_size)
    for found in Threads(world).run(lambda ranks: logits(model, images, PREPROCESS, batch_size=batch_size, ranks=ranks)):
        assert torch.equal(found, alone)


@pytest.mark.parametrize("said", [{0: (0, 1), 1: (1, 2)}, {0: (0, 3), 1: (1, 3)}], ids=["twice", "never"])
def test_a_sample_evaluated_twice_or_never_is_an_error_and_no_accuracy(said):
    images = np.zeros((9, 3, 4, 4), np.uint8)

    def evaluate(given: Ranks) -> Tensor:
        rank, world = said[given.rank]
        return logits(Flat(), images, PREPROCESS, batch_size=2, ranks=Ranks(rank, world, given.all_reduce))

    with pytest.raises(ValueError, match="of 9 samples were not evaluated exactly once"):
        Threads(2).run(evaluate)


def _evaluate(rank: int, world: int, meeting: Path, found: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4), np.uint8)
    ranks = Ranks(rank, world, torch.distributed.all_reduce)
    torch.save(logits(Flat(), images, PREPROCESS, batch_size=2, ranks=ranks), found / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_of_torch_distributed_are_such_ranks(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_evaluate, args=(rank, 3, tmp_path / "meeting", tmp_path)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 4), np.uint8)
    alone = logits(Flat(), images, PREPROCESS, batch_size=2)
    for rank in range(3):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone)
