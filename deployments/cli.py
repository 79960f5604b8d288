"""The command line. It sits on top of everything because it starts the stack and the flows; each command imports what it needs
when it runs, so that `--help` answers at once.

Exit codes: 0 done, 1 a stated failure (one sentence on standard error), 2 wrong usage.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Never

import typer

from deployments import commands_data, commands_models, commands_stack
from stockpot.errors import StockpotError

app = typer.Typer(
    name="stockpot",
    help="Production retraining with model soups: fan out fine-tuning trials, average the good ones, register what passes the gate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(commands_stack.app, name="stack", help="The local stack: Prefect, MLflow, SeaweedFS and two workers on this machine.")
app.add_typer(commands_models.app)
app.add_typer(commands_data.app, name="data", help="Snapshots: publish, register and verify datasets.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of text.")]
Watch = Annotated[bool, typer.Option("--watch/--no-watch", help="Stay, show progress, and exit 1 when it fails.")]


def main() -> None:
    """Entry point of `stockpot`."""
    try:
        command = typer.main.get_command(app)
        _show_flags_plainly(command)
        command()
    except StockpotError as error:
        _fail(str(error))
    except (Exception, SystemExit) as error:
        if not _interrupted(error):
            raise
        _fail("Interrupted; what was finished is kept, and the same command goes on from there.", 130)


def _show_flags_plainly(command: Any) -> None:
    """No `<bool>` behind a flag in the help: it takes no value. (typer 0.29 shows every option's type.)"""
    for option in command.get_params(typer.Context(command)):
        if getattr(option, "is_flag", False):
            option.metavar = ""
    for inner in getattr(command, "commands", {}).values():
        _show_flags_plainly(inner)


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: typer makes an exit of it, and an import that it meets half-way another error."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _fail(sentence: str, code: int = 1) -> Never:
    print(sentence, file=sys.stderr)
    sys.exit(code)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"stockpot {version('stockpot')}")
        raise typer.Exit


@app.callback()
def _surroundings(
    _version: Annotated[bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Outside a configured environment, use the local stack of this folder if one is up."""
    from deployments.surroundings import use_local_stack

    use_local_stack(Path(".stockpot"))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Which frozen permutation of the digits is used.")] = 10,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: deletes .stockpot first, with every dataset and model of the local stack.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running at the end, to look at the pages.")] = False,
) -> None:
    """The whole path on real servers and real digits: stack, data, base, 8 trials, soup, gate, and a stranger loading the champion."""
    from deployments.demo.run import run_demo

    run_demo(seed=seed, fresh=fresh, keep=keep)


@app.command()
def deploy() -> None:
    """Create or update the deployments retrain, finetune, soup and approve, and the work pools control and gpu, on the Prefect server."""
    from deployments.deploying import deploy_all
    from deployments.surroundings import check_prefect

    check_prefect()
    for name in deploy_all():
        print(f"deployed {name}")


@app.command()
def request() -> None:
    """Print every field of a request with what it means, what may stand there and its default, as YAML to fill in."""
    from deployments.fields import template

    print(template())


@app.command()
def retrain(
    request: Annotated[
        Path, typer.Argument(help="A request in YAML: `stockpot request` prints every field, `deployments/requests/` has some.")
    ],
    watch: Watch = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Look from here whether the servers and snapshots exist, first.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Start one retraining. The same request again repeats no finished trial and registers nothing twice."""
    from deployments.reading import read_request
    from deployments.starting import start, watch_to_end
    from deployments.surroundings import check_prefect, check_request

    wanted = read_request(request)
    check_prefect()
    if check:
        check_request(wanted)
    run = start(
        "retrain/stockpot", {"request": wanted.model_dump(mode="json")}, name=f"retrain-{wanted.model}", tags=[f"model:{wanted.model}"]
    )
    _tell({"flow_run_id": str(run.id), "page": run.page}, f"Started {run.name}: {run.where}", as_json and not watch)
    if watch:
        _show_sweep(watch_to_end(run), as_json)


@app.command()
def soup(
    sweep: Annotated[str, typer.Argument(help="The sweep's id, as `stockpot status` lists it.")],
    watch: Watch = True,
    as_json: AsJson = False,
) -> None:
    """Cook one sweep again from its finished trials: rank, average, score, register once, pass the gate."""
    from deployments.starting import start, watch_to_end
    from deployments.surroundings import check_prefect
    from stockpot.ledger import connection, tracking

    check_prefect()
    connection.check_server()
    model = tracking.read_sweep(sweep).request.model
    run = start("soup/stockpot", {"sweep_id": sweep}, name=f"soup-{sweep}", tags=[f"sweep:{sweep}", f"model:{model}", f"soup:{sweep}"])
    _tell({"flow_run_id": str(run.id), "page": run.page}, f"Started {run.name}: {run.where}", as_json and not watch)
    if watch:
        _show_sweep(watch_to_end(run), as_json)


@app.command()
def status(
    sweep: Annotated[str | None, typer.Argument(help="One sweep; without it, all of them.")] = None,
    as_json: AsJson = False,
) -> None:
    """What the ledger knows: sweeps, or one sweep's trials, soup and version."""
    from deployments.tables import sweeps_text
    from stockpot.ledger import connection, tracking

    connection.check_server()
    if sweep is None:
        rows = tracking.list_sweeps()
        _tell([row.model_dump(mode="json") for row in rows], sweeps_text(rows), as_json)
    else:
        _show_sweep(sweep, as_json)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="`digits` (its champion), `digits@challenger` or `digits/3`.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or token ids (`.npy`).", exists=True, dir_okay=False, readable=True)],
    top_k: Annotated[int, typer.Option(min=1, help="How many of the likeliest classes are told.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Classify images, or texts as token ids, with a registered version, as a service would."""
    from deployments.predicting import predict_files

    rows = predict_files(model, images, top_k)
    told = [", ".join(f"{one['label']} ({one['probability']:.3f})" for one in row["top"]) for row in rows]
    _tell(rows, "\n".join(f"{next(iter(row.values()))}: {answer}" for row, answer in zip(rows, told, strict=True)), as_json)


def _tell(document: Any, text: str, as_json: bool) -> None:
    print(json.dumps(document, indent=2) if as_json else text)


def _show_sweep(sweep: str, as_json: bool) -> None:
    from deployments.tables import sweep_document, sweep_text

    document = sweep_document(sweep)
    _tell(document, sweep_text(document), as_json)


if __name__ == "__main__":
    main()
