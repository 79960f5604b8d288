"""What a trial stands on: the local stack without workers, photos and an init in its store, and a sweep of trials open in its ledger."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_API_URL, temporary_settings

from benchmarks._photos import CLASSES, photos
from deployments.stack import local_stack
from stockpot import storage
from stockpot.config import BaseSpec, DataSpec, InitSpec, PinnedData, RetrainRequest, SweepSpec, Trial
from stockpot.data.publishing import GivenSamples, publish
from stockpot.ledger import tracking
from stockpot.settings import TrialSettings
from stockpot.sweeps import plan
from stockpot.training import inits

STORE = "s3://stockpot/store"
ARCH = f"{STORE}/arch.json"
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@contextmanager
def opened_trials(count: int, arch: dict[str, Any], settings: TrialSettings, images: int = 64) -> Iterator[tuple[Trial, ...]]:
    """Trials of an open sweep, on an image tower with random weights; the environment names the servers, all of it on loopback. Everything
    is removed at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="stockpot-bench-") as scratch,
        local_stack(Path(scratch) / "stack", workers=False) as stack,
        named(stack.environ | {"XDG_CACHE_HOME": f"{scratch}/cache", "TMPDIR": scratch}),
    ):
        storage.write_bytes(ARCH, json.dumps({"model_cfg": {**arch, "text_cfg": TEXT}}).encode())
        pinned = publish(f"{STORE}/photos", "photos", CLASSES, GivenSamples(list(photos(images))), splits="train")
        request = RetrainRequest(
            model="bench",
            store=STORE,
            data=DataSpec(snapshot=pinned.uri),
            base=BaseSpec(arch=ARCH),
            init=InitSpec(head="random"),
            sweep=SweepSpec(trials=count, settings=settings),
        )
        sweep = plan(request, PinnedData(snapshot=pinned), inits.prepare(request.base, request.init, pinned, STORE))
        tracking.open_sweep(sweep)
        yield sweep.trials


@contextmanager
def named(environ: dict[str, str]) -> Iterator[None]:
    """The servers in this process' environment, and in Prefect's settings, which it read when it was imported."""
    before = dict(os.environ)
    os.environ.update(environ)
    try:
        with temporary_settings({PREFECT_API_URL: environ["PREFECT_API_URL"]}):
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)
