"""Promise: what no trial could carry out is refused before the init's head is fitted, which may take a GPU."""

import pytest

from stockpot.config import RetrainRequest
from stockpot.errors import BadRequest
from stockpot.training import probing
from tasks.planning import _prepare


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"sweep": {"trials": 1, "settings": {"augmentation": "maximal"}}}, "no augmentation `maximal`"),
        ({"sweep": {"trials": 1, "settings": {"batch_size": 9}}, "fan_out": {"gpus": 2}}, "make `batch_size` a multiple of 2"),
    ],
)
def test_a_sweep_is_rehearsed_before_a_head_is_fitted(ground, tmp_path, monkeypatch, asked, said):
    monkeypatch.setattr(probing, "probed", lambda *_given, **_how: pytest.fail("the head was fitted"))
    request = {
        "model": "planned",
        "store": f"file://{tmp_path}/store",
        "data": {"snapshot": ground.data.snapshot.uri},
        "base": {"arch": "timm:test_resnet"},
        "init": {"head": "linear_probe"},
        **asked,
    }
    with pytest.raises(BadRequest, match=said):
        _prepare(RetrainRequest.model_validate(request), ground.data)
