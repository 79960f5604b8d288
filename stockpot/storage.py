"""Bytes by address. `s3://bucket/key`, `file:///path` and an absolute path are used alike: read, write, conditional create, list.

A write is whole or absent: on S3 by its nature, on a file system by temp, fsync and rename (create: by hard link, which refuses an
existing name).
S3 lives in `stockpot.s3` and `stockpot.s3_bodies`; this module only chooses. Raises the errors of `stockpot.errors` under StorageError,
and ServerUnreachable.
"""

import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, NamedTuple

from stockpot import s3, s3_bodies
from stockpot.errors import Interrupted, ObjectExists, ObjectMissing, SnapshotBroken, StorageError, StorageRefused
from stockpot.s3 import StoredObject
from stockpot.s3_bodies import Stopped

__all__ = [
    "Interrupted",
    "StoredObject",
    "address",
    "check",
    "download",
    "exists",
    "fetch",
    "fetch_hashed",
    "folders",
    "join",
    "list_prefix",
    "read_bytes",
    "remove",
    "size",
]
__all__ += ["upload", "write_bytes"]

CHUNK = 2**20


ATTEMPTS = 4
"""A fetch is given up after so many silences, or so many attempts in a row without a new byte: well under a minute."""


SCHEME = re.compile(r"(?i)(s3(?=:)|[a-z][a-z0-9+.-]*(?=:/)):/*")
"""What begins an address that is no path: `s3:/`, `S3://`, `gs://`."""


class Fetched(NamedTuple):
    """What a fetch took."""

    size: int
    etag: str
    retries: int


def address(text: str) -> str:
    """What a person wrote, as an address: a path becomes an absolute one. Raises `StorageError` for `s3:/x`, `s3:///x`, `gs://x`."""
    if _remote(text) or text.startswith("file://"):
        return text
    if SCHEME.match(text):
        raise _no_address(text)
    return str(Path(text).absolute())


def join(uri: str, *parts: str) -> str:
    """The address below `uri`; parts that are addresses themselves replace it."""
    for part in parts:
        uri = part if "://" in part or part.startswith("/") else f"{uri.rstrip('/')}/{part}"
    return uri


def read_bytes(uri: str) -> bytes:
    """The whole object."""
    data = bytearray()
    fetch(uri, data.extend)
    return bytes(data)


def fetch(uri: str, sink: Callable[[bytes], Any], *, etag: str | None = None) -> Fetched:
    """Hand the object's bytes to `sink`, in pieces and in order, each once: a cut connection is resumed by range where it stopped.

    `etag`, as listed, makes a replaced object an error (`SnapshotBroken`), as does a replacement while reading. Raises `Interrupted` after
    four silences of 10 s, or four attempts without a new byte; `StorageError` when `sink` cannot write.
    """
    body: s3_bodies.Body | _LocalBody = s3_bodies.Body(uri, etag) if _remote(uri) else _LocalBody(uri, etag)
    retries = fruitless = silences = 0
    while True:
        before = body.offset
        try:
            body.read_into(_guarded(sink, uri))
            return Fetched(body.offset, body.etag or "", retries)
        except Stopped as error:
            retries += 1
            silences += error.silent
            fruitless = 0 if body.offset > before else fruitless + 1
            if max(fruitless, silences) >= ATTEMPTS:
                raise Interrupted(f"{error} Tried {retries} times; start again when the store is healthy.") from error
            time.sleep(min(0.1 * 2**fruitless, 2))
        except ObjectExists as error:
            raise SnapshotBroken(f"{uri} was replaced since it was listed, or while it was read; publish or register it again.") from error


def fetch_hashed(uri: str, file: BinaryIO, *, etag: str | None = None) -> tuple[Fetched, str]:
    """Write the object's bytes to an open file; returns what `fetch` took, and their sha256."""
    sha256 = hashlib.sha256()

    def sink(piece: bytes) -> None:
        file.write(piece)
        sha256.update(piece)

    fetched = fetch(uri, sink, etag=etag)
    _guarded(lambda _: file.flush(), uri)(b"")
    return fetched, sha256.hexdigest()


def _guarded(sink: Callable[[bytes], Any], uri: str) -> Callable[[bytes], None]:
    def write(piece: bytes) -> None:
        try:
            sink(piece)
        except OSError as error:
            raise StorageError(
                f"The bytes of {uri} cannot be written to disk: {error.strerror}. Free some space, then start again."
            ) from error

    return write


def write_bytes(uri: str, data: bytes, *, create: bool = False) -> None:
    """Store the object whole; with `create`, raise `ObjectExists` when something is already there, whoever wrote it."""
    if _remote(uri):
        s3.write_bytes(uri, data, create=create)
        return
    with _written(uri, create) as temporary:
        temporary.write_bytes(data)


def upload(path: Path, uri: str, *, create: bool = False) -> None:
    """Store a file, in bounded memory; `create` as in `write_bytes`."""
    if _remote(uri):
        s3.upload(path, uri, create=create)
        return
    with _written(uri, create) as temporary:
        shutil.copyfile(path, temporary)


def download(uri: str, path: Path, sha256: str | None = None) -> None:
    """Fetch the object into a file, whole or not at all; with `sha256`, raise `SnapshotBroken` unless the bytes hash to it.

    A cut connection is resumed where it stopped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            _, found = fetch_hashed(uri, file)
            os.fsync(file.fileno())
        if sha256 is not None and found != sha256:
            raise SnapshotBroken(f"{uri} hashes to sha256 {found[:12]}, {sha256[:12]} was recorded: it is damaged or was replaced.")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def exists(uri: str) -> bool:
    """Whether an object is stored at this very address."""
    return size(uri) is not None


def size(uri: str) -> int | None:
    """Bytes of the object at this very address; None where there is none."""
    if _remote(uri):
        return s3.size(uri)
    return _local(uri).stat().st_size if _local(uri).is_file() else None


def list_prefix(uri: str) -> list[StoredObject]:
    """Every object whose address starts with `uri`, sorted by address; [] when there is none."""
    if _remote(uri):
        return list(s3.list_prefix(uri))
    top = _local(uri)
    base, address = (top, uri.rstrip("/")) if top.is_dir() else (top.parent, uri.rpartition("/")[0])  # as it was written, `//` or not
    found = []
    with _said(uri):
        for path in sorted(_below(base) if base is top else base.glob(f"{glob.escape(top.name)}*")):
            try:
                stat = path.stat()
            except FileNotFoundError:
                if path.is_symlink():
                    raise ObjectMissing(f"{path} is a link to {path.readlink()}, where nothing is; mend or remove the link.") from None
                continue  # removed meanwhile
            if S_ISREG(stat.st_mode) and not path.name.startswith(".stockpot-"):
                found.append(StoredObject(f"{address}/{path.relative_to(base)}", stat.st_size, _etag(stat)))
    return found


def folders(uri: str) -> list[str]:
    """Names of the folders right below `uri`, sorted; on a file system empty ones and links too."""
    if _remote(uri):
        return list(s3.folders(uri))
    with _said(uri):
        return sorted(path.name for path in _local(uri).iterdir() if path.is_dir())


def remove(uri: str) -> None:
    """Delete the object; one that is not there is no error."""
    if _remote(uri):
        s3.remove(uri)
        return
    with _said(uri):
        _local(uri).unlink(missing_ok=True)


def check(uri: str, missing: str | None = "check the address, or publish the dataset there first") -> None:
    """Before anything costly starts: is the store there, may this process read it, is anything under the prefix? A store that is away costs
    seconds (`s3.check`).

    `missing`: what to do next where nothing is; None: nothing need be there yet.
    """
    if _remote(uri):
        s3.check(uri, missing)
    elif not _local(uri).exists():
        if missing:
            raise ObjectMissing(f"There is no file or folder {uri}; {missing}.")
    elif not os.access(_local(uri), os.R_OK):
        raise StorageRefused(f"This user may not read {uri}; change its permissions.")


def _below(top: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Files at any depth; links to folders are followed, but not in a circle. `above`: the real folders on the way here."""
    real = top.resolve()
    if real in above:
        return
    for path in top.iterdir():
        if path.is_dir():
            yield from _below(path, above | {real})
        else:
            yield path


class _LocalBody:
    """A file's bytes, with the manners of `s3_bodies.Body`."""

    def __init__(self, uri: str, etag: str | None) -> None:
        self.uri = uri
        self.offset = 0
        self.etag = etag

    def read_into(self, sink: Callable[[bytes], Any]) -> None:
        with _said(self.uri), _local(self.uri).open("rb") as file:
            found = _etag(os.fstat(file.fileno()))
            if self.etag not in {None, found}:
                raise ObjectExists(f"{self.uri} has changed.")
            self.etag = found
            while piece := file.read(CHUNK):
                sink(piece)
                self.offset += len(piece)


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"


def _remote(uri: str) -> bool:
    return uri.startswith("s3://") and uri[5:6] not in ("", "/")  # a bucket, or it is no address


def _local(uri: str) -> Path:
    path = Path(uri.removeprefix("file://"))
    if not path.is_absolute():
        raise _no_address(uri)
    return path


def _no_address(text: str) -> StorageError:
    found = SCHEME.match(text)
    rest = text[found.end() :] if found else ""
    meant = f" (did you mean {'file:///' if found[1].lower() == 'file' else 's3://'}{rest}?)" if found and rest else ""
    return StorageError(f"{text!r} is no address{meant}; write s3://bucket/key, file:///path or an absolute path.")


def _temporary(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=".stockpot-", dir=path.parent)
    os.close(handle)
    return Path(name)


@contextmanager
def _written(uri: str, create: bool) -> Iterator[Path]:
    path = _local(uri)
    with _said(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            if create:
                os.link(temporary, path)
            else:
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _said(uri: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ObjectMissing(f"There is no file {uri}; check the address, or publish it first.") from error
    except FileExistsError as error:
        raise ObjectExists(f"{uri} exists already: another writer was first.") from error
    except PermissionError as error:
        raise StorageRefused(f"This user may not use {uri} ({error.strerror}); change its permissions.") from error
    except OSError as error:
        raise StorageError(f"{uri}: {error.strerror or error} (disk full, or not a usable file system).") from error
