"""Guards: aliases are read back, missing things are named, and what is pinned for a consumer is what was installed."""

from uuid import uuid4

import mlflow
import pytest

from stockpot.errors import RegistryError
from stockpot.ledger import packaging, registry
from stockpot.ledger.connection import client


def test_what_does_not_exist_is_named(ledger: str) -> None:
    model = f"registry-{uuid4().hex[:8]}"
    assert registry.find_version(model, "0" * 64) is None
    assert registry.alias_version(model, "champion") is None
    with pytest.raises(RegistryError, match=f"no version 7 of {model}"):
        registry.read_version(model, 7)
    with pytest.raises(RegistryError, match=f"has no version of {model}"):
        registry.load(f"{model}@champion")


def test_requirements_are_pinned_without_a_builds_local_suffix() -> None:
    assert all("==" in pin and "+" not in pin for pin in packaging.requirements({"arch": {}}))


def test_mlflow_itself_follows_the_address(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it downloads by `models:/...` comes from its own address, whichever is given to it."""
    for address in ("http://127.0.0.1:9", ledger):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        client()
        assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == (address, address)
