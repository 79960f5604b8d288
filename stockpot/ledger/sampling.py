"""System metrics of a trial: CPU, memory, disk, network and GPU through MLflow's own monitors, handed to the trial's log like any other
curve (`system/*`), so that a dead server cannot stop them. A short interval, so that a trial of ten seconds has some.
"""

import threading
from collections.abc import Callable
from contextlib import suppress

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

Log = Callable[[dict[str, float], int], None]


class Sampler:
    """A thread that calls `log({"system/...": value}, sample_number)` every `every_s` seconds until `close`."""

    def __init__(self, log: Log, every_s: float = 2.0) -> None:
        self._log = log
        self._every_s = every_s
        self._stop = threading.Event()
        self._monitors = _monitors()
        self._thread = threading.Thread(target=self._run, name="stockpot-sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take one last sample and stop."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        sample = 0
        while not self._stop.wait(self._every_s):
            self._log(self._sample(), sample)
            sample += 1
        self._log(self._sample(), sample)

    def _sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        return values


def _monitors() -> list[BaseMetricsMonitor]:
    """One monitor a resource; the GPU's only where the driver answers."""
    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(RuntimeError):
        monitors.append(GPUMonitor())
    return monitors
