"""Classify files with a registered version, the way a service does: `mlflow.pyfunc.load_model`, image bytes in, labels out."""

import re
from pathlib import Path
from typing import Any

from stockpot.errors import BadRequest


def predict_files(model: str, images: list[Path], top_k: int = 1) -> list[dict[str, Any]]:
    """One row per image: file, label, probability, and the `top_k` likeliest of both. `model` is a name (its champion), name@alias or
    name/version."""
    from stockpot.ledger import connection, registry

    connection.check_server()
    loaded = registry.load(model)
    try:
        answers = loaded.predict([{"image": path.read_bytes()} for path in images], params={"top_k": top_k})
    except ValueError as error:
        said = re.sub(r"^row (\d+)", lambda row: str(images[int(row[1])]), str(error))
        raise BadRequest(f"{model} refused the images: {said}") from error
    return [{"image": str(path), **answer} for path, answer in zip(images, answers, strict=True)]
