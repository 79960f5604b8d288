"""Reading an object's body from S3: in order, guarded by If-Match, resumed by range, given up when silent.

Not by `s3fs.get_file`: that one is unguarded, does not resume, and leaves a full-size file of zeros when it is killed.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from typing import Any, NamedTuple

import aiohttp
import fsspec.asyn
from botocore.exceptions import BotoCoreError

from stockpot.errors import Interrupted, ObjectExists, StorageError
from stockpot.s3 import filesystem, said, split, where

SILENCE_S = 10
"""Longest wait for the next bytes of a body before the connection counts as dead."""

READ_BYTES = 2**20


class Stopped(Interrupted):
    """A body stopped before its end; `Body.read_into` may be called again from where it stopped."""

    silent = False
    """By silence, not by a cut."""


class Body:
    """One object's bytes, read forward and resumed by range after a cut; guarded by If-Match, so a replaced object is an error.

    `read_into(sink)` hands pieces to `sink`, in the thread that called, until the end; meanwhile the next MiB is on its way. It raises
    `Stopped` when the connection ends early or is silent for 10 s; calling it again goes on from `offset`.
    """

    def __init__(self, uri: str, etag: str | None = None) -> None:
        self.uri = uri
        self.offset = 0
        self.size: int | None = None
        self.etag = etag

    def read_into(self, sink: Callable[[bytes], Any]) -> None:
        """Read from `offset` to the end."""
        client = filesystem()
        with said(self.uri, SILENCE_S):
            answer = fsspec.asyn.sync(client.loop, self._opened, client)
            self.size = self.offset + answer["ContentLength"]
            with closing(_Ahead(client.loop, answer["Body"], answer["ContentLength"])) as ahead:
                while self.offset < self.size:
                    arrived = ahead.next()
                    for piece in arrived.pieces:
                        sink(piece)
                        self.offset += len(piece)
                    if arrived.fault:
                        raise self._interrupted(arrived.fault, silent=arrived.silent)

    async def _opened(self, client: Any) -> dict[str, Any]:
        bucket, key = split(self.uri)
        guard = {"Range": f"bytes={self.offset}-"} if self.offset else {}
        guard |= {"IfMatch": f'"{self.etag}"'} if self.etag else {}
        try:
            answer: dict[str, Any] = await asyncio.wait_for(client._call_s3("get_object", Bucket=bucket, Key=key, **guard), SILENCE_S)
        except TimeoutError as error:
            raise self._interrupted(f"no answer for {SILENCE_S} s", silent=True) from error
        self._require_the_rest(answer)
        return answer

    def _require_the_rest(self, answer: dict[str, Any]) -> None:
        """Raise where a store passes over the condition or the range it was asked with."""
        found = answer["ETag"].strip('"')
        if self.etag not in {None, found}:
            raise ObjectExists(f"{self.uri} has the etag {found}, {self.etag} was asked for ({where()}).")
        if self.offset and not answer.get("ContentRange", "").startswith(f"bytes {self.offset}-"):
            raise StorageError(f"{self.uri} was asked for from byte {self.offset:,} on, and its store cannot give a range ({where()}).")
        self.etag = found

    def _interrupted(self, reason: str, *, silent: bool = False) -> Stopped:
        of = f" of {self.size:,}" if self.size is not None else ""
        error = Stopped(f"{self.uri} stopped after {self.offset:,}{of} bytes ({reason}; {where()}).")
        error.silent = silent
        return error


class _Arrived(NamedTuple):
    """What came of a MiB, and why it is not all of it."""

    pieces: list[bytes]
    fault: str = ""
    silent: bool = False


class _Ahead:
    """A body read one MiB ahead on the client's event loop, so that nothing but reading happens there: with several bodies at once, their
    sinks (writing, hashing) run side by side in their own threads."""

    def __init__(self, loop: asyncio.AbstractEventLoop, body: Any, size: int) -> None:
        self.loop, self.body, self.missing = loop, body, size
        self._coming = self._ask()

    def next(self) -> _Arrived:
        """The next MiB, or the rest; the one after it is asked for."""
        arrived = self._coming.result()
        self.missing -= sum(map(len, arrived.pieces))
        if self.missing and not arrived.fault:
            self._coming = self._ask()
        return arrived

    def close(self) -> None:
        """Stop reading; a connection that is not at its end is closed."""
        self._coming.cancel()
        self.loop.call_soon_threadsafe(self.body.close)

    def _ask(self) -> Future[_Arrived]:
        return asyncio.run_coroutine_threadsafe(self._read(min(self.missing, READ_BYTES)), self.loop)

    async def _read(self, wanted: int) -> _Arrived:
        pieces: list[bytes] = []
        while wanted:
            try:
                async with asyncio.timeout(SILENCE_S):
                    piece = await self.body.read(wanted)
            except TimeoutError:
                return _Arrived(pieces, f"no byte for {SILENCE_S} s", silent=True)
            except (OSError, BotoCoreError, aiohttp.ClientError) as error:
                return _Arrived(pieces, str(error).splitlines()[0] if str(error) else type(error).__name__)
            if not piece:
                return _Arrived(pieces, "the connection was closed")
            pieces.append(piece)
            wanted -= len(piece)
        return _Arrived(pieces)
