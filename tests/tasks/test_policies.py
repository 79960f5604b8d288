"""Promise: what the library says in a process of its own is heard where the process was started."""

import asyncio
import logging

import pytest

from tasks.policies import in_own_process


def talking(number: int) -> int:
    """Stands for a library call."""
    logging.getLogger("stockpot.somewhere").info("half of %d is %d", number, number // 2)
    return number // 2


@pytest.mark.slow
def test_the_lines_of_another_process_are_told_before_its_answer():
    lines: list[str] = []
    assert asyncio.run(in_own_process(talking, 8, say=lines.append)) == 4
    assert lines == ["half of 8 is 4"]
    assert asyncio.run(in_own_process(talking, 6)) == 3
    assert len(lines) == 1
