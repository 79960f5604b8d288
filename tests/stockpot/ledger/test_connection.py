"""Guards: a ledger that does not let this user in is one sentence, and no name can break a filter."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stockpot.errors import BadRequest, ServerRefused, Transient
from stockpot.ledger import registry, tracking
from stockpot.ledger.connection import check_server, quoted


class Doorman(BaseHTTPRequestHandler):
    """Healthy, and closed to everyone."""

    def do_GET(self) -> None:
        healthy = self.path == "/health"
        body = b"OK" if healthy else b"You are not authenticated."
        self.send_response(200 if healthy else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815  (the library's spelling)

    def log_message(self, *args: object) -> None:
        del args


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Doorman) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "night")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_wrong_password_is_one_sentence_and_not_worth_another_attempt(closed: str) -> None:
    for asked in (check_server, tracking.list_sweeps, lambda: registry.alias_version("photos", "champion")):
        with pytest.raises(ServerRefused, match=f"MLflow at {closed} refused access .HTTP 401, user night.; set MLFLOW_TRACKING_USERNAME"):
            asked()
    assert not issubclass(ServerRefused, Transient)


@pytest.mark.usefixtures("ledger")
def test_a_name_with_a_quotation_mark_is_a_name_that_nothing_has() -> None:
    assert registry.list_versions("it's") == []
    assert quoted('say "so"') == "'say \"so\"'"
    with pytest.raises(BadRequest, match="one kind of quotation mark"):
        quoted("""it's "so\"""")
