"""Promise: one optimiser step does what its settings say: gradients are clipped to their norm, the model computes in its precision and is
kept in float32, and a forward pass has no more images than asked for."""

from itertools import chain

import pytest
import torch
from torch import nn

from stockpot.settings import TrialSettings
from stockpot.training.moving_parts import Training
from tests.tiny_training import PREPROCESS, batches


def one_layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def step_length(model: nn.Module, **settings) -> float:
    """How far one step of SGD at rate 0.5 moves all weights together."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    Training(model, TrialSettings(optimiser="sgd", weight_decay=0, **settings), PREPROCESS).advance(next(batches(0)), 0.5)
    return torch.cat([(now - then).flatten() for now, then in zip(model.parameters(), before, strict=True)]).norm().item()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gradient_is_cut_down_to_the_norm_asked_for_and_no_other_is_touched(precision):
    """In fp16 it is the gradient itself that is cut, not the one of the scaled loss."""
    free = step_length(one_layer(), clip_norm=0, precision=precision)
    assert free > 0.5 * 0.2
    assert step_length(one_layer(), clip_norm=0.1, precision=precision) == pytest.approx(0.5 * 0.1, rel=1e-3)
    assert step_length(one_layer(), clip_norm=1000, precision=precision) == pytest.approx(free)


@pytest.mark.parametrize(("precision", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_model_computes_in_its_precision_and_is_kept_in_float32(precision, kind):
    model, seen = one_layer(), []
    model[1].register_forward_hook(lambda _layer, _given, logits: seen.append(logits.dtype))
    training = Training(model, TrialSettings(precision=precision, ema_decays=(0.9,)), PREPROCESS)
    training.advance(next(batches(0)), 0.01)
    assert seen == [kind]
    moments = chain.from_iterable(values.values() for values in training.rule.state.values())
    assert {tensor.dtype for tensor in chain(model.parameters(), moments)} == {torch.float32}


@pytest.mark.parametrize(("micro_batch", "sizes"), [(None, [12]), (12, [12]), (5, [5, 5, 2])])
@pytest.mark.parametrize("sam_rho", [0.0, 0.05])
def test_a_forward_pass_has_no_more_images_than_asked_for(micro_batch, sizes, sam_rho):
    model, seen = one_layer(), []
    model.register_forward_hook(lambda _model, given, _logits: seen.append(len(given[0])))
    Training(model, TrialSettings(micro_batch=micro_batch, sam_rho=sam_rho), PREPROCESS).advance(next(batches(0)), 0.01)
    assert seen == sizes * (2 if sam_rho else 1)
