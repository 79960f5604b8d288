"""`make bench` and `make bench-gpu`: run the benchmarks, each in a process of its own, and write `.stockpot/bench.json`.

A benchmark is a module of this folder with `measure() -> {name: {ratio, unit, peer, repeats, spread}}`; one whose name ends in `_gpu` needs
a GPU. What an earlier run measured stays in the file until it is measured again.

    python -m benchmarks [--gpu] [MODULE...]      `data` stands for every module whose name begins with it
"""

import json
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = Path(".stockpot/bench.json")
CALL = "import importlib, json, sys; print(json.dumps(importlib.import_module(sys.argv[1]).measure()))"


def main(arguments: list[str]) -> int:
    """Exit code 1 when a benchmark failed; the others are run and written all the same."""
    gpu, asked = "--gpu" in arguments, [word for word in arguments if not word.startswith("-")]
    found = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_") and path.stem.endswith("_gpu") == gpu)
    failed = 0
    for name in [name for name in found if not asked or name.startswith(tuple(asked))]:
        began = time.monotonic()
        run = subprocess.run(
            [sys.executable, "-c", CALL, f"benchmarks.{name}"], cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True, check=False
        )
        print(f"{name} ({time.monotonic() - began:.0f} s)")
        if run.returncode:
            failed += 1
            print(f"    failed with exit code {run.returncode}")
            continue
        measured = json.loads(run.stdout.strip().splitlines()[-1])
        for figure, entry in measured.items():
            print(f"    {figure}: {entry['ratio']:.3g} {entry.get('unit', '')} against {entry.get('peer', '')}")
        RESULTS.parent.mkdir(exist_ok=True)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | measured, indent=1, sort_keys=True) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
