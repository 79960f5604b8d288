"""Guards: the memory of one recipe is its own, not what the process held before it."""

from pathlib import Path

import numpy as np
import pytest

from stockpot.soup import footprint

MIB = 2**20


def taken(mebibytes: int) -> int | None:
    """The peak while an array of that size was filled and given back."""
    peak_bytes = footprint.watch("cpu")
    np.ones(mebibytes * MIB, np.uint8)
    return peak_bytes()


def test_a_peak_is_of_its_own_block() -> None:
    small, large, after = taken(1), taken(200), taken(1)
    if small is None or large is None or after is None:
        pytest.skip("this kernel lets no process count anew")
    assert large - small > 190 * MIB
    assert after < large - 150 * MIB, "what was given back is forgotten"


def test_a_kernel_that_refuses_is_not_guessed_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(footprint, "CLEAR", tmp_path / "no" / "clear_refs")
    assert footprint.watch("cpu")() is None
