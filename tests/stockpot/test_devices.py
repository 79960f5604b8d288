"""Promise: one GPU per trial, held by a lock that ends with the process, however it ends."""

import os
import signal
import subprocess
import sys

import pytest

from stockpot.devices import claimed_gpu
from stockpot.errors import DeviceBusy

HOLDER = """
import sys, time
from pathlib import Path
from stockpot.devices import claimed_gpu
with claimed_gpu(Path(sys.argv[1])) as device:
    print(device, flush=True)
    time.sleep(60)
"""


def test_two_trials_get_two_devices_and_a_third_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with claimed_gpu(tmp_path) as first:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with claimed_gpu(tmp_path) as second:
            assert {first, second} == {0, 1}
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
            with pytest.raises(DeviceBusy, match="All 2 GPUs of this node are held"), claimed_gpu(tmp_path, wait_s=0):
                pass


def test_a_node_without_gpus_claims_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with claimed_gpu(tmp_path) as device:
        assert device is None
    assert list(tmp_path.iterdir()) == []


def test_a_killed_trial_gives_its_device_back(tmp_path, monkeypatch):
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], env=environ, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "0"
        with pytest.raises(DeviceBusy), claimed_gpu(tmp_path, wait_s=0):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=10)
    with claimed_gpu(tmp_path) as device:
        assert device == 0
