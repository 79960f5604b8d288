"""Promise: a body is known by its weights and what they compute, not by its head."""

import torch

from stockpot.models.bodies import body_digest
from stockpot.models.classifier import build
from tests.tiny_sweep import CLIP


def test_a_head_does_not_decide_the_body_and_every_weight_of_it_does():
    torch.manual_seed(0)
    model, other = build(CLIP), build(CLIP.model_copy(update={"classes": ("ant", "bee")}))
    other.body.load_state_dict(model.body.state_dict())
    assert body_digest(other) == body_digest(model)
    for tensor in other.body.state_dict().values():
        kept = tensor.clone()
        tensor.view(-1)[0] += 1
        assert body_digest(other) != body_digest(model)
        tensor.copy_(kept)
    assert body_digest(other) == body_digest(model)


def test_the_same_weights_that_compute_something_else_are_another_body():
    model = build(CLIP)
    known = body_digest(model)
    model.config = CLIP.model_copy(update={"arch": {**CLIP.arch, "quick_gelu": True}})
    assert body_digest(model) != known
