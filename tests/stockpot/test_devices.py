"""Promise: as many GPUs as a trial asks for, held by locks that end with the process, however it ends."""

import os
import signal
import subprocess
import sys

import pytest

from stockpot.devices import claimed_gpus
from stockpot.errors import BadRequest, DeviceBusy
from tests.waiting import PATIENCE_S

HOLDER = """
import sys, time
from pathlib import Path
from stockpot.devices import claimed_gpus
with claimed_gpus(1, Path(sys.argv[1])) as (device,):
    print(device, flush=True)
    time.sleep(600)
"""


def test_two_trials_get_two_devices_and_a_third_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with claimed_gpus(1, tmp_path) as first:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with claimed_gpus(1, tmp_path) as second:
            assert {*first, *second} == {"0", "1"}
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
            with pytest.raises(DeviceBusy, match="2 of 2 GPUs of this node are held"), claimed_gpus(1, tmp_path, wait_s=0):
                pass


def test_a_node_without_gpus_claims_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with claimed_gpus(1, tmp_path) as device:
        assert device == ()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_trial_gives_its_device_back(tmp_path, monkeypatch):
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], env=environ, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "0"
        with pytest.raises(DeviceBusy), claimed_gpus(1, tmp_path, wait_s=0):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=PATIENCE_S)
    with claimed_gpus(1, tmp_path) as device:
        assert device == ("0",)


def test_a_trial_claims_all_its_gpus_or_none(tmp_path, monkeypatch):
    def node():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")

    node()
    with claimed_gpus(2, tmp_path) as held:
        assert held == ("0", "1")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
        node()
        with pytest.raises(DeviceBusy, match=r"2 of 3 GPUs of this node are held .* 2 are asked for"), claimed_gpus(2, tmp_path, wait_s=0):
            pass
        node()
        with claimed_gpus(1, tmp_path, wait_s=0) as left:
            assert left == ("2",)
    node()
    with pytest.raises(BadRequest, match="asks for 4 GPUs, this node has 3"), claimed_gpus(4, tmp_path):
        pass
