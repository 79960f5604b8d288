"""Promise: what no trial of a sweep could carry out is refused with its name, before a GPU is taken."""

import pytest
import torch

from stockpot.config import SweepSpec
from stockpot.errors import BadRequest
from stockpot.training import inits, rehearsal
from stockpot.training.rehearsal import rehearse


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"frozen": ["head.*", "body.conv9.*"]},
            r"`frozen: body\.conv9\.\*` names no parameter of the model; near are `body\.conv1\.weight`",
        ),
        ({"frozen": ["*"]}, "leaves no parameter to train"),
        ({"augmentation": "maximal"}, "no augmentation `maximal`"),
        ({"augmentation": "rand-9-n2"}, "has `9`, which timm's `rand` cannot read"),
        ({"augmentation": "augmix-a0"}, r"`augmix-a0` fails when it is applied \(alpha <= 0\)"),
        ({"augmentation": "rand-n20-tweights"}, r"`rand-n20-tweights` fails when it is applied"),
        ({"augmentation": "rand-mmax5"}, "has magnitude 10 and timm cuts it down to 5"),
        ({"last_epoch_augmentation": "minimum"}, "no augmentation `minimum`"),
        ({"loss": "hinge"}, "no loss `hinge`"),
        ({"loss": "torch.nn.functional:cross_entropyy"}, "no loss `torch.nn.functional:cross_entropyy`.*has no attribute"),
        ({"loss": "torch.nn.functionel:cross_entropy"}, "no loss `torch.nn.functionel:cross_entropy`.*No module named"),
        ({"augmentation": "torch:float32"}, "`torch:float32` is a value of type dtype; name a function"),
        ({"last_epoch_augmentation": "torch:augment"}, "`torch:augment` cannot be imported"),
        ({"augmentation": ":augment"}, "`:augment` cannot be imported"),
        ({"augmentation": ".x:augment"}, r"`\.x:augment` cannot be imported"),
        ({"loss": ".x:y"}, r"no loss `\.x:y`"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(ground, settings, said):
    with pytest.raises(BadRequest, match=said):
        rehearse(SweepSpec(trials=2, settings=settings), inits.fetch(ground.init)[0])


def test_names_that_exist_or_live_elsewhere_pass(ground):
    fine = {"frozen": ["head.*"], "loss": "elsewhere:loss", "augmentation": "elsewhere:augment", "last_epoch_augmentation": "minimal"}
    rehearse(SweepSpec(trials=2, settings=fine), inits.fetch(ground.init)[0])


def test_layer_decay_on_a_model_without_numbered_blocks_is_refused(ground, monkeypatch):
    monkeypatch.setattr(rehearsal, "build", lambda _config: torch.nn.Linear(2, 2))
    with pytest.raises(BadRequest, match="`layer_decay` needs a model whose blocks are numbered"):
        rehearse(SweepSpec(trials=2, settings={"layer_decay": 0.7}), inits.fetch(ground.init)[0])
