"""What the gate looks at: champion and challenger, each prepared as its own config says, on samples nothing was selected on, and timed in
turn in one process. `judging` decides from it.
"""

import time
from pathlib import Path

import torch
from torch import Tensor

from stockpot.config import GateSpec, PinnedSnapshot, Sweep
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot
from stockpot.errors import ModelError
from stockpot.evaluation import accuracy, logits, right
from stockpot.fields import Metric
from stockpot.models.classifier import ModelConfig
from stockpot.models.folders import probes, read_model
from stockpot.outcomes import ModelVersion
from stockpot.release.judging import Answers, Contender, Evidence, Side, incomparable
from stockpot.soup.statistics import calibration_error

PAIRS = 15
"""Paired timings of one image; their median shrugs off a busy moment."""

# N samples, C classes


def gather_evidence(sweep: Sweep, versions: dict[Side, ModelVersion], folders: dict[Side, Path], spec: GateSpec) -> Evidence:
    """Score and time the versions whose files lie in `folders`; a missing or incomparable champion is only named.

    Raises `ModelError` when one of the two is no longer what was stored.
    """
    contenders = {side: _contender(version, folders[side]) for side, version in versions.items()}
    challenger, champion = contenders["challenger"], contenders.get("champion")
    if champion is None or incomparable(champion, challenger):
        return Evidence(spec=spec, challenger=challenger, champion=champion)
    tasters = {side: _Taster(version, folders[side]) for side, version in versions.items()}
    metric = sweep.request.soup.metric
    gate = {side: one.logits(sweep.data.snapshot, "gate") for side, one in tasters.items()}
    return Evidence(
        spec=spec,
        challenger=challenger,
        champion=champion,
        gate=_answers(sweep.data.snapshot, "gate", gate, metric),
        shifts={
            name: _answers(pinned, "test", {side: one.logits(pinned, "test") for side, one in tasters.items()}, metric)
            for name, pinned in sweep.data.shifts.items()
        },
        calibration_error={side: calibration_error(*answer) for side, answer in gate.items()},
        seconds_per_image=_time_in_turn(tasters),
    )


class _Taster:
    """One version, loaded. Raises `ModelError` naming it when it cannot be, or answers otherwise than when it was stored."""

    def __init__(self, version: ModelVersion, folder: Path) -> None:
        try:
            self._model = read_model(folder)
        except ModelError as error:
            raise ModelError(
                f"The gate cannot use version {version.version} of {version.model}: {error} If that is the champion, make another one "
                f"champion with `stockpot promote {version.model} --version N`."
            ) from error
        self._config = self._model.config
        self._device = "cuda" if torch.cuda.is_available() else "cpu"

    def logits(self, pinned: PinnedSnapshot, split: str) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and labels (N,)."""
        seen = pixels(open_snapshot(pinned), split, self._config.preprocess)
        return logits(self._model, seen.images, self._config.preprocess, device=self._device), torch.as_tensor(seen.labels)

    @torch.inference_mode()
    def seconds(self) -> float:
        """One input through the model, device time included."""
        input_1 = probes(self._config.preprocess)[:1].to(self._device)
        self._model.to(self._device).eval()
        began = time.perf_counter()
        self._model(input_1).cpu()
        return time.perf_counter() - began


def _time_in_turn(tasters: dict[Side, _Taster]) -> tuple[tuple[float, float], ...]:
    """Champion's and challenger's seconds, after a warm-up; who goes first alternates."""
    pairs = []
    for number in range(-3, PAIRS):
        order: tuple[Side, Side] = ("champion", "challenger") if number % 2 else ("challenger", "champion")
        took = {side: tasters[side].seconds() for side in order}
        if number >= 0:
            pairs.append((took["champion"], took["challenger"]))
    return tuple(pairs)


def _contender(version: ModelVersion, folder: Path) -> Contender:
    config = _config(folder)
    return Contender(
        version=version.version,
        weights_sha256=version.soup_sha256,
        weights_bytes=(folder / "model.safetensors").stat().st_size,
        classes=config.classes,
        preprocess=config.preprocess,
    )


def _config(folder: Path) -> ModelConfig:
    return ModelConfig.model_validate_json((folder / "model.json").read_bytes())


def _answers(pinned: PinnedSnapshot, split: str, sides: dict[Side, tuple[Tensor, Tensor]], metric: Metric) -> Answers:
    told = {side: "".join("1" if one else "0" for one in right(*answer).tolist()) for side, answer in sides.items()}
    measured = {side: other for side, answer in sides.items() if (other := accuracy(*answer, metric).other) is not None}
    return Answers(snapshot_digest=pinned.digest, split=split, champion=told["champion"], challenger=told["challenger"], measured=measured)
