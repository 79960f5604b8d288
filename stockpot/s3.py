"""The S3 half of `storage`: every call has a deadline, and every failure is one of `stockpot.errors` with endpoint, bucket and key in it.

Client: s3fs (fsspec), opened lazily in the process that uses it, so it survives fork and forkserver. Configured only by the standard
`AWS_*` environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_DEFAULT_REGION`, a profile or a role:
botocore's own order). Bodies are read by `stockpot.s3_bodies`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import fsspec.asyn
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound
from fsspec.exceptions import FSTimeoutError

from stockpot.errors import ObjectExists, ObjectMissing, ServerUnreachable, StorageError, StorageRefused

CONNECT_S, CALL_S = 4, 60
PART_BYTES, PARTS_AT_ONCE = 16 * 2**20, 4
SLOWEST_BYTES_PER_S = 2**17
"""An upload is given up when it takes longer than over a line of one megabit a second."""

# numbers only: an instance is made anew when the environment or the process changes
_ENVIRONMENT = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


class StoredObject(NamedTuple):
    """One object of a listing."""

    uri: str
    size: int
    etag: str


def filesystem() -> s3fs.S3FileSystem:
    """This process's client for the current `AWS_*` environment."""
    return _filesystem(os.getpid(), tuple(os.environ.get(name) for name in _ENVIRONMENT))


@lru_cache(maxsize=8)
def _filesystem(pid: int, environment: tuple[str | None, ...]) -> s3fs.S3FileSystem:
    del pid, environment  # the key only
    client = s3fs.S3FileSystem(
        config_kwargs={
            "connect_timeout": CONNECT_S,
            "read_timeout": 15,
            "retries": {"max_attempts": 1},
            "max_pool_connections": 32,
            "response_checksum_validation": "when_required",  # a CRC in Python; what must be intact is checked against its sha256
        },
        skip_instance_cache=True,
        use_listings_cache=False,
        max_concurrency=PARTS_AT_ONCE,
    )
    client.retries = 3
    return client


def split(uri: str) -> tuple[str, str]:
    """`s3://bucket/a/b` -> (`bucket`, `a/b`)."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def call(uri: str, method: str, timeout_s: float = CALL_S, **arguments: Any) -> Any:
    """One S3 operation on the object at `uri`, by boto's method name, within the deadline."""
    bucket, key = split(uri)
    place = {"Bucket": bucket} if method in ("list_objects_v2", "head_bucket") else {"Bucket": bucket, "Key": key}
    with said(uri, timeout_s):
        return filesystem().call_s3(method, timeout=timeout_s, **place, **arguments)


def write_bytes(uri: str, data: bytes, *, create: bool = False) -> None:
    """PUT; `create` asks the server to refuse if the object exists (If-None-Match), which decides races between writers."""
    condition: dict[str, Any] = {"IfNoneMatch": "*"} if create else {}
    call(uri, "put_object", Body=data, **condition)


def upload(path: Path, uri: str, *, create: bool = False) -> None:
    """PUT a file, in parts when large; at most 4 x 16 MiB are in memory. Nothing is visible before the last part."""
    deadline_s = CALL_S + path.stat().st_size / SLOWEST_BYTES_PER_S
    mode = "create" if create else "overwrite"
    with said(uri, deadline_s):
        filesystem().put_file(str(path), uri, mode=mode, chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE, timeout=deadline_s)


def size(uri: str) -> int | None:
    """Bytes of the object; None where there is none."""
    try:
        return int(call(uri, "head_object")["ContentLength"])
    except ObjectMissing:
        return None


def list_prefix(uri: str) -> Iterator[StoredObject]:
    """Every object whose key starts with the prefix, in key order. A missing bucket raises."""
    bucket, prefix = split(uri)
    for page in _pages(uri, Prefix=prefix):
        for item in page.get("Contents", ()):
            yield StoredObject(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))


def folders(uri: str) -> Iterator[str]:
    """Names between the address and the next slash, in order."""
    prefix = f"{split(uri)[1].rstrip('/')}/".lstrip("/")
    for page in _pages(uri, Prefix=prefix, Delimiter="/"):
        for item in page.get("CommonPrefixes", ()):
            yield item["Prefix"][len(prefix) :].rstrip("/")


def _pages(uri: str, **what: Any) -> Iterator[dict[str, Any]]:
    token: dict[str, Any] = {}
    while True:
        page = call(uri, "list_objects_v2", **what, **token)
        yield page
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def remove(uri: str) -> None:
    """Delete the object; one that is not there is no error."""
    call(uri, "delete_object")


def check(uri: str, missing: str | None = None, timeout_s: float = 4.0) -> None:
    """Does the endpoint answer, are the credentials accepted, is there a bucket, and anything under the prefix? The store has `timeout_s`
    to say so, once this process has a client.

    `missing` as in `storage.check`.
    """
    client = filesystem()
    bucket, prefix = split(uri)
    with said(uri, CALL_S):  # making a client is this machine's own work, seconds of it where it is busy, and none of the store's
        fsspec.asyn.sync(client.loop, client.set_session, timeout=CALL_S)
    retries, client.retries = client.retries, 1
    try:
        with said(uri, timeout_s):
            page = client.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1, timeout=timeout_s)
    finally:
        client.retries = retries
    if missing and prefix and not page.get("KeyCount", len(page.get("Contents", ()))):
        raise ObjectMissing(f"Nothing is stored under {uri} ({where()}); {missing}.")


@contextmanager
def said(uri: str, timeout_s: float) -> Iterator[None]:
    """Turn what s3fs, botocore, aiohttp and asyncio raise into the error family, with address, endpoint and key id."""
    bucket, key = split(uri)
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        missing = "NoSuchBucket" in str(error.__cause__ or error) or not key
        what, how = (f"There is no bucket `{bucket}`", "create") if missing else (f"There is no object {uri}", "publish")
        raise ObjectMissing(f"{what} ({where()}); check the address, or {how} it first.") from error
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise StorageRefused(
            f"No key for {uri} is known, so nothing was asked of S3 ({_credentials()}, {where()}): {_reason(error)}. Set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; or start a local stack, whose key every command finds (stockpot stack up)."
        ) from error
    except PermissionError as error:
        raise StorageRefused(
            f"S3 refused access to {uri} ({_credentials()}, {where()}): {_reason(error)}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "to a key that may use this bucket; a local stack's own key is found by every command while it is up (stockpot stack up)."
        ) from error
    except (FileExistsError, ClientError, OSError) as error:
        code = _code(error)
        if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
            raise ObjectExists(f"{uri} was written by another process meanwhile ({where()}); read it again, or write elsewhere.") from error
        if isinstance(error, (FSTimeoutError, TimeoutError)) or not code:
            raise ServerUnreachable(_unreachable(error, timeout_s)) from error
        raise StorageError(f"S3 answered {code} for {uri} ({where()}): {_reason(error)}") from error
    except BotoCoreError as error:
        raise ServerUnreachable(_unreachable(error, timeout_s)) from error


def _unreachable(error: BaseException, timeout_s: float) -> str:
    reason = _reason(error) if str(error) else f"no answer within {timeout_s:g} s"
    return f"The object store does not answer ({where()}): {reason}. Start it, or correct AWS_ENDPOINT_URL."


def _code(error: BaseException) -> str:
    answered = error if isinstance(error, ClientError) else error.__cause__
    return str(answered.response.get("Error", {}).get("Code", "")) if isinstance(answered, ClientError) else ""


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def where() -> str:
    return f"endpoint {os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL') or 'of AWS'}"


def _credentials() -> str:
    key = os.environ.get("AWS_ACCESS_KEY_ID")
    if key:
        return f"key id ...{key[-4:]} from the environment"
    return f"profile {os.environ['AWS_PROFILE']}" if os.environ.get("AWS_PROFILE") else "no key in the environment"
