"""The demo's data: the frozen sizes, disjoint parts, real shifts, and nothing new on a second publication."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.demo.digits import CLASSES, PREPROCESS, publish_digits
from stockpot.data.shards import pixels
from stockpot.data.snapshots import Snapshot, open_snapshot, pin


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        root = f"file://{tmp_path_factory.mktemp('digits')}"
        first = publish_digits(root, 10)
        assert publish_digits(root, 10) == first
    return first


def opened(uri: str) -> Snapshot:
    return open_snapshot(pin(uri))


def test_sizes_and_classes_are_those_of_the_measured_setting(uris: dict[str, Any], node: Path) -> None:
    assert opened(uris["pretrain"]).counts == {"train": 300}
    assert opened(uris["snapshot"]).counts == {"train": 400, "held_out": 400, "gate": 200}
    assert opened(uris["test"]).counts == {"test": 497}
    assert all(opened(uri).counts == {"test": 497} for uri in uris["shifts"].values())
    assert all(opened(uris[name]).classes == CLASSES for name in ("pretrain", "snapshot", "test"))


def test_no_picture_is_in_two_parts(uris: dict[str, Any], node: Path) -> None:
    parts = [opened(uris[name]) for name in ("pretrain", "snapshot", "test")]
    keys = [key for part in parts for key in part.index.keys(0, part.manifest.index.samples)]
    assert len(keys) == len(set(keys)) == 1797


def test_shifts_show_the_test_pictures_changed(uris: dict[str, Any], node: Path) -> None:
    plain = pixels(opened(uris["test"]), "test", PREPROCESS)
    assert set(uris["shifts"]) == {"rotation", "noise", "blur"}
    for uri in uris["shifts"].values():
        shifted = pixels(opened(uri), "test", PREPROCESS)
        assert shifted.keys == plain.keys
        assert (shifted.labels == plain.labels).all()
        difference = np.abs(shifted.images.astype(int) - plain.images.astype(int)).mean()
        assert 5 < difference < 80
