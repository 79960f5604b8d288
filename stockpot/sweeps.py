"""Drawing trials. The same request and seed draw the same trials on any machine: every value comes from a generator keyed by
(sweep seed, trial index, field), and is rounded to six significant digits so that no libm difference can change an id."""

import math
import random
from typing import Any

from pydantic import ValidationError

from stockpot.config import FanOutSpec, Init, PinnedData, RetrainRequest, Sweep, SweepSpec, Trial, sweep_id
from stockpot.digests import short
from stockpot.errors import BadRequest
from stockpot.settings import TrialSettings
from stockpot.spaces import Choice, Depending, Distribution, IntUniform, LogUniform, Sometimes, Uniform

UNTRAINED = TrialSettings(max_steps=0, augmentation="none")
"""The settings of the init as an ingredient: the same for every sweep, of images or texts, so it is evaluated once."""


def draw(spec: SweepSpec) -> tuple[TrialSettings, ...]:
    """The settings of every trial of a sweep, in order; the init's, where it is one, last.

    Raises `BadRequest` when the space cannot give that many different trials; those that train nothing are all the same one.
    """
    numbers: dict[TrialSettings, int] = {}
    for index in range(spec.trials):
        settings = _settings(spec, index)
        if settings in numbers:
            raise BadRequest(
                f"Trial {index} of the sweep equals trial {numbers[settings]}: the space has fewer than {spec.trials} different "
                "trials. Ask for fewer trials, or draw another field."
            )
        numbers[settings] = index
    drawn = [*numbers, *[UNTRAINED] * spec.init_as_ingredient]
    untrained = [index for index, settings in enumerate(drawn) if settings.max_steps == 0]
    if len(untrained) > 1:
        raise BadRequest(
            f"Trials {untrained[0]} and {untrained[1]} of the sweep have `max_steps: 0`, and each would be the init itself; leave "
            "`max_steps` out, and ask for the init once, with `init_as_ingredient: true`."
        )
    return tuple(drawn)


def allotted(request: RetrainRequest) -> list[tuple[TrialSettings, int]]:
    """The request's trials, and the GPUs that each takes. Raises `BadRequest` for a space without as many trials, a batch that its GPUs
    cannot share, a soup that the trials cannot fill, and a tolerance for a suite there is not; these are no rules of the request itself,
    so that a sweep that was asked for by others can still be read."""
    _require_suites(request)
    _require_enough(request)
    return [(settings, _ranks(index, settings, request.fan_out)) for index, settings in enumerate(draw(request.sweep))]


def plan(request: RetrainRequest, data: PinnedData, init: Init) -> Sweep:
    """The whole sweep: its id, and one self-contained `Trial` per draw, identified by what decides its result. Raises as `allotted`."""
    sweep = sweep_id(request, data, init)
    trials = tuple(
        Trial(
            id=short([settings, data.snapshot.digest, init.digest]),
            sweep_id=sweep,
            model=request.model,
            index=index,
            settings=settings,
            snapshot=data.snapshot,
            init=init,
            store=request.store,
            loader_workers=request.data.loader_workers,
            skip_fraction=request.data.skip_fraction,
            reading=request.data.reading,
            state_interval_s=request.fan_out.state_interval_s,
            budget_s=request.fan_out.budget_s,
            gpus=gpus,
            sharded=request.fan_out.sharded and gpus > 1,
        )
        for index, (settings, gpus) in enumerate(allotted(request))
    )
    return Sweep(id=sweep, request=request, data=data, init=init, trials=trials)


def _require_suites(request: RetrainRequest) -> None:
    if unknown := sorted(request.gate.suite_tolerances.keys() - request.data.shifts.keys()):
        suites = ", ".join(sorted(request.data.shifts)) or "none"
        raise BadRequest(f"`gate.suite_tolerances` names {unknown[0]}, and the suites of `data.shifts` are {suites}; correct the name.")


def _require_enough(request: RetrainRequest) -> None:
    sweep, wanted = request.sweep, request.soup.minimum
    most = (sweep.trials + sweep.init_as_ingredient) * (1 + len(sweep.settings.ema_decays))
    if wanted > most and "ema_decays" not in {*sweep.space, *sweep.grid}:
        raise BadRequest(f"`soup.minimum` is {wanted} and the sweep leaves {most} ingredients at the most; lower it, or add trials.")


def _ranks(index: int, settings: TrialSettings, fan_out: FanOutSpec) -> int:
    """The GPUs of a trial: as many as asked for, one to evaluate an untrained init. Mixed pairs must fall on one GPU, so these come in
    even shares."""
    if settings.max_steps == 0:
        return 1
    gpus = fan_out.gpus
    share = gpus * (2 if gpus > 1 and (settings.mixup or settings.cutmix) else 1)
    if settings.batch_size % share:
        raise BadRequest(
            f"Trial {index} has a batch of {settings.batch_size}, which {gpus} GPUs cannot share evenly; make `batch_size` a multiple of "
            f"{share}, or change `gpus`."
        )
    whole = "`compile: true`" if settings.compile else "`optimiser: adafactor`" if settings.optimiser == "adafactor" else None
    if fan_out.sharded and whole:
        raise BadRequest(
            f"Trial {index} has {whole}, which needs whole matrices, and with `sharded` no GPU has any; leave out one of them."
        )
    return gpus


def _settings(spec: SweepSpec, index: int) -> TrialSettings:
    values = _Values(spec, index)
    for field in spec.space:
        values[field]
    try:
        return TrialSettings.model_validate({**spec.settings.model_dump(), **values.known})
    except ValidationError as error:
        first = error.errors()[0]
        # A rule about several fields has no field to name.
        drew = f"drew {first['input']!r} for `{first['loc'][0]}`" if first["loc"] else "does not fit together"
        raise BadRequest(f"The space {drew} in trial {index}: {first['msg']}. Narrow its distribution.") from error


class _Values:
    """The values of one trial by field; those of the space are drawn when they are first asked for."""

    def __init__(self, spec: SweepSpec, index: int) -> None:
        self.spec, self.index = spec, index
        self.known: dict[str, Any] = {"seed": spec.settings.seed + index, **_cell(spec, index)}
        self._asked: list[str] = []

    def __getitem__(self, field: str) -> Any:
        if field in self.spec.space and field not in self._asked:
            self._asked.append(field)
            self.known[field] = self._sample(
                field, self.spec.space[field], random.Random(f"stockpot/{self.spec.seed}/{self.index}/{field}")
            )
        elif field in self.spec.space and field not in self.known:
            raise BadRequest(
                f"The space's {' and '.join(f'`{one}`' for one in self._asked)} depend on each other; give one its own values."
            )
        return self.known[field] if field in self.known else getattr(self.spec.settings, field)

    def _sample(self, field: str, distribution: Distribution, rng: random.Random) -> Any:
        match distribution:
            case Sometimes(probability=probability, value=value, otherwise=otherwise):
                return value if rng.random() < probability else self._sample(field, otherwise, rng)
            case Depending(given=given, cases=cases):
                value = str(self[given])
                if value not in cases:
                    raise BadRequest(f"`{field}` has no case for `{given}` {value}; it has {', '.join(sorted(cases))}.")
                return self._sample(field, cases[value], rng)
            case _:
                return _sample(distribution, rng)


def _cell(spec: SweepSpec, index: int) -> dict[str, Any]:
    """Combination `index` of the grid; the last field changes fastest."""
    values = {}
    for field, choices in reversed(spec.grid.items()):
        index, place = divmod(index, len(choices))
        values[field] = choices[place]
    return values


def _sample(distribution: Choice | Uniform | LogUniform | IntUniform, rng: random.Random) -> Any:
    match distribution:
        case Choice(choice=values):
            return values[int(rng.random() * len(values))]
        case Uniform(uniform=(low, high)):
            return _rounded(low + (high - low) * rng.random())
        case LogUniform(log_uniform=(low, high)):
            return _rounded(math.exp(math.log(low) + (math.log(high) - math.log(low)) * rng.random()))
        case IntUniform(int_uniform=(low, high)):
            return low + int(rng.random() * (high - low + 1))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
