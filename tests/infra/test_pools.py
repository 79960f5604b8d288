"""Promises: the ready-made work-pool templates are what Prefect's own workers accept, and a Kubernetes trial gets its GPU, its shared
memory and no root."""

import json
from typing import Any

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.workers.process import ProcessWorker
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from deployments.local.components import ROOT, pool_template

POOLS = ROOT / "deployments" / "pools"


def template(name: str) -> dict[str, Any]:
    return dict(json.loads((POOLS / name).read_text()))


async def manifest(values: dict[str, Any]) -> dict[str, Any]:
    nowhere = PrefectClient("http://127.0.0.1:9/api")  # only asked when a template names blocks or variables
    configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(template("kubernetes-gpu.json"), values, client=nowhere)
    return configuration.job_manifest


def test_the_process_template_is_prefects_own_with_a_working_directory() -> None:
    filled = pool_template()
    assert filled["variables"]["properties"]["working_dir"]["default"] == str(ROOT)
    assert filled["job_configuration"] == ProcessWorker.get_default_base_job_template()["job_configuration"]


def test_the_kubernetes_template_keeps_every_variable_of_prefects_own() -> None:
    theirs, ours = KubernetesWorker.get_default_base_job_template(), template("kubernetes-gpu.json")
    assert set(ours["variables"]["properties"]) == set(theirs["variables"]["properties"]) | {
        "gpus",
        "shared_memory",
        "secret",
        "node_selector",
    }
    assert {**theirs["job_configuration"], "job_manifest": 0} == {**ours["job_configuration"], "job_manifest": 0}


async def render(values: dict[str, Any]) -> dict[str, Any]:
    return (await manifest(values))["spec"]["template"]["spec"]


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_trial_gets_the_gpus_it_asks_for(gpus: int) -> None:
    pod = anyio.run(render, {"gpus": gpus} if gpus > 1 else {})
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
    assert container["image"] == "stockpot-gpu"
    assert container["envFrom"] == [{"secretRef": {"name": "stockpot"}}]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["restartPolicy"] == "Never"


def test_a_crashed_trial_is_not_restarted_by_kubernetes_too() -> None:
    assert anyio.run(manifest, {})["spec"]["backoffLimit"] == 0
