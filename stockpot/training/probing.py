"""The linear probe: the head that fits the base model's features of the train split best, which most of the paper's sweeps start from.

Features are computed once a node for (snapshot, body, transform) and kept (`data.feature_store`), so that another head over the same base
costs no forward pass. A GPU and a CPU round differently; what either computed is taken by the other, also where one goes on with what the
other began. The fit is strictly convex and solved until its slope vanishes, in float64: no seed and no step count decides it.

A GPU is held while features are computed, and the same again while the head is fitted; who waits for another's features holds none.

Memory, whatever the number of samples: `ROOM` bytes for those that are looked at together, and in float64 some `2 * HISTORY + 6` heads.
Features are memory-mapped: the system takes their pages back when it needs them. For 1.2 million samples of 768 features and 1000 classes
that is 0.27 GB and 0.28 GB, beside 3.7 GB on disk.
"""

# N samples, B batch, C classes, D features

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from stockpot.data.feature_store import PIECE, Piece, Rows, stored_rows
from stockpot.data.preparing import DECODERS
from stockpot.data.shards import Reading, TrainReader, transform_digest
from stockpot.data.skipping import may_skip
from stockpot.data.snapshots import Snapshot
from stockpot.devices import claimed_gpus
from stockpot.digests import short
from stockpot.errors import DeviceBusy, ModelError, SkipBudgetExceeded
from stockpot.evaluation import features
from stockpot.models.bodies import body_digest
from stockpot.models.classifier import Classifier
from stockpot.models.folders import probes

PROBE_SD = 10.0
"""Standard deviation of the Gaussian prior around the starting head, which makes the probe's optimum unique where classes are separable.
Wide: a CLIP head's rows are 14 to 100 long, over 64 to 1024 features. Features are of unit length, by nature or in the mean square."""
GRADIENT = 1e-7
"""Largest slope of the mean loss at the probe's optimum: when it is reached, the probe has converged."""
ROUNDS = 10
"""A probe that has not converged after so many thousand iterations of L-BFGS is refused."""
HISTORY = 20
"""Steps that L-BFGS remembers, each by two heads."""
ROOM = 2**28
"""Bytes for the samples that are looked at together: features, logits and what their gradient takes."""
BATCH = 256
"""Samples of a forward pass. Every pass has as many, the last one too, so that a sample's features do not depend on how many are left."""
IGNORED = -100
"""The label of a row that no sample stands behind."""
TELL_EVERY_S = 30.0

Say = Callable[[str], None]
logger = logging.getLogger(__name__)


def probed(
    model: Classifier,
    snapshot: Snapshot,
    weight_CD: Tensor,
    bias_C: Tensor,
    *,
    loader_workers: int = 0,
    skip_fraction: float = 0.0,
    reading: Reading = "auto",
    say: Say = logger.info,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the probe over the model's body, started from a head. How train is read is said as for a trial.

    Raises `SkipBudgetExceeded` for too many unreadable samples, `ModelError` for features that are no numbers and a probe that does not
    converge.
    """
    first, samples = snapshot.first("train"), snapshot.counts["train"]
    read = partial(
        TrainReader, snapshot, preprocess=model.config.preprocess, augment=None, batch_size=min(BATCH, samples), seed=0, shuffled=False,
        loader_workers=loader_workers, skip_fraction=skip_fraction, reading=reading, say=say,
    )  # fmt: skip
    rows_ND, unreadable = _features(model, snapshot, read, say)
    _require_readable(len(unreadable), samples, skip_fraction)
    labels_N = snapshot.index.rows["label"][first : first + samples].astype(np.int64)
    labels_N[unreadable] = IGNORED
    length = _mean_length(rows_ND, samples - len(unreadable))
    unit = 1.0 if model.config.kind == "open_clip" else length
    with _own_device(say) as device:
        return linear_probe(rows_ND, labels_N, weight_CD, bias_C, unit=unit, device=device, say=say)


def linear_probe(
    features_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    weight_CD: Tensor,
    bias_C: Tensor,
    *,
    unit: float = 1.0,
    rows: int | None = None,
    device: str = "cpu",
    say: Say = logger.info,
) -> tuple[Tensor, Tensor]:
    """The most probable head under a Gaussian prior, `PROBE_SD` wide, around the head it starts from, both for features divided by `unit`.

    Strictly convex, solved by L-BFGS in float64 until no slope is above `GRADIENT`. `rows`: how many samples are looked at together, None
    for what `ROOM` takes. Raises `ModelError` where it does not converge.
    """
    classes, width = weight_CD.shape
    step = rows or max(1, ROOM // (12 * width + 32 * classes))  # read as float32, taken as float64
    start_CD = torch.cat([weight_CD * unit, bias_C[:, None]], dim=1).double().to(device)
    head_CD = start_CD.clone().requires_grad_()
    labels = torch.as_tensor(labels_N).to(device)
    count = int((labels != IGNORED).sum())
    search: torch.optim.Optimizer = torch.optim.LBFGS(
        [head_CD], max_iter=1000, history_size=HISTORY, tolerance_grad=GRADIENT, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    tell, looks = _now_and_then(say), 0

    def added(low: int) -> Tensor:  # a function, so that one part is gone before the next is made
        part_BD = torch.from_numpy(np.array(features_ND[low : low + step])).to(device).double()
        logits_BC = functional.linear(part_BD, head_CD[:, :-1] / unit, head_CD[:, -1])
        loss = functional.cross_entropy(logits_BC, labels[low : low + step], ignore_index=IGNORED, reduction="sum") / count
        torch.autograd.backward(loss)
        return loss.detach()

    def closure() -> float:
        nonlocal looks
        search.zero_grad()
        loss = (head_CD - start_CD).square().sum() / (2 * PROBE_SD**2 * count)
        torch.autograd.backward(loss)
        for low in range(0, len(labels), step):
            loss = loss.detach() + added(low)
        looks += 1
        tell(f"linear probe: mean loss {float(loss):.6f}, slope {_slope(head_CD):.1e} of {GRADIENT:.0e}, after {looks} looks at train")
        return float(loss)

    for _ in range(ROUNDS):
        search.step(closure)
        closure()  # the search may have left the slope of a point it did not take
        if (slope := _slope(head_CD)) <= GRADIENT:
            break
    else:
        raise ModelError(
            f"The linear probe's slope is {slope:.1e} after {ROUNDS * 1000:,} iterations, needed is {GRADIENT:.0e}: the base model's "
            "features are no fit numbers; look at its preprocessing, or ask for another head."
        )
    say(f"linear probe: converged after {looks} looks at train, slope {slope:.1e}")
    found = head_CD.detach().cpu()
    return (found[:, :-1] / unit).float().contiguous(), found[:, -1].float().contiguous()


def _slope(head_CD: Tensor) -> float:
    return float(head_CD.grad.abs().max()) if head_CD.grad is not None else 0.0


def _features(model: Classifier, snapshot: Snapshot, read: Callable[[], TrainReader], say: Say) -> Rows:
    """The features of train, those of this node where it has them. What the body says on the CPU to fixed inputs tells whether it has them:
    it changes with whatever changes the numbers on this node, be it a weight, a library or how many threads compute."""
    preprocess = model.config.preprocess
    told = hashlib.sha256(features(model, probes(preprocess), preprocess).numpy().tobytes()).hexdigest()
    decided_by = [snapshot.digest, "train", body_digest(model), told, transform_digest(preprocess), DECODERS]
    shape = (snapshot.counts["train"], model.head.in_features)
    return stored_rows(f"{snapshot.digest[:12]}-{short(decided_by)}", shape, lambda first: _computed(model, read, say, first))


def _computed(model: Classifier, read: Callable[[], TrainReader], say: Say, first: int) -> Iterator[Piece]:
    """The features from sample `first` on, computed on a device that is held meanwhile."""
    with _own_device(say) as device:
        try:
            yield from _pieces(model, read(), device, say, first)
        finally:
            model.cpu()


def _pieces(model: Classifier, reader: TrainReader, device: str, say: Say, first: int) -> Iterator[Piece]:
    """The features from sample `first` of the split on, a multiple of `PIECE`. An unreadable sample's row is zeros."""
    samples, size = reader.plan.samples, reader.plan.batch_size
    batches, tell = reader.batches(0, first // size), _now_and_then(say)
    say(f"features of train: {first:,} of {samples:,} samples are on this node, the others are computed on {device}")
    for start in range(first, samples, PIECE):
        count = min(PIECE, samples - start)
        rows, readable = np.zeros((count, model.head.in_features), np.float32), np.zeros(count, bool)
        for batch in islice(batches, -(-count // size)):
            if len(places := batch.samples - reader.plan.first - start):
                rows[places], readable[places] = _forward(model, batch.images, size, device), True
        yield Piece(rows, np.flatnonzero(~readable).tolist())
        tell(f"features of train: {start + count:,} of {samples:,} samples")


def _require_readable(unreadable: int, samples: int, skip_fraction: float) -> None:
    """Features that lie here may have been computed for a request that allows more. Raises `SkipBudgetExceeded`."""
    if not may_skip(unreadable, samples, skip_fraction):
        raise SkipBudgetExceeded(
            f"{unreadable:,} of {samples:,} train samples are unreadable, `skip_fraction` allows {skip_fraction:g} of all: repair them, or "
            "allow more."
        )
    if unreadable == samples:
        raise SkipBudgetExceeded(f"None of the {samples:,} train samples is readable, and a linear probe needs some: repair them.")


def _forward(model: Classifier, inputs_B: Tensor, size: int, device: str) -> NDArray[np.float32]:
    filling = inputs_B[:1].expand(size - len(inputs_B), *inputs_B.shape[1:])
    filled = torch.cat([inputs_B, filling])
    rows_BD: NDArray[np.float32] = features(model, filled, model.config.preprocess, batch_size=size, device=device).numpy()
    return rows_BD[: len(inputs_B)]


def _mean_length(rows_ND: NDArray[np.float32], count: int) -> float:
    """The features' length in the mean square over `count` samples. Raises `ModelError` for features that are no numbers."""
    total = sum(float(np.square(rows_ND[at : at + PIECE], dtype=np.float64).sum()) for at in range(0, len(rows_ND), PIECE))
    if not np.isfinite(total):
        raise ModelError("The base model's features of train are no numbers; look at its weights and its preprocessing, or take another.")
    return float((total / count) ** 0.5)


@contextmanager
def _own_device(say: Say) -> Iterator[str]:
    """A GPU of this node, held as a trial holds its own, or the CPU where there is none, or none becomes free."""
    with ExitStack() as stack:
        try:
            held = stack.enter_context(claimed_gpus())
        except DeviceBusy as error:
            say(f"The linear probe is computed on the CPU: {error}")
            held = ()
        yield "cuda" if held and torch.cuda.is_available() else "cpu"
        torch.cuda.empty_cache()  # whoever holds the GPU next needs its memory


def _now_and_then(say: Say) -> Say:
    """The same, but for lines that follow another within `TELL_EVERY_S`."""
    told = time.monotonic()

    def tell(line: str) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_EVERY_S:
            told = time.monotonic()
            say(line)

    return tell
