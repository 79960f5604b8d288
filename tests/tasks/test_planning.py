"""Promises: what no trial could carry out is refused before the init's head is fitted, which may take a GPU. What a sweep goes on from is
looked at before a trial is dispatched: data or an init that were changed since are refused, and new ones make other trials.
"""

import json
from pathlib import Path

import pytest

from stockpot.config import RetrainRequest
from stockpot.errors import BadRequest, ModelError, ObjectMissing, SnapshotBroken
from stockpot.sweeps import plan
from stockpot.training import probing
from tasks.planning import _prepare, pin_data
from tests.tiny_sweep import lay_ground


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


@pytest.fixture
def again(tmp_path):
    """A request whose init is built, with random weights, as of a sweep that was begun."""

    def asked(snapshot: str) -> RetrainRequest:
        return RetrainRequest.model_validate(
            {
                "model": "again",
                "store": f"{tmp_path}/store",
                "data": {"snapshot": snapshot},
                "base": {"arch": "timm:test_resnet"},
                "init": {"head": "random"},
                "sweep": {"trials": 2},
            }
        )

    return asked


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def prepared_otherwise(path: Path) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"preprocess": document["preprocess"] | {"mean": [0.4, 0.4, 0.4]}}))


@pytest.mark.parametrize(
    ("name", "change", "error", "said"),
    [
        ("model.safetensors", cut, ModelError, r"The init at \S+ has digest \w+, it was built with \w+: its weights or its config"),
        ("model.json", prepared_otherwise, ModelError, r"has digest \w+, it was built with \w+"),
        ("model.json", halve, ModelError, r"has digest none, it was built with \w+"),
        ("fingerprint.json", halve, ModelError, "fingerprint.json cannot be read"),
        ("model.safetensors", Path.unlink, ObjectMissing, "model.safetensors"),
    ],
)
def test_an_init_that_was_changed_is_refused_before_a_trial_is_dispatched(again, ground, tmp_path, name, change, error, said):
    request = again(ground.data.snapshot.uri)
    assert _prepare(request, ground.data) == _prepare(request, ground.data)
    (file,) = (tmp_path / "store" / "inits").rglob(name)
    change(file)
    with pytest.raises(error, match=said):
        _prepare(request, ground.data)


def test_a_manifest_that_was_replaced_is_refused_before_a_trial_is_dispatched(again, tmp_path):
    """By name when it is pinned, by its digest when it is replaced after that."""
    data = lay_ground(tmp_path).data
    manifest = Path(data.snapshot.uri)
    manifest.write_text(manifest.read_text().replace('"red"', '"rose"'))
    with pytest.raises(SnapshotBroken, match="the manifest was replaced"):
        pin_data.fn(again(data.snapshot.uri))
    with pytest.raises(SnapshotBroken, match="the manifest was replaced"):
        _prepare(again(data.snapshot.uri), data)


def test_other_data_or_another_init_make_other_trials(again, ground, tmp_path):
    """So there is no state of theirs to go on from, and those of the sweep before stay whole."""
    request = again(ground.data.snapshot.uri)
    init = _prepare(request, ground.data)
    other_data = ground.data.model_copy(update={"snapshot": ground.data.test})
    other_init = init.model_copy(update={"digest": "0" * 64})
    sweeps = [plan(request, ground.data, init), plan(request, other_data, init), plan(request, ground.data, other_init)]
    assert len({trial.id for sweep in sweeps for trial in sweep.trials}) == 6
