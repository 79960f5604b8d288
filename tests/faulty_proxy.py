"""A TCP proxy that breaks connections on purpose: between a client and a real server, for chosen requests, at a chosen byte."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Fault = Literal["cut", "reset", "stall", "mute"]


@dataclass
class FaultyProxy:
    """Forwards to `port` of loopback. The next `times` requests that contain `match` get `fault` after `after` bytes of their answer.

    cut: an orderly close. reset: a RST. stall: no further byte, connection open. mute: not even the first byte.
    """

    port: int
    fault: Fault = "cut"
    match: bytes = b".tar"
    after: int = 20_000
    times: int = 0
    seen: int = 0
    """Requests that matched."""
    broken: int = 0
    """Faults made."""
    answered: int = 0
    """Bytes from the server to clients, headers and what was lost in a cut included."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _sockets: list[socket.socket] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)
    listener: socket.socket = field(default_factory=socket.socket)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def break_next(self, fault: Fault, times: int, after: int = 20_000, match: bytes = b".tar") -> None:
        """Set what happens to the next matching requests."""
        with self._lock:
            self.fault, self.times, self.after, self.match, self.seen, self.broken = fault, times, after, match, 0, 0

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.port))
            self._sockets += [client, server]
            armed: list[int] = []  # bytes still to pass before the fault; empty when there is none
            threading.Thread(target=self._requests, args=(client, server, armed), daemon=True).start()
            threading.Thread(target=self._answers, args=(client, server, armed), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket, armed: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                head = data.split(b"\r\n", 1)[0]
                with self._lock:
                    if head.startswith(b"GET ") and self.match in head:
                        self.seen += 1
                        if self.times:
                            self.times -= 1
                            armed[:] = [0 if self.fault == "mute" else self.after]
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _answers(self, client: socket.socket, server: socket.socket, armed: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(16384):
                with self._lock:
                    self.answered += len(data)
                if armed and len(data) >= armed[0]:
                    client.sendall(data[: armed[0]])
                    self._break(client, server)
                    return
                if armed:
                    armed[0] -= len(data)
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def _break(self, client: socket.socket, server: socket.socket) -> None:
        self.broken += 1
        if self.fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if self.fault in ("cut", "reset"):
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            if self.fault == "cut":
                client.shutdown(socket.SHUT_RDWR)
            client.close()

    def stop(self) -> None:
        """Close everything."""
        self._stopped.set()
        for one in (self.listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@contextmanager
def faulty_proxy(port: int, listen: int = 0) -> Iterator[FaultyProxy]:
    """A running proxy in front of a server of this machine, on a port of its own or on `listen`."""
    proxy = FaultyProxy(port)
    proxy.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    proxy.listener.bind(("127.0.0.1", listen))
    proxy.listener.listen(64)
    thread = threading.Thread(target=proxy._accept, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stop()
        thread.join(5)
