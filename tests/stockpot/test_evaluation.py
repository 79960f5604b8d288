"""Promise: every sample counts once, counts are exact, and the model is left as it was found."""

import numpy as np
import pytest
import torch
from torch import nn

from stockpot.config import Preprocess
from stockpot.evaluation import accuracy, logits, normalise

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
