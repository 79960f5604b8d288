"""Promise: what the README names exists. Every path of its file map is in the tree, every folder of the tree is in its map, and every
command it shows is one the command line has."""

import re
import subprocess
from pathlib import Path

import typer

from deployments.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {Path(name).parts[0] for name in listed}


def test_the_file_map_is_the_tree():
    block = README.split("## File map")[1].split("```")[1]
    named = [line.split()[0].rstrip("/") for line in block.strip().splitlines() if line and not line.startswith(" ")]
    assert {name.split("/")[0] for name in named} >= {top for top in tracked() if not top.startswith(".")}
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_shown_exists():
    known = set(typer.main.get_command(app).commands)
    shown = set(re.findall(r"^\s*(?:\$ )?stockpot ([a-z]+)", README, flags=re.MULTILINE)) | set(re.findall(r"`stockpot ([a-z]+)", README))
    assert shown
    assert shown <= known


def test_every_make_target_shown_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)) <= targets


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
