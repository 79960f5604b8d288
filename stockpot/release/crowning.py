"""One champion after another: the aliases `champion`, `previous` and `challenger`, moved together though MLflow moves one at a time.

The move is noted first (a tag of the registered model), then carried out, then read back and struck out; a writer that comes after an
interruption finishes the noted move before its own. So no champion is ever without a name to return by, and since a move also settles what
the gate had decided about the version, no gate that was interrupted promotes it again after a person took it back. On one node writers
take turns. On several there is no lock: the champion is compared right before the write and both aliases are read back after it, so a
writer who lost says so, except where the other one wrote in the few milliseconds between comparison and write and had finished before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from stockpot.data.node_cache import cache_root, locked
from stockpot.digests import SHORT, text_digest
from stockpot.errors import RegistryError
from stockpot.ledger import champions, registry
from stockpot.ledger.champions import Move
from stockpot.outcomes import ModelVersion

DECLINED = "declined by hand"


@contextmanager
def alone(model: str) -> Iterator[None]:
    """One writer of a model's versions and aliases on this node; those of other nodes are not kept out."""
    folder = cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f"registry-{model}.lock"):
        yield


def crown(model: str, number: int, why: str, expected: int | None) -> ModelVersion:
    """Champion to `previous`, `number` to champion, and off the challengers' bench. Raises `RegistryError` for a version whose bytes
    changed, and for any champion but the `expected` one, or `number`, which is left as it is."""
    verify(registry.read_version(model, number))
    champion = registry.alias_version(model, "champion")
    if champion != number:
        move = Move(before=expected, after=number, why=why[:500])
        _compare(model, move, champion)
        champions.note_move(model, move)
        _finish(model, move)
    _leave_bench(model, number)
    return registry.read_version(model, number)


def resume(model: str) -> Move | None:
    """Finish the move that was noted and interrupted, and return it; None where there was none. One that cannot be finished is struck out:
    another writer moved the champion since, or (`RegistryError`) its version is gone."""
    move = champions.read_move(model)
    if move is None:
        return None
    champion = registry.alias_version(model, "champion")
    if champion not in (move.before, move.after):
        champions.clear_move(model)
        return None
    try:
        verify(registry.read_version(model, move.after))
    except RegistryError:
        champions.clear_move(model)
        raise
    _finish(model, move)
    return move


def verify(version: ModelVersion, then: Callable[[Path], None] = lambda _: None) -> None:
    """Download a version and compare its weights with what was registered; `then` gets the downloaded folder."""
    with TemporaryDirectory(prefix="stockpot-readback-") as folder:
        registry.fetch_version(version, Path(folder))
        then(Path(folder))


def settled_under(version: ModelVersion) -> list[str]:
    """Digests of the gates under which a version's decision was carried out, or stood; none where it is still to be."""
    tags = registry.read_tags(version)
    of, *gates = tags.get("stockpot.settled", "").split() or [""]
    if of and not gates:  # an earlier Stockpot kept nothing but the gate
        return [of] if (decision := registry.read_decision(version)) and decision.gate_digest == of else []
    return gates if of == _named(tags) else []


def note_settled(version: ModelVersion, gate_digest: str) -> None:
    """Keep that a version's decision is settled under a gate; what was settled of an earlier decision is forgotten."""
    gates = settled_under(version)
    if gate_digest not in gates:
        registry.write_tag(version, "stockpot.settled", " ".join([_named(registry.read_tags(version)), *gates, gate_digest]))


def _named(tags: dict[str, str]) -> str:
    """The decision as it is stored: by its text, so that it keeps its name where a later Stockpot knows more of a decision."""
    return text_digest(tags.get("stockpot.decision", ""))[:SHORT]


def answer(version: ModelVersion) -> str:
    """What a person said about a version that waited, such as `declined by hand: not today`; empty while nobody did."""
    return registry.read_tags(version).get("stockpot.approval", "")


def _settle(version: ModelVersion, why: str) -> None:
    """Whoever makes a version champion settles what its gate decided, and answers where it waited for a person."""
    if (decision := registry.read_decision(version)) is None:
        return
    if decision.waits and (not (said := answer(version)) or said.startswith(DECLINED)):
        registry.write_tag(version, "stockpot.approval", why)
    note_settled(version, decision.gate_digest)


def _finish(model: str, move: Move) -> None:
    """Every step may have been taken before."""
    champion = registry.alias_version(model, "champion")
    _compare(model, move, champion)
    if champion != move.after:
        registry.set_alias(model, "champion", move.after)
    if move.before is not None:
        registry.set_alias(model, "previous", move.before)
    champions.note_change(model, move.before, move.after, move.why)
    _leave_bench(model, move.after)
    _settle(registry.read_version(model, move.after), move.why)
    _compare(model, Move(before=move.after, after=move.after, why=""), registry.alias_version(model, "champion"))
    champions.clear_move(model)


def _leave_bench(model: str, number: int) -> None:
    if registry.alias_version(model, "challenger") == number:
        registry.set_alias(model, "challenger", None)


def _compare(model: str, move: Move, champion: int | None) -> None:
    if champion not in (move.before, move.after):
        raise RegistryError(
            f"The champion of {model} is version {champion}, expected was {move.before or 'none'}: another writer moved it meanwhile; "
            "run the same again to decide against the new one."
        )
