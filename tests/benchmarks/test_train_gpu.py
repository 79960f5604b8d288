"""Promise: the benchmark for GPUs runs, here in its smallest shape on a CPU, and says in a sentence where it cannot."""

import subprocess
import sys

import pytest
import torch

from benchmarks.train_gpu import TINY, measure


def test_the_smallest_shape_gives_every_figure():
    found = measure(TINY, "cpu")
    assert sorted(found) == ["train_gpu.vit_tiny_input", "train_gpu.vit_tiny_mfu", "train_gpu.vit_tiny_vs_bare"]
    for figure in found.values():
        assert figure["ratio"] > 0
        assert figure["card"] == "CPU"
        assert {"unit", "peer", "repeats", "spread"} <= set(figure)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence():
    run = subprocess.run([sys.executable, "-m", "benchmarks", "--gpu"], check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert "This machine has no GPU that PyTorch can use" in run.stderr
    assert "Traceback" not in run.stderr
