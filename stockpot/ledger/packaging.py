"""What lies behind a version: an MLflow model directory of one file of code, the weights and their config, pinned requirements and a
signature; and the trial of such a directory, as a service would load it. Nothing in it is pickled.
"""

import base64
import json
import math
import shutil
import warnings
from importlib.metadata import packages_distributions
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property

from stockpot.errors import RegistryError

SERVED_FILE = Path(__file__).with_name("served_model.py")
"""What every version carries as its code."""
SERVED_TEXT_FILE = Path(__file__).with_name("served_text.py")
"""The same of a text encoder."""

# What those files import.
SERVED_WITH = ("mlflow", "torch", "torchvision", "open_clip_torch", "timm", "safetensors", "numpy", "pandas", "pillow")
TEXT_SERVED_WITH = ("mlflow", "torch", "transformers", "safetensors", "numpy", "pandas")

GREY_PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mOoBwAAgQCAfhwpxwAAAABJRU5ErkJggg==")
"""One grey pixel: the smallest image."""


def package(scratch: Path, folder: Path, model_id: str, mlflow_run_id: str, torch_export: bool) -> Path:
    """The MLflow model directory. MLmodel records where its code came from, so the file is copied to a neutral place first."""
    code = scratch / "served_model.py"
    config = json.loads((folder / "model.json").read_text())
    shutil.copyfile(SERVED_TEXT_FILE if _is_text(config) else SERVED_FILE, code)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example.*")  # an image in every version, for a schema that is written above
        mlflow.pyfunc.save_model(
            str(scratch / "model"),
            python_model=str(code),
            artifacts={"soup": str(folder)},
            mlflow_model=Model(model_id=model_id, run_id=mlflow_run_id),
            signature=signature(config),
            pip_requirements=requirements(config),
        )
    if torch_export:
        _add_torch_flavour(scratch / "model", folder)
    return scratch / "model"


def try_out(package: Path) -> None:
    """Load a downloaded version as a consumer does and ask it about one image or text. Raises `RegistryError` when it does not answer."""
    try:
        config = json.loads(next(package.glob("artifacts/*/model.json")).read_bytes())
        (answer,) = mlflow.pyfunc.load_model(str(package)).predict([_smallest_input(config)])
        found = "" if math.isfinite(answer["probability"]) else f"its probability is {answer['probability']}"
    except Exception as error:  # whatever the code and the files of a registered version may raise
        raise RegistryError(f"The model does not answer when loaded as a service loads it ({error}); it gets no alias.") from error
    if found:
        raise RegistryError(f"The model gives no usable answer ({found}); it gets no alias.")


def signature(config: dict[str, Any]) -> ModelSignature:
    """One column in, binary `image` or lists of ids `tokens`, with `top_k` as a parameter; a label, its probability, and the `top_k`
    likeliest of both out.

    A version with a text tower takes `labels` and `templates` too, and then answers about those.
    """
    top = Array(Object([Property("label", DataType.string), Property("probability", DataType.double)]))
    outputs = Schema([ColSpec(DataType.string, "label"), ColSpec(DataType.double, "probability"), ColSpec(top, "top")])
    texts = {"labels": [], "templates": ["a photo of a {}."]} if config.get("keep_text") else {}
    params = [ParamSpec("top_k", DataType.long, 1), *(ParamSpec(name, DataType.string, value, (-1,)) for name, value in texts.items())]
    inputs = ColSpec(Array(DataType.long), "tokens") if _is_text(config) else ColSpec(DataType.binary, "image")
    return ModelSignature(inputs=Schema([inputs]), outputs=outputs, params=ParamSchema(params))


def requirements(config: dict[str, Any]) -> list[str]:
    """What the served file imports for a model of that config, pinned to what is installed here (without a build's local suffix).

    A backbone of the user's own brings the package it is imported from, if it was installed as one.
    """
    own = config["arch"]["name"].partition(":")[0].partition(".")[0] if config.get("kind") == "imported" else ""
    theirs = packages_distributions().get(own, ()) if own else ()  # it opens every installed package
    names = TEXT_SERVED_WITH if _is_text(config) else (*SERVED_WITH, *theirs)
    return [f"{name}=={installed(name).partition('+')[0]}" for name in names]


def _is_text(config: dict[str, Any]) -> bool:
    return bool(config.get("kind") == "transformers")


def _smallest_input(config: dict[str, Any]) -> dict[str, Any]:
    """One row that every version of that config answers."""
    if not _is_text(config):
        return {"image": GREY_PNG}
    tokens = config["preprocess"]
    return {"tokens": [(tokens["padding"] + 1) % tokens["vocabulary"]]}


def _add_torch_flavour(package: Path, folder: Path) -> None:
    """MLflow's own `pytorch` flavour reads `model.pt2` in its data folder, and checks it to be free of pickle; it has none for
    safetensors (mlflow/pytorch/__init__.py, 3.17.2)."""
    from stockpot.ledger import served_model

    (package / "pytorch").mkdir()
    served_model.export(folder, package / "pytorch" / "model.pt2")
    described = Model.load(str(package))
    described.add_flavor("pytorch", model_data="pytorch", pytorch_version=installed("torch"), code=None)
    described.save(str(package / "MLmodel"))
