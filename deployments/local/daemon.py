"""The supervisor behind `stockpot stack up`: says one JSON line on standard output once it is ready or has failed, then stays."""

import json
import os
import signal
import sys
from pathlib import Path

from deployments.stack import local_stack
from stockpot.errors import StockpotError


def main() -> int:
    """Arguments: the state directory and a JSON object of ports asked for."""
    state, ports = Path(sys.argv[1]), json.loads(sys.argv[2])
    try:
        with local_stack(state, ports=ports):
            _say({"ready": True})
            while True:
                signal.pause()
    except StockpotError as error:
        _say({"error": str(error), "kind": type(error).__name__})
        return 1


def _say(answer: dict[str, object]) -> None:
    print(json.dumps(answer), flush=True)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.close(quiet)


if __name__ == "__main__":
    sys.exit(main())
