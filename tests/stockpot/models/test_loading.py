"""Promise: weights of any program are read without running any of it, out of their wrappers, and only if they fit."""

import os
import pickle

import pytest
import torch

from stockpot.checkpoints import save_weights
from stockpot.errors import ModelError
from stockpot.models.loading import fetch_state, load_state

STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "optimizer": {"state": {}}},
        {"model": STATE, "args": {"lr": 0.1}},
        {"model": {"state_dict": {f"module.{name}": tensor for name, tensor in STATE.items()}}},
        {f"_orig_mod.{name}": tensor for name, tensor in STATE.items()},
    ],
    ids=["bare", "state_dict", "model", "module.", "compiled"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_torch_file_is_read_out_of_its_wrappers(content, zipped, tmp_path):
    torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=zipped)
    assert same(fetch_state(f"file://{tmp_path}/weights.pt"))


def test_a_safetensors_file_needs_no_special_name(tmp_path):
    save_weights(tmp_path / "weights.bin", {f"module.{name}": tensor for name, tensor in STATE.items()})
    assert same(fetch_state(str(tmp_path / "weights.bin")))


class Malicious:
    """What a poisoned checkpoint holds: something to run while it is read."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_run(zipped, tmp_path):
    torch.save({"state_dict": {"weight": Malicious(str(tmp_path / "ran"))}}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ModelError, match=r"`evil\.pt` asks for `\w+\.mkdir` to be run or built .* was not read; .* as safetensors"
    ) as caught:
        fetch_state(str(tmp_path / "evil.pt"))
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_plain_malicious_pickle_is_refused_too(tmp_path):
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Malicious(str(tmp_path / "ran")), protocol=2))
    with pytest.raises(ModelError, match="safetensors"):
        fetch_state(str(tmp_path / "evil.bin"))
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_and_one_without_weights_are_one_sentence(tmp_path):
    torch.save(STATE, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:200])
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "odd.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no weights at all, but a text")
    for name, told in [
        ("half.pt", "damaged"),
        ("odd.pt", "holds a value of type int under `epoch`"),
        ("list.pt", "but a value of type list"),
        ("text.pt", "not readable as safetensors"),
    ]:
        with pytest.raises(ModelError, match=told):
            fetch_state(str(tmp_path / name))


def test_a_missing_and_an_unknown_key_are_named():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="`bias` is missing in the weights"):
        load_state(model, {"weight": torch.zeros(2, 2)})
    with pytest.raises(ModelError, match=r"`scale` is .* unknown in the model"):
        load_state(model, {**model.state_dict(), "scale": torch.zeros(1)})


def test_the_first_differing_key_is_told_with_both_shapes():
    with pytest.raises(ModelError, match=r"`weight` is \(2, 3\) in the weights and \(2, 2\) in the model"):
        load_state(torch.nn.Linear(2, 2), STATE)
