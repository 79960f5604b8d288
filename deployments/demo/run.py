"""The demo, start to end on real parts: stack, data, base model, eight trials, soup, gate, and a stranger that loads the champion.

The setting is deliberately weak (noisy captions, few images, constant learning rate): it shows the mechanism, not the paper's
claim on annealed CLIP models. The cosine control beside the result comes from `control.json`, which `make control` recomputes.
If the soup does not beat the best single model, the demo says so.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deployments.demo.serving import serving
from deployments.deploying import ROOT, deploy_all
from deployments.local.state import Lock
from deployments.stack import local_stack, running_environ
from deployments.starting import start, watch_to_end
from deployments.tables import comparison, version_line
from stockpot.config import BaseSpec, DataSpec, RetrainRequest
from stockpot.errors import StockpotError
from stockpot.outcomes import ModelVersion, SoupReport

STATE = Path(".stockpot")
BUCKET = "s3://stockpot"
TEMPLATE = ROOT / "deployments" / "requests" / "digits.yaml"
CAVEAT = """One seed is an illustration: with 497 test images one model's standard error is about 0.9 points. The base was weakened on
purpose (noisy captions, 300 images) and the learning rate is constant, so most of the gain is averaging in place of annealing."""
CONTROL = ROOT / "deployments" / "demo" / "control.json"


def run_demo(*, seed: int, fresh: bool, keep: bool) -> None:
    """Run everything, print the comparison and write `.stockpot/demo.json`. Safe to kill at any moment and to start again."""
    began, seconds = time.monotonic(), dict[str, float]()
    with ExitStack() as open_things:
        with _timed(seconds, "stack", "Starting Prefect, MLflow, SeaweedFS and two workers"):
            addresses, check = _enter_stack(open_things, fresh, keep)
        with _timed(seconds, "data", "Publishing the digits as snapshots"):
            uris = _publish(seed)
        with _timed(seconds, "base", "Pre-training the tiny CLIP and deploying the flows"):
            config, weights = _prepare(uris, seed)
        request = demo_request(uris, config, weights, seed)
        with _timed(seconds, "sweep", f"Retraining: {request.sweep.trials} trials, two at a time, then the soup"):
            parameters = {"request": request.model_dump(mode="json")}
            sweep_id = watch_to_end(
                start("retrain/stockpot", parameters, name=f"retrain-{request.model}", tags=["demo", f"model:{request.model}"]), check
            )
        report, version = _results(sweep_id)
        seconds["soup"] = report.seconds
        seconds["sweep"] -= report.seconds
        with _timed(seconds, "consumer", "A fresh process without this repository loads the champion"):
            told = [_stranger(version, report, uris["test"], seed)]
        with _timed(seconds, "record", "The version is explained, rebuilt from its ingredients, and served over HTTP"):
            told += _use(version)
        seconds["total"] = time.monotonic() - began
        _write(report, version, seconds, request.sweep.trials)
        _tell(report, version, told, addresses, seconds, keep)


def demo_request(uris: dict[str, Any], config: str, weights: str, seed: int) -> RetrainRequest:
    """The ready-made request `deployments/requests/digits.yaml` with this run's snapshots and base model filled in."""
    from deployments.reading import read_request

    request = read_request(TEMPLATE)
    return request.model_copy(
        update={
            "data": DataSpec(snapshot=uris["snapshot"], test=uris["test"], shifts=uris["shifts"]),
            "base": BaseSpec(arch=config, weights=weights),
            "sweep": request.sweep.model_copy(update={"seed": seed}),
        }
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    print(f"{what} ...", flush=True)
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
    print(f"    {seconds[name]:.1f} s", flush=True)


def _enter_stack(open_things: ExitStack, fresh: bool, keep: bool) -> tuple[dict[str, str], Callable[[], None]]:
    """The stack's UI addresses, and what raises when one of its servers has died. A stack that is already up is used and left alone."""
    from deployments.stack import start_detached

    def check() -> None:
        """Another process supervises that stack."""

    if environ := running_environ(STATE):
        if fresh:
            raise StockpotError(f"A stack is up on {STATE}, so its state cannot be forgotten; end it with `stockpot stack down` first.")
    else:
        if fresh and STATE.exists():
            _forget()
        if keep:
            environ = start_detached(STATE)
        else:
            stack = open_things.enter_context(local_stack(STATE))
            environ, check = stack.environ, stack.check
    os.environ.update(environ)
    return {"Prefect": environ["PREFECT_API_URL"].removesuffix("/api"), "MLflow": environ["MLFLOW_TRACKING_URI"]}, check


def _forget() -> None:
    """Delete what earlier stacks left, holding the stack's lock: one that is just starting must not lose its files."""
    lock = Lock(STATE)
    for path in STATE.iterdir():
        if path.name != "stack.lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lock.release()


def _publish(seed: int) -> dict[str, Any]:
    from deployments.demo.digits import publish_digits

    return publish_digits(f"{BUCKET}/digits-{seed}", seed)


def _prepare(uris: dict[str, Any], seed: int) -> tuple[str, str]:
    """Pre-train in a child process while the flows are deployed. Returns the URIs of the model config and its weights."""
    with ThreadPoolExecutor(1) as pool:
        deployed = pool.submit(deploy_all)
        config, weights = _child("deployments.demo.pretraining", uris["pretrain"], f"{BUCKET}/bases/digits-{seed}", str(seed)).split()[-2:]
        deployed.result()
    return config, weights


def _child(module: str, *arguments: str) -> str:
    """Standard output of `python -m module`. Raises `StockpotError` with its last lines."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StockpotError(f"{module} ended with {done.returncode}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    return done.stdout


def _results(sweep_id: str) -> tuple[SoupReport, ModelVersion]:
    from stockpot.ledger import registry, tracking

    report = tracking.read_report(sweep_id)
    version = registry.find_version(report.model, report.soup_sha256) if report else None
    if report is None or version is None:
        raise StockpotError(f"Sweep {sweep_id} ended without a registered soup; see `stockpot status {sweep_id}`.")
    return report, version


def _stranger(version: ModelVersion, report: SoupReport, test: str, seed: int) -> str:
    """Load by alias in a process that cannot import this repository, classify the test images' PNG bytes, and count the right labels."""
    from deployments.demo.digits import test_pictures

    folder = STATE / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, (png, label) in enumerate(test_pictures(seed)):
        (folder / f"{number:03d}-{label}.png").write_bytes(png)
        names.append(f"{number:03d}-{label}.png")
    address = f"models:/{version.model}@{version.alias}" if version.alias else f"models:/{version.model}/{version.version}"
    script = Path(__file__).with_name("stranger.py")
    command = [sys.executable, "-I", str(script), address, str(folder.resolve())]
    environ = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StockpotError(f"A fresh process could not load {address}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    answers = json.loads(done.stdout.splitlines()[-1])
    different = sum(answer != own for (_, answer), own in zip(answers, _own_answers(version, test), strict=True))
    correct, recorded = sum(label == answer for label, answer in answers), report.scores[report.recipe].test
    if different or recorded is None or correct != recorded.correct:
        raise StockpotError(
            f"The loaded version answers {different} of {len(names)} test images unlike the soup itself: they must be equal."
        )
    return f"A fresh process without this repository: {correct} of {len(names)} test images right, each answer as the soup's own."


def _use(version: ModelVersion) -> list[str]:
    """What anybody may do with a version: explain it, rebuild it from its ingredients, and ask `mlflow models serve` about a picture."""
    from stockpot.release import explaining

    folder, name = STATE / "demo", f"{version.model}/{version.version}"
    picture, explained = min(folder.glob("*.png")), folder / "explain.txt"
    with serving(f"models:/{name}", folder / "serve.log") as service:
        explained.write_text(f"{explaining.explain(name)}\n")
        rebuilt = explaining.reproduce(name)
        service.wait()
        answer = service.ask(picture.read_bytes())
    return [
        f"`stockpot explain {name}` tells where it comes from: {explained}.",
        f"`stockpot reproduce {name}` rebuilt it. {rebuilt.how}",
        f"`mlflow models serve -m models:/{name}` answers over HTTP: {picture.name} is {answer['label']} ({answer['probability']:.2f}).",
        f"`stockpot rollback {version.model}` makes the champion before it champion again, once there is one.",
    ]


def _own_answers(version: ModelVersion, test: str) -> list[str]:
    """The soup's own label for every test image, through Stockpot's reader and model instead of the registered file's."""
    from stockpot.checkpoints import load_weights
    from stockpot.data.shards import pixels
    from stockpot.data.snapshots import open_snapshot, pin
    from stockpot.evaluation import logits
    from stockpot.ledger import registry
    from stockpot.models.classifier import ModelConfig, build
    from stockpot.models.loading import load_state

    with TemporaryDirectory(prefix="stockpot-demo-") as folder:
        files = registry.fetch_version(version, Path(folder))
        config = ModelConfig.model_validate_json((files / "model.json").read_text())
        model = build(config)
        load_state(model, load_weights(files / "model.safetensors"))
    images = pixels(open_snapshot(pin(test)), "test", config.preprocess).images
    return [config.classes[label] for label in logits(model, images, config.preprocess, device="cpu").argmax(dim=1).tolist()]


def _write(report: SoupReport, version: ModelVersion, seconds: dict[str, float], trials: int) -> None:
    def row(name: str) -> dict[str, Any]:
        scores = report.scores[name]
        return {
            "held_out": scores.held_out.value,
            "test": scores.test.value if scores.test else None,
            "shifts": {suite: score.value for suite, score in scores.shifts.items()},
        }

    document = {
        "sweep_id": report.sweep_id,
        "trials": trials,
        "finished": len(report.trials),
        "best_single": row("best_single"),
        "uniform": row("uniform"),
        "soup": {**row(report.recipe), "ingredients": list(report.ingredients)},
        "model": version.model,
        "version": version.version,
        "alias": version.alias,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    (STATE / "demo.json").write_text(json.dumps(document, indent=2) + "\n")


def _tell(
    report: SoupReport, version: ModelVersion, told: list[str], addresses: dict[str, str], seconds: dict[str, float], keep: bool
) -> None:
    best, soup = report.scores["best_single"].test, report.scores[report.recipe].test
    assert best is not None
    assert soup is not None
    gain = 100 * (soup.value - best.value)
    verdict = "beats" if gain > 0 else "does NOT beat" if gain < 0 else "only equals"
    print(f"\n{comparison(report)}\n")
    print(
        f"The soup of {len(report.ingredients)} of {len(report.trials)} trials {verdict} the best single model on test: {gain:+.2f} points."
    )
    print(f"{CAVEAT}\n{_control_text()}")
    print("\n".join(["", version_line(version), *told]))
    pages = ", ".join(f"{name} {address}" for name, address in addresses.items())
    print(f"{pages}{'' if keep else ' (down now; `stockpot stack up` brings them back with everything in them)'}")
    print(f"{seconds['total']:.0f} s in all; figures in {STATE / 'demo.json'}.")


def _control_text() -> str:
    """The recorded table of all frozen seeds, a line per schedule."""
    table = json.loads(CONTROL.read_text())
    lines = [f"{len(table['seeds'])} recorded seeds (`make control` recomputes them), mean test accuracy in percent:"]
    for schedule, about in (("constant", "constant learning rate"), ("cosine", "cosine to zero")):
        mean = table["mean"][schedule]
        lines.append(f"    {about:24} best single {100 * mean['best_single']:.2f}   greedy soup {100 * mean['greedy']:.2f}")
    return "\n".join(lines)
