"""What the local stack runs: command lines, environments and health. Every address is on 127.0.0.1."""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stockpot.devices import gpu_count

ROOT = Path(__file__).resolve().parents[2]
"""Where flows and tasks are imported from: the working directory of every flow run."""
BUCKETS = ("stockpot", "mlflow")
POOLS = ("control", "gpu")
WITHOUT_GPU = 2
"""Trials at a time on a node without a GPU."""


@dataclass(frozen=True)
class Component:
    """One supervised process."""

    name: str
    argv: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)
    restarted: bool = False
    """Started again when it dies. Workers hold no state; a server that dies is reported, for its state may be why."""
    sockets: tuple[str, ...] = ()
    """Files it leaves outside the state directory when it is killed."""


def homes(state: Path) -> dict[str, str]:
    """Where Prefect and the node cache keep things: with the stack, so that nothing is written outside its state directory."""
    return {"PREFECT_HOME": str(state / "prefect"), "XDG_CACHE_HOME": str(state / "cache")}


def endpoints(ports: dict[str, int], key: str, secret: str) -> dict[str, str]:
    """The standard environment names by which any process finds the stack."""
    return {
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['mlflow']}",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        **_no_proxy(),
    }


def health_urls(environ: dict[str, str]) -> dict[str, str]:
    """Server to the address that answers 2xx once it is ready."""
    return {
        "seaweedfs": f"{environ['AWS_ENDPOINT_URL']}/healthz",
        "mlflow": f"{environ['MLFLOW_TRACKING_URI']}/health",
        "prefect": f"{environ['PREFECT_API_URL']}/health",
    }


def has_buckets(environ: dict[str, str]) -> bool:
    """Create the buckets; False while the store cannot."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=environ["AWS_ENDPOINT_URL"],
        aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
        region_name=environ["AWS_DEFAULT_REGION"],
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10, proxies={}),
    )
    try:
        there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for bucket in BUCKETS:
            if bucket not in there:
                client.create_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError):
        return False
    return True


def pool_template() -> dict[str, Any]:
    """The ready-made job template of a process pool, with this repository as the working directory of its flow runs."""
    template: dict[str, Any] = json.loads((ROOT / "deployments" / "pools" / "process.json").read_text())
    template["variables"]["properties"]["working_dir"]["default"] = str(ROOT)
    return template


def surroundings() -> dict[str, str]:
    """This process's environment less what would lead a component to other servers, or keep it from caching bytecode."""
    foreign = ("PREFECT_", "MLFLOW_", "_MLFLOW_", "AWS_", "UVICORN_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1"}


def object_store(state: Path, ports: dict[str, int]) -> Component:
    """SeaweedFS in one process: master, volume server, filer and S3 gateway.

    Many small volumes, because every bucket grows its own set; a short election, because a lone master otherwise waits
    15 s for peers after a restart; no bucket is made by writing to it, as on any other S3.
    """
    home = state / "seaweedfs"
    home.mkdir(exist_ok=True)
    options = {
        "dir": home,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.port": ports["master"],
        "master.port.grpc": ports["master_grpc"],
        "master.volumeSizeLimitMB": 256,
        "master.raftHashicorp": "true",
        "master.electionTimeout": "500ms",
        "master.telemetry": "false",
        "volume.port": ports["volume"],
        "volume.port.grpc": ports["volume_grpc"],
        "volume.max": 400,
        "volume.preStopSeconds": 0,
        "filer": "true",
        "filer.port": ports["filer"],
        "filer.port.grpc": ports["filer_grpc"],
        "s3": "true",
        "s3.port": ports["s3"],
        "s3.port.grpc": ports["s3_grpc"],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.config": state / "s3.json",
        "s3.autoCreateBucket": "false",
    }
    return Component(
        name="seaweedfs",
        argv=(_program("weed"), "server", *(f"-{name}={value}" for name, value in options.items())),
        sockets=tuple(f"/tmp/seaweedfs-{name.removesuffix('_grpc')}-grpc-{port}.sock" for name, port in ports.items() if "grpc" in name)  # noqa: S108
        + tuple(f"/tmp/seaweedfs-{name}-{ports[name]}.sock" for name in ("filer", "s3")),  # noqa: S108
    )


def mlflow_server(state: Path, ports: dict[str, int], s3: dict[str, str]) -> Component:
    """Tracking server and registry on SQLite; artifacts go through it to the object store, so that clients need no S3 keys for them."""
    home = state / "mlflow"
    home.mkdir(exist_ok=True)
    return Component(
        name="mlflow",
        argv=(
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(ports["mlflow"]), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}", "--artifacts-destination", "s3://mlflow/artifacts",
        ),
        environ={
            **s3,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PYTHONWARNINGS": "ignore",
        },
    )  # fmt: skip


def prefect_server(state: Path, ports: dict[str, int]) -> Component:
    """API, pages and services in one process, on SQLite."""
    port = str(ports["prefect"])
    return Component(
        name="prefect",
        argv=(sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port),
        environ={
            **homes(state),
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_SERVER_API_PORT": port,
            "PREFECT_UI_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # SQLite has one writer: wait for it rather than fail a request.
            "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
            # Children of a cancelled parent that its own hook missed are cancelled within this time.
            "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "5",
            # A trial that waits for a slot is not late; marking all that wait also makes SQLite refuse other writers.
            "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "600",
        },
    )


def worker(pool: str, limit: int | None, state: Path, shared: dict[str, str]) -> Component:
    """A Prefect process worker of one pool."""
    limits = ("--limit", str(limit)) if limit else ()
    return Component(
        name=f"worker-{pool}",
        argv=(
            sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", f"{pool}-local",
            "--install-policy", "never", *limits,
        ),
        environ={
            **shared,
            **homes(state),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_WORKER_PREFETCH_SECONDS": "2",
            "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "5",
            "PREFECT_LOGGING_EXTRA_LOGGERS": "stockpot",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SYSTEM_METRICS_NODE_ID": f"{pool}-local",
            "GIT_PYTHON_REFRESH": "quiet",
            **({} if gpu_count() else {"OMP_NUM_THREADS": "1"}),
        },
        restarted=True,
    )  # fmt: skip


def trials_at_once() -> int:
    """Limit of the `gpu` worker: one trial a GPU, or a few on the processor."""
    return gpu_count() or WITHOUT_GPU


def _program(name: str) -> str:
    """A program that a dependency installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def _no_proxy() -> dict[str, str]:
    """Keep a configured proxy away from the loopback address."""
    proxied = [name for name in os.environ if name.lower() in {"http_proxy", "https_proxy", "all_proxy"}]
    if not proxied:
        return {}
    hosts = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}
