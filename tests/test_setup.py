"""Promises: set-up is one command that can be killed and repeated, and says in one sentence what the machine lacks. The script is run
for real in a small checkout whose lock holds two packages of the real one; lacks are simulated by programs earlier on PATH."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("python3", "python3.13", "python3.12", "python3.11")
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "small"
version = "1"
[tool.setuptools]
py-modules = ["small"]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "infra").mkdir(parents=True)
    shutil.copy(ROOT / "infra" / "setup.sh", folder / "infra")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "small.py").write_text("here = True\n")
    blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text())
    (folder / "requirements.lock").write_text("\n".join(block for block in blocks if block.startswith(("uv==", "setuptools=="))) + "\n")
    return folder


def environ(tmp_path: Path) -> dict[str, str]:
    """An empty home and cache, and a folder of programs that come before the machine's."""
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "shims").mkdir(exist_ok=True)
    python = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())
    kept = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "PYTHON", "MAKEFLAGS", "MAKELEVEL"}}
    shim(tmp_path, "python3", f'exec {python} "$@"')
    return kept | {"HOME": str(tmp_path / "home"), "PATH": f"{tmp_path / 'shims'}:{os.environ['PATH']}"}


def shim(tmp_path: Path, name: str, body: str) -> None:
    path = tmp_path / "shims" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def setup(checkout: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["sh", "infra/setup.sh"]
    return subprocess.run(command, cwd=checkout, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return line


def test_an_old_python_is_refused(checkout: Path, tmp_path: Path) -> None:
    env = environ(tmp_path)
    for name in NAMES:
        shim(tmp_path, name, '[ "$1" = --version ] && echo "Python 3.9.2" || exit 1')
    assert sentence(setup(checkout, env)).startswith(
        "Stockpot needs Python 3.11 or later and found Python 3.9.2; install one (Debian, Ubuntu: apt-get"
    )
    assert not (checkout / ".venv").exists()


def test_a_newer_python_beside_an_old_one_is_found(checkout: Path, tmp_path: Path) -> None:
    env = environ(tmp_path)
    shutil.move(tmp_path / "shims" / "python3", tmp_path / "shims" / "python3.12")
    shim(tmp_path, "python3", '[ "$1" = --version ] && echo "Python 3.9.2" || exit 1')
    shim(tmp_path, "df", "printf 'Filesystem\\nnone 1 1 4096 1%% /\\n'")
    assert "8 GiB" in sentence(setup(checkout, env))


def test_no_python_is_refused(checkout: Path, tmp_path: Path) -> None:
    env = environ(tmp_path) | {"PYTHON": "python-of-nowhere"}
    assert "found no python-of-nowhere" in sentence(setup(checkout, env))


def test_a_python_without_venv_is_refused(checkout: Path, tmp_path: Path) -> None:
    env = environ(tmp_path)
    real = (tmp_path / "shims" / "python3").read_text().splitlines()[1]
    shim(tmp_path, "python3", f'case "$2" in *ensurepip*) exit 1 ;; esac\n{real}')
    refusal = sentence(setup(checkout, env))
    assert re.match(r"Stockpot needs Python's venv module and found \S+ 3\.\d+\.\d+ without it; install it \(", refusal)
    assert re.search(r"apt-get install python3\.\d+-venv\)\.$", refusal)


def test_too_little_disk_is_refused(checkout: Path, tmp_path: Path) -> None:
    env = environ(tmp_path)
    shim(tmp_path, "df", "printf 'Filesystem\\nnone 1 1 4194304 1%% /\\n'")
    assert "needs 8 GiB of disk for its packages and found 4096 MiB free" in sentence(setup(checkout, env))


@pytest.mark.slow
def test_it_makes_skips_updates_and_repairs(checkout: Path, tmp_path: Path) -> None:
    env = environ(tmp_path)
    python = checkout / ".venv" / "bin" / "python"

    def imports_small() -> bool:
        return subprocess.run([python, "-c", "import small"], cwd="/", check=False).returncode == 0

    starting = subprocess.Popen(["sh", "infra/setup.sh"], cwd=checkout, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    while not python.exists():
        time.sleep(0.01)
    os.killpg(starting.pid, signal.SIGKILL)  # a half-made .venv: a Python, and no more
    starting.wait()

    made = setup(checkout, env)
    assert (made.returncode, made.stderr) == (0, "")
    assert imports_small()

    skipped = setup(checkout, env)
    assert (skipped.returncode, skipped.stdout, skipped.stderr) == (0, "", "")

    witness = checkout / ".venv" / "witness"
    witness.touch()
    (checkout / "pyproject.toml").write_text(PYPROJECT.replace('"1"', '"2"'))
    assert "Made .venv." in setup(checkout, env).stdout
    assert witness.exists()
    assert imports_small()

    lock = checkout / "requirements.lock"
    lock.write_text(lock.read_text().replace("sha256:", "sha256:0000", 1))
    assert setup(checkout, env).returncode != 0
    lock.write_text(lock.read_text().replace("sha256:0000", "sha256:", 1))
    assert setup(checkout, env).returncode == 0
    assert not witness.exists()  # the refused update left no stamp, so everything was made anew
