"""One real stack for all flow tests: Prefect, MLflow, SeaweedFS and both workers, with the flows deployed and the digits published.

The base model is a tiny CLIP tower with random weights: these tests are about the path, not about accuracy.
"""

import json
import os

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.demo.digits import PREPROCESS, publish_digits
from deployments.deploying import deploy_all
from deployments.stack import local_stack
from stockpot import storage
from stockpot.config import RetrainRequest

ARCH = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {
        "size": 32,
        "mean": PREPROCESS.mean,
        "std": PREPROCESS.std,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


@pytest.fixture(scope="session")
def stack(tmp_path_factory):
    before = dict(os.environ)
    with local_stack(tmp_path_factory.mktemp("stack")) as running:
        os.environ.update(running.environ)
        try:
            with temporary_settings({PREFECT_API_URL: running.environ["PREFECT_API_URL"]}):
                deploy_all()
                yield running
        finally:
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture(scope="session")
def uris(stack):
    storage.write_bytes("s3://stockpot/bases/tiny.json", json.dumps(ARCH).encode())
    return publish_digits("s3://stockpot/digits-10", 10)


@pytest.fixture
def request_for(uris):
    """Build a request: `request_for("model", seeds=(1, 2), epochs=1)` has one trial per seed."""

    def make(model, *, seeds, epochs=1, augmentations=("none",), **fan_out):
        space = {"seed": {"choice": [seeds[0]]}} if len(seeds) == 1 else {}
        return RetrainRequest.model_validate(
            {
                "model": model,
                "store": "s3://stockpot/store",
                "data": {"snapshot": uris["snapshot"], "test": uris["test"], "shifts": uris["shifts"]},
                "base": {"arch": "s3://stockpot/bases/tiny.json"},
                "init": {"head": "random"},
                "sweep": {
                    "trials": len(seeds),
                    "settings": {
                        "seed": seeds[0],
                        "epochs": epochs,
                        "batch_size": 64,
                        "learning_rate": 1e-3,
                        "warmup_steps": 1,
                        "augmentation": augmentations[0],
                    },
                    "space": {**space, **({"augmentation": {"choice": list(augmentations)}} if len(augmentations) > 1 else {})},
                },
                "fan_out": {"quorum": 1.0, "attempts": 2, "retry_delay_s": 5, **fan_out},
            }
        )

    return make
