"""What every test module may use: one real S3 server and one real MLflow server for the session, and the ground of tiny sweeps.
Import nothing heavy here."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.mlflow_server import free_port
from tests.mlflow_server import mlflow_server as running_mlflow_server
from tests.object_store import ObjectStore, object_store

if TYPE_CHECKING:
    from tests.tiny_sweep import Ground


settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure() -> None:
    """Told to end, as by a CI at its limit, leave as at Ctrl-C: what the fixtures started ends with them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A SeaweedFS server with bucket `stockpot`, ended with the session."""
    with object_store(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def s3(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectStore:
    """The server as this process's `AWS_*` environment, and an empty node cache."""
    for name, value in store.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return store


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty node cache; returns the folder it lies in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stockpot"


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real `mlflow server` on SQLite and local artifacts, proxied; ended with the session."""
    with running_mlflow_server(tmp_path_factory.mktemp("mlflow"), free_port()) as address:
        yield address


@pytest.fixture
def ledger(mlflow_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The session's server as `MLFLOW_TRACKING_URI`, with a node cache of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return mlflow_server


@pytest.fixture
def stockpot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[Any, str, str]]:
    """Run a command line in this process and in an empty folder, with no server's address but what the test sets; returns exit code,
    standard output and standard error."""
    from deployments import cli

    monkeypatch.chdir(tmp_path)
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["stockpot", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> "Ground":
    """Published data and an init for tiny sweeps."""
    from tests.tiny_sweep import lay_ground

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("ground-cache")))
        return lay_ground(tmp_path_factory.mktemp("ground"))
