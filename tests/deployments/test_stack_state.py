"""Promises: a page keeps its address across restarts, a port that was asked for is never swapped silently, two stacks never share a
state directory, and nothing secret is readable by others."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deployments import stack
from deployments.local import state as kept
from stockpot.errors import PortTaken, StackError, StackRunning


def listening() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def test_ports_are_remembered_and_all_different(tmp_path: Path) -> None:
    first = kept.choose_ports(tmp_path, {})
    assert len(set(first.values())) == len(kept.PORTS)
    assert all(port in kept.RANGE for port in first.values())
    assert kept.choose_ports(tmp_path, {}) == first


def test_a_remembered_port_that_is_taken_is_replaced_alone(tmp_path: Path) -> None:
    first = kept.choose_ports(tmp_path, {})
    with socket.socket() as server:
        server.bind(("127.0.0.1", first["mlflow"]))
        server.listen()
        second = kept.choose_ports(tmp_path, {})
    assert second["mlflow"] != first["mlflow"]
    assert {**second, "mlflow": 0} == {**first, "mlflow": 0}


def test_a_port_asked_for_is_used_and_remembered(tmp_path: Path) -> None:
    with listening() as server:
        port = server.getsockname()[1]
    assert kept.choose_ports(tmp_path, {"prefect": port})["prefect"] == port
    assert kept.choose_ports(tmp_path, {})["prefect"] == port


def test_a_port_asked_for_that_is_taken_is_refused(tmp_path: Path) -> None:
    with listening() as server, pytest.raises(PortTaken, match=r"Port \d+ was asked for prefect, but another process listens on it; end"):
        kept.choose_ports(tmp_path, {"prefect": server.getsockname()[1]})


def test_a_start_that_is_refused_its_port_leaves_no_folder(tmp_path):
    state = tmp_path / "state"
    with listening() as server:
        asked = {"prefect": server.getsockname()[1]}
        with pytest.raises(PortTaken):
            stack.start_detached(state, ports=asked)
        with pytest.raises(PortTaken), stack.local_stack(state, ports=asked):
            pass
    assert not state.exists()


def test_credentials_are_made_once_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    key, secret = kept.credentials(tmp_path)
    assert (key, secret) == kept.credentials(tmp_path)
    assert len(secret) >= 30
    assert (tmp_path / "s3.json").stat().st_mode & 0o077 == 0


def test_two_state_directories_have_different_credentials(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert kept.credentials(tmp_path / "a") != kept.credentials(tmp_path / "b")


def test_a_second_stack_is_refused_with_the_addresses_of_the_first(tmp_path: Path) -> None:
    lock = kept.Lock(tmp_path)
    me = {"pid": os.getpid(), "created": psutil.Process().create_time()}
    kept.write_running(tmp_path, {**me, "addresses": {"Prefect": "http://127.0.0.1:4200"}})
    with pytest.raises(
        StackRunning, match=r"already runs on .*Prefect http://127.0.0.1:4200\); use it, or end it with `stockpot stack down`"
    ):
        kept.Lock(tmp_path)
    lock.release()
    kept.Lock(tmp_path).release()


def test_a_lock_whose_owner_is_dead_is_waited_for(tmp_path: Path) -> None:
    lock = kept.Lock(tmp_path)
    kept.write_running(tmp_path, {"pid": 2**22 - 1, "created": 0.0, "addresses": {}})
    with pytest.raises(StackRunning):
        kept.Lock(tmp_path, wait_s=0.3)
    lock.release()


def test_a_supervisor_that_waits_to_be_reaped_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    me = {"pid": child.pid, "created": process.create_time()}
    assert kept.alive(me)
    child.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    assert not kept.alive(me)
    child.communicate()


def test_a_process_id_given_to_another_process_is_not_the_supervisor() -> None:
    assert not kept.alive({"pid": os.getpid(), "created": psutil.Process().create_time() - 60})
    assert not kept.alive({})


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_text("{")
    with pytest.raises(StackError, match=r"ports.json is not JSON .*; delete it"):
        kept.choose_ports(tmp_path, {})


def test_nothing_partial_is_left_beside_a_written_file(tmp_path: Path) -> None:
    kept.write_running(tmp_path, {"pid": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]
    assert json.loads((tmp_path / "stack.json").read_text()) == {"pid": 1}
