"""Promise: what the soup flow is told is its final state, and no picture ends it."""

import logging

import pytest
from prefect.logging import disable_run_logger

from flows import soup
from stockpot.errors import RegistryError, ServerUnreachable
from stockpot.outcomes import GateDecision, ModelVersion
from tasks import patience


@pytest.fixture
def registered(monkeypatch):
    """A flow whose soup is version 3 already."""
    version = ModelVersion(model="digits", version=3, soup_sha256="0" * 64)
    answers = {
        "cook_soup": "report",
        "register_soup": version,
        "pass_gate": GateDecision(promoted=True, reason="It is better."),
        "read_answer": "",
        "read_alias": version,
        "fetch_picture": (b"", "page"),
        "show_soup": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(soup, name, lambda *_given, answer=answer: answer)
    return version


def fails(error):
    def call(*_given):
        raise error

    return call


def test_a_stated_failure_after_the_gate_is_a_state(registered, monkeypatch):
    monkeypatch.setattr(soup, "read_alias", fails(RegistryError("Version 3 of digits is gone.")))
    with disable_run_logger():
        state = soup.soup.fn("abc")
    assert (state.name, state.message) == ("RegistryError", "Version 3 of digits is gone.")


@pytest.mark.parametrize("name", ["fetch_picture", "show_soup"])
def test_a_version_stands_whether_it_can_be_shown_or_not(registered, monkeypatch, caplog, name):
    monkeypatch.setattr(soup, name, fails(ServerUnreachable("It does not answer.")))
    monkeypatch.setattr(patience, "_log", lambda: logging.getLogger("run"))
    with disable_run_logger():
        state = soup.soup.fn("abc")
    assert state.is_completed()
    assert state.message == "Version 3 of digits: It is better."
    assert "could not be drawn here" in caplog.text
    assert "It does not answer." in caplog.text
