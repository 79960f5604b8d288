"""A whole sweep in seconds: three colours to tell apart, a CLIP tower of a few thousand weights (or another model), and trials that are the
init plus noise, written straight into the ledger as `run_trial` would."""

import copy
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stockpot.checkpoints import save_weights
from stockpot.config import BaseSpec, DataSpec, Init, InitSpec, PinnedData, PinnedSnapshot, RetrainRequest, SoupSpec, Sweep, SweepSpec
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.data.splits import SplitSpec
from stockpot.digests import digest
from stockpot.evaluation import accuracy, features, logits
from stockpot.fields import Closed
from stockpot.ledger import recording, tracking
from stockpot.ledger.recording import Made
from stockpot.ledger.trial_log import TrialLog
from stockpot.models.bodies import body_digest
from stockpot.models.classifier import Classifier, ModelConfig, build
from stockpot.models.folders import write_model
from stockpot.models.loading import load_state
from stockpot.outcomes import Ingredient
from stockpot.preparation import Preprocess
from stockpot.settings import TrialSettings
from stockpot.sweeps import plan
from stockpot.training.probing import linear_probe

CLASSES = ("red", "green", "blue")
PREPROCESS = Preprocess(size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
ARCH = {"embed_dim": 8, "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}, "quick_gelu": False}


CLIP = ModelConfig(kind="open_clip", arch=ARCH, preprocess=PREPROCESS, classes=CLASSES)


class Ground(Closed):
    """What a sweep stands on: data and an init."""

    data: PinnedData
    init: Init
    folder: str
    config: ModelConfig = CLIP


def png(seed: int, label: int, noise: float = 90.0) -> bytes:
    """A 20 x 18 picture, mostly of one colour."""
    rng = np.random.default_rng(seed)
    image = rng.normal(110, noise, (20, 18, 3))
    image[..., label] += 30
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "png")
    return file.getvalue()


def norm_tower() -> nn.Sequential:
    """An image tower with BatchNorm, and dropout, which an evaluation must not see."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(8),
    )


NORM = ModelConfig(kind="imported", arch={"name": "tests.tiny_sweep:norm_tower", "features": 8}, preprocess=PREPROCESS, classes=CLASSES)


def lay_ground(folder: Path) -> Ground:
    """Publish the snapshots and build the init under `folder`."""

    def put(name: str, count: int, first: int, splits: SplitSpec | str, noise: float = 90.0) -> PinnedSnapshot:
        samples = [Sample(f"{name}-{number}", png(first + number, number % 3, noise), number % 3) for number in range(count)]
        return publish(f"{folder}/{name}", name, CLASSES, GivenSamples(samples), splits=splits)

    data = PinnedData(
        snapshot=put("colours", 150, 0, SplitSpec(held_out=60, gate=30, salt="tiny")),
        test=put("colours-test", 30, 1000, "test"),
        shifts={"noisy": put("colours-noisy", 30, 2000, "test", 130.0)},
    )
    return Ground(data=data, init=_store_init(data, CLIP, folder / "init"), folder=str(folder))


def on_ground(ground: Ground, config: ModelConfig, folder: Path) -> Ground:
    """The same data under another model, whose init is put into `folder`."""
    return Ground(data=ground.data, init=_store_init(ground.data, config, folder), folder=str(folder), config=config)


def _store_init(data: PinnedData, config: ModelConfig, folder: Path) -> Init:
    model = _init(data.snapshot, config)
    body = body_digest(model) if config.frozen_head else ""
    return Init(uri=str(folder), digest=digest([write_model(folder, model), config]), body=body)


def tiny_sweep(
    ground: Ground,
    model: str,
    trials: int = 5,
    soup: SoupSpec | None = None,
    *,
    settings: TrialSettings | None = None,
    store: str | None = None,
) -> Sweep:
    """A planned sweep, opened in the ledger."""
    uri = ground.data.snapshot.uri
    request = RetrainRequest(
        model=model,
        store=store or ground.folder,
        data=DataSpec(snapshot=uri),
        base=BaseSpec(arch="own"),
        init=InitSpec(freeze_head=ground.config.frozen_head),
        sweep=SweepSpec(trials=trials, settings=settings or TrialSettings()),
        soup=soup or SoupSpec(),
    )
    sweep = plan(request, ground.data, ground.init)
    tracking.open_sweep(sweep)
    return sweep


def finish_trials(ground: Ground, sweep: Sweep, folder: Path, noise: float = 0.05, only: Sequence[int] | None = None) -> list[Ingredient]:
    """Record an ingredient for every trial (or `only` some): the init with Gaussian noise on every weight."""
    return [finish_trial(ground, sweep, index, folder, noise) for index in (only if only is not None else range(len(sweep.trials)))]


def finish_trial(
    ground: Ground, sweep: Sweep, index: int, folder: Path, noise: float = 0.05, state: dict[str, Tensor] | None = None
) -> Ingredient:
    """One ingredient; `state` instead of noise where given. A frozen head gets no noise."""
    model, config = _init(sweep.data.snapshot, ground.config), ground.config
    rng = torch.Generator().manual_seed(index + 1)
    noises = {name: noise * torch.randn(tensor.shape, generator=rng) for name, tensor in model.state_dict().items()}
    still = "head." if config.frozen_head else "nothing"
    load_state(
        model,
        state or {name: tensor if name.startswith(still) else tensor + noises[name] for name, tensor in model.state_dict().items()},
    )
    held_out = pixels(open_snapshot(sweep.data.snapshot), "held_out", config.preprocess)
    logits_NC = logits(model, held_out.images, config.preprocess)
    place = folder / f"trial-{index}"
    sha256 = write_model(place, model)
    save_weights(place / "held_out.safetensors", {"logits": logits_NC, "labels": torch.as_tensor(held_out.labels)})
    (place / "card.json").write_text("{}")
    with TrialLog(sweep.trials[index], claim=1) as log:
        return record_ingredient(log, Made(place, sha256, accuracy(logits_NC, held_out.labels), held_out.transform_digest, seconds=1.0))


def record_ingredient(log: TrialLog, made: Made) -> Ingredient:
    """Store what a trial made and publish it at once, as if nobody else could be running it."""
    ingredient = recording.store(log.trial, log.mlflow_run_id, made)
    recording.publish(log.trial, ingredient)
    return ingredient


def _init(snapshot: PinnedSnapshot, config: ModelConfig) -> Classifier:
    """A random tower under a fitted head, the same every time; fitted once."""
    return copy.deepcopy(_fitted(snapshot, config.model_dump_json()))


@cache
def _fitted(snapshot: PinnedSnapshot, config: str) -> Classifier:
    torch.manual_seed(0)
    model = build(ModelConfig.model_validate_json(config))
    train = pixels(open_snapshot(snapshot), "train", PREPROCESS)
    head = linear_probe(
        features(model, train.images, PREPROCESS).numpy(), np.asarray(train.labels), model.head.weight.detach(), model.head.bias.detach()
    )
    model.head.load_state_dict(dict(zip(("weight", "bias"), head, strict=True)))
    return model
