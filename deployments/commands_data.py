"""`stockpot data`: make, register and check snapshots."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stockpot.config import PinnedSnapshot
    from stockpot.data.examination import Problems
    from stockpot.data.sources import ClassFolders, ExistingShards
    from stockpot.data.splits import SplitSpec

app = typer.Typer(no_args_is_help=True)

Share = Annotated[
    str, typer.Option(help="Samples for this split: a whole number, or a fraction such as 0.02; 0.1 or more where the dataset is small.")
]
OneSplit = Annotated[str | None, typer.Option("--split", help="Make the whole snapshot one split, such as test, instead of drawing.")]
Classes = Annotated[
    str | None,
    typer.Option(
        help="Text file with the class names, one a line, the first is label 0. Default for shards: SOURCE/classes.txt if there is one; "
        "for class folders, each of which must be named: their names, sorted."
    ),
]
GroupBy = Annotated[str, typer.Option(help="pixels (identical pictures stay together), or a field of each sample's json.")]
Salt = Annotated[str, typer.Option(help="Key of the hash that draws the splits.")]
Extends = Annotated[str | None, typer.Option(help="An older snapshot of this dataset: its samples keep their splits.")]
Skip = Annotated[float, typer.Option(min=0, max=1, help="Share of unreadable pictures that may stay in, as train.")]
Least = Annotated[int, typer.Option(min=0, help="Fewest samples of every class in every split.")]
Name = Annotated[str | None, typer.Option(help="Name in the manifest; default: the last part of the address.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of text.")]


@app.command()
def publish(
    source: Annotated[str, typer.Argument(help="A folder of class folders, or WebDataset shards; local or s3://.")],
    dest: Annotated[str, typer.Argument(help="The dataset to publish to, such as s3://stockpot/flowers.")],
    name: Name = None,
    classes: Classes = None,
    held_out: Share = "0.02",
    gate: Share = "0.02",
    split: OneSplit = None,
    salt: Salt = "stockpot",
    group_by: GroupBy = "pixels",
    extends: Extends = None,
    shard_mb: Annotated[int, typer.Option(min=1, max=4096, help="Size of a shard in MB.")] = 128,
    skip_fraction: Skip = 0.0,
    least_per_class: Least = 1,
    as_json: AsJson = False,
) -> None:
    """Pack pictures, or texts as token ids, into shards and store them as a snapshot. Started again, it goes on where it stopped."""
    _require(source, missing="check the path")
    _require(dest, missing=None)
    from stockpot.data.publishing import publish as run
    from stockpot.data.snapshots import pin

    chosen = _source(_address(source), classes)
    with _progress("samples") as progress, _report(as_json):
        pinned = run(
            _address(dest), name or _last(dest), chosen.classes, chosen, splits=_splits(split, held_out, gate, salt, group_by),
            extends=pin(_address(extends)) if extends else None, shard_bytes=shard_mb * 10**6, skip_fraction=skip_fraction,
            least_per_class=least_per_class, progress=progress,
        )  # fmt: skip
    _say(pinned, chosen.left_out(), as_json)


@app.command()
def register(
    source: Annotated[list[str], typer.Argument(help="Prefixes of WebDataset shards, or single tars; local or s3://.")],
    dest: Annotated[str | None, typer.Option(help="Where manifest and index are stored; default: the first SOURCE.")] = None,
    name: Name = None,
    classes: Classes = None,
    held_out: Share = "0.02",
    gate: Share = "0.02",
    split: OneSplit = None,
    salt: Salt = "stockpot",
    group_by: GroupBy = "pixels",
    extends: Extends = None,
    skip_fraction: Skip = 0.0,
    least_per_class: Least = 1,
    as_json: AsJson = False,
) -> None:
    """Make a snapshot of shards that exist already, in one full read; the shards are not touched, and all problems are reported at once."""
    _require(*source, missing="check the path")
    if dest:
        _require(dest, missing=None)
    from stockpot.data.registering import register as run
    from stockpot.data.snapshots import pin

    uris = [_address(uri) for uri in source]
    root = _address(dest) if dest else uris[0].rpartition("/")[0] if uris[0].endswith(".tar") else uris[0].rstrip("/")
    left_out: list[str] = []
    with _progress("shards") as progress, _report(as_json):
        pinned = run(
            uris, root=root, name=name or _last(root), classes=_class_names(root, classes),
            splits=_splits(split, held_out, gate, salt, group_by), extends=pin(_address(extends)) if extends else None,
            skip_fraction=skip_fraction, least_per_class=least_per_class, progress=progress, say=left_out.append,
        )  # fmt: skip
    _say(pinned, left_out, as_json)


@app.command()
def verify(
    snapshot: Annotated[str, typer.Argument(help="A manifest, or a dataset: then its newest snapshot.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare hashes, not only sizes and etags.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what changed in storage since a snapshot was made. Exit 1 when anything did."""
    _require(snapshot)
    from stockpot.data.registering import verify as run
    from stockpot.data.snapshots import open_snapshot, pin
    from stockpot.errors import SnapshotBroken

    opened = open_snapshot(pin(_address(snapshot)))
    with _progress("objects") as progress:
        changes = run(opened, deep=deep, progress=progress)
    of = f"{len(opened.manifest.shards) + 1} objects of snapshot {opened.digest[:12]}"
    if as_json:
        print(
            json.dumps(
                {"snapshot": opened.digest, "objects": len(opened.manifest.shards) + 1, "changes": [one._asdict() for one in changes]}
            )
        )
    if changes:
        if not as_json:
            _table("What changed", ("object", "found", "needed"), [tuple(one) for one in changes[:50]])
        first = changes[0]
        raise SnapshotBroken(
            f"{len(changes)} of {of} changed. First: {first.key} is {first.found}, needed {first.needed}. Restore it, or remove it and "
            "publish anew."
        )
    if not as_json:
        seen = "every byte read" if deep else "sizes and etags" if opened.manifest.shards[0].etag else "sizes; --deep reads every byte"
        print(f"All {of} are as they were ({seen}).")


def _require(*addresses: str, **missing: str | None) -> None:
    """Say what is wrong with an address before torch is imported, which takes longer than asking; `missing` as in `storage.check`."""
    from stockpot import storage

    for text in addresses:
        storage.check(_address(text), **missing)


def _source(uri: str, classes: str | None) -> "ClassFolders | ExistingShards":
    from stockpot import storage
    from stockpot.data.sources import ClassFolders, ExistingShards, read_classes
    from stockpot.errors import BadRequest

    if not uri.endswith(".tar") and not any(item.uri.endswith(".tar") for item in storage.list_prefix(f"{uri.rstrip('/')}/")):
        return ClassFolders(uri, read_classes(_address(classes)) if classes else ())
    names = _class_names(uri, classes)
    if names is None:
        raise BadRequest(
            f"{uri} holds shards but no classes.txt; give the class names with --classes FILE, one a line, the first is label 0."
        )
    return ExistingShards(uri, names)


def _class_names(uri: str, classes: str | None) -> tuple[str, ...] | None:
    from stockpot import storage
    from stockpot.data.sources import read_classes

    if classes:
        return read_classes(_address(classes))
    beside = storage.join(uri, "classes.txt")
    return read_classes(beside) if storage.exists(beside) else None


def _splits(split: str | None, held_out: str, gate: str, salt: str, group_by: str) -> "SplitSpec | str":
    from stockpot.data.splits import SplitSpec

    return split or SplitSpec(held_out=_share(held_out), gate=_share(gate), salt=salt, group_by=group_by)


def _share(text: str) -> int | float:
    try:
        share = int(text) if text.isdigit() else float(text)
    except ValueError:
        share = -1
    if not (isinstance(share, int) or 0 <= share < 1) or share < 0:
        raise typer.BadParameter(f"{text} is no share; write a whole number of samples, or a fraction below 1")
    return share


def _address(text: str) -> str:
    from stockpot import storage

    return storage.address(text)


def _last(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def _say(pinned: "PinnedSnapshot", left_out: list[str], as_json: bool) -> None:
    from stockpot.data.manifests import thin_classes
    from stockpot.data.snapshots import open_snapshot
    from stockpot.errors import counted

    snapshot = open_snapshot(pinned)
    warnings = [*left_out, *thin_classes(snapshot)]
    if as_json:
        facts = {"uri": pinned.uri, "digest": pinned.digest, "splits": snapshot.counts, "classes": len(snapshot.classes)}
        print(
            json.dumps({**facts, "shards": len(snapshot.manifest.shards), "unreadable": snapshot.manifest.unreadable, "warnings": warnings})
        )
        return
    for warning in warnings:
        print(f"warning: {warning}")
    splits = ", ".join(f"{split} {count:,}" for split, count in snapshot.counts.items())
    shards = counted(len(snapshot.manifest.shards), "shard")
    print(f"{snapshot.manifest.name}: {splits} samples of {len(snapshot.classes)} classes in {shards}")
    print(f"snapshot {pinned.digest[:12]} is {pinned.uri}")


@contextmanager
def _report(as_json: bool) -> Iterator[None]:
    """Print the table of problems, or their JSON document, before the sentence that sums them up."""
    from stockpot.data.examination import ProblemsFound

    try:
        yield
    except ProblemsFound as error:
        head, rows = ("problem", "count", "shard", "sample", "detail"), _rows(error.problems)
        if as_json:
            print(json.dumps({"problems": [dict(zip(head, row, strict=True)) for row in rows]}))
        else:
            _table("Problems", head, [tuple(map(str, row)) for row in rows])
        raise


def _rows(problems: "Problems") -> list[tuple[str | int, ...]]:
    return [
        (kind, count, example.shard, example.sample, example.detail)
        for kind, count in problems.counts.most_common()
        for example in problems.examples[kind]
    ]


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(stderr=True).print(table)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal, a line every ten seconds elsewhere; both on standard error."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    quiet = not console.is_terminal
    said = time.monotonic()
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int | None) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total)
            if quiet and time.monotonic() - said > 10:
                said = time.monotonic()
                console.print(f"{done:,}{f' of {total:,}' if total else ''} {what}", highlight=False)

        yield advance
