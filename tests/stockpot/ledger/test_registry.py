"""Guards: aliases are read back, missing things are named, and what is pinned for a consumer is what was installed."""

from functools import partialmethod
from unittest.mock import Mock
from uuid import uuid4

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import RestException

from stockpot.errors import RegistryError, ServerRefused, ServerUnreachable
from stockpot.ledger import packaging, registry
from stockpot.ledger.connection import client, search_experiments


def test_what_does_not_exist_is_named(ledger: str) -> None:
    model = f"registry-{uuid4().hex[:8]}"
    assert registry.find_version(model, "0" * 64) is None
    assert registry.alias_version(model, "champion") is None
    with pytest.raises(RegistryError, match=f"no version 7 of {model}"):
        registry.read_version(model, 7)
    with pytest.raises(RegistryError, match=f"has no version of {model}"):
        registry.load(f"{model}@champion")


@pytest.mark.parametrize(("status", "told"), [(401, ServerRefused), (403, ServerRefused), (503, ServerUnreachable)])
def test_a_version_that_nobody_may_see_is_not_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, status: int, told: type[Exception]
) -> None:
    error = RestException({"error_code": "PERMISSION_DENIED", "message": "no"})
    error.get_http_status_code = lambda: status
    server = Mock()
    server.get_model_version.side_effect = error
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(registry, "client", lambda: server)
    with pytest.raises(told):
        registry.read_version("digits", 7)


def test_however_few_the_server_gives_at_once_all_are_found(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `prune` does not find behind a version it would delete."""
    model = f"pages-{uuid4().hex[:8]}"
    client().create_registered_model(model)
    tags = {"stockpot.soup_sha256": "0" * 64}
    experiments = [client().create_experiment(f"{model}-{number}") for number in range(3)]
    stored = [str(client().create_logged_model(one).model_id) for one in experiments]
    for one, parts in zip(stored, ("one,two", "one", None), strict=True):
        named = {"stockpot.ingredients": parts} if parts else {}
        client().create_model_version(model, f"models:/{one}", tags=tags | named, model_id=one)
    for search in ("search_model_versions", "search_experiments"):
        monkeypatch.setattr(MlflowClient, search, partialmethod(getattr(MlflowClient, search), max_results=1))
    assert registry.models_behind_versions() >= set(stored)
    assert [(one.version, one.ingredients) for one in registry.list_versions(model)] == [(3, ()), (2, ("one",)), (1, ("one", "two"))]
    assert sorted(registry._versions(model, "0" * 64)) == [1, 2, 3]
    assert "but versions 1, 2, 3" in str(registry.no_version(model, "champion"))
    assert {one.experiment_id for one in search_experiments()} >= set(experiments)


def test_requirements_are_pinned_without_a_builds_local_suffix() -> None:
    assert all("==" in pin and "+" not in pin for pin in packaging.requirements({"arch": {}}))


def test_mlflow_itself_follows_the_address(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it downloads by `models:/...` comes from its own address, whichever is given to it."""
    for address in ("http://127.0.0.1:9", ledger):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        client()
        assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == (address, address)
