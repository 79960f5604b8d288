"""Something that happens just before the n-th step of the code under test, as if its process had been paused there: whatever it asks of the
object store, and requests that change what an HTTP server holds."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import requests

from stockpot import storage


class Interrupting:
    """Runs `meanwhile` before step number `number`, from 0, of this thread; once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, meanwhile: Callable[[], object]) -> None:
        self.left, self.meanwhile, self.happened = number, meanwhile, False
        self.thread = threading.current_thread()
        for name in ("write_bytes", "upload", "remove", "list_prefix", "read_bytes"):
            monkeypatch.setattr(storage, name, self._before(getattr(storage, name), lambda *_: True))
        monkeypatch.setattr(requests.Session, "send", self._before(requests.Session.send, _changes))

    def _before(self, step: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is self.thread and counts(*arguments):
                self.left -= 1
                if self.left == -1:
                    self.meanwhile()
                    self.happened = True
            return step(*arguments, **named)

        return wrapped


def _changes(_session: requests.Session, request: requests.PreparedRequest) -> bool:
    return request.method != "GET" and "search" not in str(request.path_url)
