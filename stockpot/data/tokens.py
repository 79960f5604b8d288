"""Bytes to token ids: a sample of text is one row of integers in numpy's own format (`.npy`), as a tokeniser made it, padded or not.

Tokenising is left to whoever makes the dataset: it is done once, its rules are no part of training, and the ids are what a model is
trained on and served with.
"""

import io
import tokenize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stockpot.data.images import Undecodable
from stockpot.preparation import Tokens

MAGIC = b"\x93NUMPY"
"""How an array begins, and no image does."""

DAMAGED = (ValueError, OSError, EOFError, SyntaxError, TypeError, MemoryError, tokenize.TokenError)
"""What numpy raises on files that are not what they say."""


def decode(data: bytes) -> NDArray[np.int32]:
    """Token ids, at least one. Raises `Undecodable` with the reason."""
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except DAMAGED as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Undecodable(f"is no readable array of tokens ({reason}; starts with {data[:8]!r})", "tokens") from error
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
        raise Undecodable(f"is an array of {array.dtype} and shape {list(array.shape)}, needed is one row of integers", "tokens")
    if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
        raise Undecodable(f"holds the numbers {array.min()} to {array.max()}, needed are ids from 0 on", "tokens")
    return array.astype(np.int32)


def fit(ids: NDArray[np.int32], tokens: Tokens) -> Tensor:
    """A model's input, int32 (length,). Raises `Undecodable` for an id outside the vocabulary, and where nothing is left to read."""
    kept = ids[: tokens.length]
    if (highest := int(kept.max())) >= tokens.vocabulary:
        raise Undecodable(f"holds token {highest}, the vocabulary ends at {tokens.vocabulary - 1}", "tokens")
    if (kept == tokens.padding).all():
        raise Undecodable(f"holds nothing but padding (token {tokens.padding})", "tokens")
    filled = np.full(tokens.length, tokens.padding, np.int32)
    filled[: len(kept)] = kept
    return torch.from_numpy(filled)
