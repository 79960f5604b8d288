"""Guards: a weights file that is cut, foreign or describes no tensors ends in a sentence, before a byte of it is averaged."""

import json
from pathlib import Path

import pytest
import torch

from stockpot.checkpoints import save_weights
from stockpot.errors import IngredientMismatch
from stockpot.soup.recipes.weights import open_weights


def test_a_truncated_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    save_weights(path, {"body.weight": torch.randn(7, 3), "scale": torch.tensor(1.0)})
    data = path.read_bytes()
    for number, broken in enumerate([data[:-3], data[:40], data[:5], b"", b"not safetensors at all, just text", data + b"x"]):
        broken_path = tmp_path / f"broken{number}.safetensors"
        broken_path.write_bytes(broken)
        with pytest.raises(IngredientMismatch, match="store the weights again"):
            open_weights(broken_path)


WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"w": {"dtype": "F32", "shape": [2]}}, r"`w` in `odd\.safetensors` has no type, shape and place \('data_offsets'\)"),
        ({"w": WHOLE | {"data_offsets": [0]}}, "no type, shape and place"),
        ({"w": WHOLE | {"data_offsets": [0, "8"]}}, "no type, shape and place"),
        ({"w": WHOLE | {"data_offsets": [0, 4]}}, r"`w` in `odd\.safetensors` is F32 \[2\] in bytes 0 to 4"),
        ({"w": WHOLE | {"data_offsets": [-8, 0]}}, "is F32 .* in bytes -8 to 0"),
        ({"w": WHOLE | {"shape": 2}}, "no type, shape and place"),
        ({"w": WHOLE | {"shape": [-1, -2]}}, r"is F32 \[-1, -2\] in bytes"),
        ({"w": 8}, "no type, shape and place"),
        ({"w": WHOLE, "__metadata__": None}, r"`odd\.safetensors` has a header whose metadata is not Stockpot's"),
        ({"w": WHOLE, "__metadata__": {"stockpot": "{}"}}, "metadata is not Stockpot's"),
        ({"w": WHOLE, "__metadata__": {"stockpot": '{"tied": {"v": "gone"}}'}}, r"metadata is not Stockpot's \('gone'\)"),
    ],
)
def test_a_header_that_describes_no_tensors_ends_in_a_sentence(tmp_path: Path, header: dict[str, object], told: str) -> None:
    path, text = tmp_path / "odd.safetensors", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(IngredientMismatch, match=f"{told}.*; store the weights again"):
        open_weights(path)
