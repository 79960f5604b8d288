"""Classify files with a registered version, the way a service does: `mlflow.pyfunc.load_model`, image bytes in, labels out."""

import re
from pathlib import Path
from typing import Any

from stockpot.errors import BadRequest


def predict_files(model: str, files: list[Path], top_k: int = 1) -> list[dict[str, Any]]:
    """One row per image, or per text as token ids (`.npy`): file, label, probability, and the `top_k` likeliest of both. `model` is a name
    (its champion), name@alias or name/version."""
    from stockpot.ledger import connection, registry

    connection.check_server()
    loaded = registry.load(model)
    (column,) = loaded.metadata.get_input_schema().input_names()
    inputs = [{column: _tokens(path) if column == "tokens" else path.read_bytes()} for path in files]
    try:
        answers = loaded.predict(inputs, params={"top_k": top_k})
    except ValueError as error:
        said = re.sub(r"^row (\d+)", lambda row: str(files[int(row[1])]), str(error))
        raise BadRequest(f"{model} refused the {'texts' if column == 'tokens' else 'images'}: {said}") from error
    return [{"text" if column == "tokens" else "image": str(path), **answer} for path, answer in zip(files, answers, strict=True)]


def _tokens(path: Path) -> list[int]:
    from stockpot.data.images import Undecodable
    from stockpot.data.tokens import decode

    try:
        ids: list[int] = decode(path.read_bytes()).tolist()
    except Undecodable as reason:
        raise BadRequest(f"{path} {reason}; the model takes token ids, one row of integers saved by numpy.") from reason
    return ids
