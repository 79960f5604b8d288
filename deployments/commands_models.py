"""`stockpot models`, `explain`, `reproduce`, `promote`, `rollback`, `prune`: registered versions listed, told, rebuilt, crowned, and what
nothing needs. Each asks for the server before it imports torch, which takes longer."""

import json
from typing import Annotated, Any

import typer

app = typer.Typer()

Name = Annotated[str, typer.Argument(help="`digits` (its champion), `digits@previous` or `digits/3`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of text.")]


@app.command()
def models(
    model: Annotated[str | None, typer.Argument(help="One registered model; without it, all of them.")] = None, as_json: AsJson = False
) -> None:
    """List registered versions: aliases, the sweep each comes from, and what it scored."""
    from deployments.tables import versions_text
    from stockpot.ledger import connection, registry

    connection.check_server()
    rows = registry.list_versions(model)
    if model and not rows:
        raise registry.no_version(model, "version")
    _tell([row.model_dump(mode="json") for row in rows], versions_text(rows), as_json)


@app.command()
def explain(model: Name, as_json: AsJson = False) -> None:
    """Tell where a version comes from: ingredients, decisions, the gate's verdict, and who was champion before."""
    from stockpot.ledger import connection

    connection.check_server()
    from stockpot.release import explaining

    story = explaining.look_up(model)
    _tell(story.model_dump(mode="json"), explaining.tell(story), as_json)


@app.command()
def reproduce(model: Name, as_json: AsJson = False) -> None:
    """Average a version's ingredients again and compare the result with the registered weights, and every file with its recorded sha256."""
    from stockpot.ledger import connection

    connection.check_server()
    from stockpot.release import explaining

    version, how = explaining.reproduce(model)
    told = f"{version.model} version {version.version} is reproduced: {version.soup_sha256}. {how}"
    _tell({**version.model_dump(mode="json"), "compared": how}, told, as_json)


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="The registered model.")],
    version: Annotated[int | None, typer.Option(min=1, help="Which version; without it, the challenger.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a version champion by hand; the champion so far becomes `previous`, where `rollback` finds it."""
    from deployments.tables import version_line
    from stockpot.ledger import connection

    connection.check_server()
    from stockpot.release import releasing

    now = releasing.promote(model, version)
    _tell(now.model_dump(mode="json"), version_line(now), as_json)


@app.command()
def rollback(model: Annotated[str, typer.Argument(help="The registered model.")], as_json: AsJson = False) -> None:
    """Make the previous champion champion again. A second rollback takes it back."""
    from deployments.tables import version_line
    from stockpot.ledger import connection

    connection.check_server()
    from stockpot.release import releasing

    now = releasing.rollback(model)
    _tell(now.model_dump(mode="json"), version_line(now), as_json)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="The registered model.")],
    keep_top: Annotated[int, typer.Option(min=0, help="Best trials of every sweep whose weights stay.")] = 8,
    min_age_h: Annotated[float, typer.Option(min=0, help="Hours; nothing stored within the last ones is deleted.")] = 24.0,
    apply: Annotated[bool, typer.Option("--apply", help="Delete; without it, only say what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which stored weights nothing needs any more, and with --apply delete them.

    Kept: the soup of every registered version, the ingredients of every version with an alias (champion, challenger, previous), the best
    trials of every sweep, everything of a sweep that runs or is not cooked and registered yet and what it may borrow, what may be needed
    by a sweep with a record that cannot be read, everything young, and the inits. A version whose ingredients go is named: it serves as
    before, and can no longer be rebuilt.
    """
    from stockpot.ledger import connection

    connection.check_server()
    from stockpot.release import pruning

    plan = pruning.plan_removal(model, keep_top, min_age_h)
    if apply:
        pruning.remove(plan)
    lines = [f"{one.kind} {one.about[:12]}  {one.size:,} bytes" for one in plan.removable]
    what, free, how = ("Deleted", "freed", "") if apply else ("Would delete", "free", "; add --apply to do it" if plan.removable else "")
    no_longer = "can no longer" if apply else "could then no longer"
    lines += [f"{version} {no_longer} be rebuilt from its ingredients; it serves as before." for version in plan.forgets]
    lines += [f"Kept: what may be needed by {plan.unread}"] if plan.unread else []
    _tell(
        {
            "applied": apply,
            "bytes": plan.size,
            "stored": plan.stored,
            "forgets": plan.forgets,
            "unread": plan.unread,
            "removable": [one.model_dump() for one in plan.removable],
        },
        "\n".join([*lines, f"{what} {len(plan.removable)} of {model}'s {plan.stored} stored weights and {free} {plan.size:,} bytes{how}."]),
        as_json,
    )


def _tell(document: Any, text: str, as_json: bool) -> None:
    print(json.dumps(document, indent=2) if as_json else text)
