"""`stockpot stack up | down | status | env`: the local stack for a person."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from stockpot.errors import StackError

app = typer.Typer(no_args_is_help=True)

State = Annotated[Path, typer.Option("--state", help="Where the stack keeps its data, ports and logs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Port = Annotated[int | None, typer.Option(min=1024, max=65535, help="Use this port; default: the one used before, else a free one.")]
STATE = Path(".stockpot")


@app.command()
def up(
    state: State = STATE,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C instead of going to the background.")] = False,
    prefect_port: Port = None,
    mlflow_port: Port = None,
    s3_port: Port = None,
    as_json: Json = False,
) -> None:
    """Start the stack, and return when it is ready. What it holds is kept from one start to the next."""
    import signal

    from deployments.stack import local_stack, pages, start_detached

    asked = {name: port for name, port in {"prefect": prefect_port, "mlflow": mlflow_port, "s3": s3_port}.items() if port}
    typer.echo("Starting Prefect, MLflow, the object store and two workers; this takes about half a minute.", err=True)
    if not foreground:
        _show(pages(start_detached(state, ports=asked)), state, as_json)
        return
    with local_stack(state, ports=asked) as stack:
        _show(stack.addresses, state, as_json)
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            typer.echo("Stopping the stack.", err=True)


@app.command()
def down(state: State = STATE) -> None:
    """End the stack and every process it started; its data stays."""
    from deployments.stack import stop

    typer.echo("The stack is down; its data stays." if stop(state) else f"No stack is up on {state}.")


@app.command()
def status(state: State = STATE, as_json: Json = False) -> None:
    """Say which parts of the stack are up; exit code 1 when one is not."""
    from deployments.stack import health, pages, running_environ

    parts, environ = health(state), running_environ(state)
    addresses = pages(environ) if environ else {}
    if as_json:
        typer.echo(json.dumps({"up": bool(environ), "components": parts, "addresses": addresses}, indent=1))
    elif parts:
        table = Table("component", "process", "state")
        for name, part in parts.items():
            table.add_row(name, str(part["pid"]), "[green]up[/]" if part["ok"] else f"[red]down[/] (log: {state}/logs/{name}.log)")
        Console().print(table)
        _show(addresses, state, as_json=False)
    if not environ or not all(part["ok"] for part in parts.values()):
        raise StackError(_what_to_do(state, parts))


@app.command()
def env(state: State = STATE) -> None:
    """Print `export` lines for a shell: `eval "$(stockpot stack env)"` points any tool at the stack."""
    from deployments.stack import running_environ

    environ = running_environ(state)
    if not environ:
        raise StackError(_what_to_do(state, {}))
    for name, value in environ.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


def _what_to_do(state: Path, parts: dict[str, dict[str, Any]]) -> str:
    from deployments.stack import running_environ

    down = [name for name, part in parts.items() if not part["ok"]]
    if down and running_environ(state):
        return f"{', '.join(down)} of the stack on {state} is down; see its log, then `stockpot stack down` and `stockpot stack up`."
    return f"The stack on {state} is still starting." if parts else f"No stack is up on {state}; start one with `stockpot stack up`."


def _show(addresses: dict[str, str], state: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(addresses))
        return
    for name, address in addresses.items():
        typer.echo(f"{name:8} {address}")
    typer.echo(f"{'logs':8} {state}/logs")
    typer.echo('For other programs of this shell: eval "$(stockpot stack env)"')
