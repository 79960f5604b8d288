"""A Prefect server of this folder's own, and deployments on it that no worker serves."""

import asyncio

import pytest
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness


@pytest.fixture(scope="package")
def server():
    with prefect_test_harness(server_startup_timeout=300):
        yield


@pytest.fixture(scope="package")
def deploy(server):
    """Puts a flow on the server under a deployment's name."""

    async def put(flow, name):
        schema = {"type": "object", "properties": {}}
        async with get_client() as client:
            flow_id = await client.create_flow(flow)
            await client.create_deployment(flow_id=flow_id, name=name, parameter_openapi_schema=schema, enforce_parameter_schema=False)

    return lambda flow, name: asyncio.run(put(flow, name))
