"""The part of requirements.lock that an image needs: no development tools, and for machines without a GPU no CUDA.

    python infra/runtime_lock.py [--without-cuda] < requirements.lock > runtime.lock

Who needs what is read from the `# via` notes that uv writes under every package. PyPI's Linux builds of torch all need CUDA, so
`--without-cuda` leaves torch and torchvision to be installed from PyTorch's own builds, in the versions it prints on standard error.
"""

import re
import sys
from collections.abc import Iterator

ROOT = "stockpot (pyproject.toml)"
"""How uv names the project's own dependencies and extras; the development group is `stockpot (pyproject.toml:dev)`."""
CUDA = re.compile(r"(nvidia-(?!ml-py$).*|cuda-.*|triton)$")
ELSEWHERE = ("torch", "torchvision")


def blocks(lock: str) -> Iterator[tuple[str, str]]:
    """Name and lines of every package. One that is locked in several versions comes several times."""
    for block in re.split(r"\n(?=[a-z0-9])", lock.strip()):
        yield block.split("==")[0], block + "\n"


def needed(lock: str, *, cuda: bool) -> list[tuple[str, str]]:
    """The packages, in the lock's order, that the project needs when it runs."""
    wanted_by = {name: set[str]() for name, _ in blocks(lock)}
    for name, block in blocks(lock):
        wanted_by[name] |= {via.strip() for via in re.findall(r"^    #(?: via|  ) +(\S.*)$", block, re.MULTILINE)}
    reached = {ROOT}
    while grown := {name for name, by in wanted_by.items() if name not in reached and by & reached and (cuda or not CUDA.match(name))}:
        reached |= grown
    return [(name, block) for name, block in blocks(lock) if name in reached]


def main(arguments: list[str]) -> None:
    """Lock on standard input, its part on standard output."""
    cuda = "--without-cuda" not in arguments
    for name, block in needed(sys.stdin.read(), cuda=cuda):
        if cuda or name not in ELSEWHERE:
            sys.stdout.write(block)
        else:
            sys.stderr.write(block.split()[0] + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
