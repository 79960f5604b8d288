"""Promise: the same weights give the same bytes, ties survive, and a broken file is one sentence."""

import pytest
import torch

from stockpot.checkpoints import first_non_finite, load_weights, save_weights
from stockpot.errors import ModelError


def test_the_same_weights_give_the_same_file(tmp_path):
    state = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2, dtype=torch.int64)}
    assert len({save_weights(tmp_path / f"{number}.safetensors", state) for number in range(5)}) == 1


def test_weights_come_back_to_the_bit(tmp_path):
    state = {"w": torch.randn(3, 4), "half": torch.randn(3).bfloat16(), "count": torch.tensor(7), "empty": torch.zeros(0)}
    save_weights(tmp_path / "w.safetensors", state)
    back = load_weights(tmp_path / "w.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == state[name].dtype for name in state)


def test_tied_tensors_stay_tied_and_are_stored_once(tmp_path):
    shared = torch.randn(100, 100)
    save_weights(tmp_path / "w.safetensors", {"embedding": shared, "output": shared, "row": shared[0]})
    back = load_weights(tmp_path / "w.safetensors")
    assert back["output"].data_ptr() == back["embedding"].data_ptr()
    assert torch.equal(back["row"], shared[0])
    assert (tmp_path / "w.safetensors").stat().st_size < 1.2 * shared.numel() * 4


def test_a_torn_file_is_refused_by_name(tmp_path):
    save_weights(tmp_path / "w.safetensors", {"w": torch.randn(100)})
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:200])
    with pytest.raises(ModelError, match=r"`torn\.safetensors` is not readable as safetensors"):
        load_weights(tmp_path / "torn.safetensors")


def test_the_first_tensor_that_is_no_number_is_named():
    assert first_non_finite({"good": torch.ones(2), "count": torch.tensor(3), "bad": torch.tensor([1.0, float("inf")])}) == "bad"
    assert first_non_finite({"good": torch.ones(2)}) is None
