"""A request as a person wrote it: read from YAML, and every field that is wrong told with what is needed there."""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stockpot.config import RetrainRequest
from stockpot.errors import BadRequest
from stockpot.fields import ADDRESS, NAME


def read_request(path: Path) -> RetrainRequest:
    """A request from a YAML file. Raises `BadRequest` naming every field that is wrong."""
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise BadRequest(f"There is no request file {path}; deployments/requests/ has ready-made ones.") from error
    except OSError as error:
        what = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise BadRequest(f"The request {path} {what}; give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise BadRequest(f"The request {path} is no text; give a YAML file.") from error
    except yaml.YAMLError as error:
        raise BadRequest(f"The request {path} is not YAML: {syntax(error)}.") from error
    return as_request(document, str(path))


def syntax(error: yaml.YAMLError) -> str:
    """Where a text stops being YAML, and what was expected there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "it holds characters that are no text"
    told = str(error.problem).replace("'<stream end>'", "the end of the file").replace("<block end>", "the end of the block")
    return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {told}"


def as_request(document: Any, source: str) -> RetrainRequest:
    """The request that `source` holds as plain fields. Raises `BadRequest` naming every field that is wrong."""
    if not isinstance(document, dict):
        what = "is empty" if document is None else f"holds {'a list' if isinstance(document, list) else 'a single value'}, not fields"
        raise BadRequest(f"The request {source} {what}; start from one of deployments/requests/.")
    try:
        return RetrainRequest.model_validate(document)
    except ValidationError as error:
        raise BadRequest(f"The request {source} is refused: {'; '.join(_problem(one) for one in error.errors())}.") from error


PATTERNS = {
    NAME: "a name of letters, digits, `.`, `_` and `-`",
    ADDRESS: "an address such as s3://bucket/photos, file:///data/photos or /data/photos",
}
"""What the patterns of `stockpot.config` mean, for people."""

FORMS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dict": "fields",
    "model": "fields",
}
"""What pydantic misses, by how its errors' types begin."""

BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
"""How a schema limits a number. An exclusive bound comes behind the inclusive one that it narrows."""


def _problem(error: Any) -> str:
    place = [part for part in error["loc"] if not str(part).startswith("<")]  # less the tags of `stockpot.spaces`
    where, found = ".".join(map(str, place)), "empty" if error["input"] is None else repr(error["input"])
    match error["type"]:
        case "extra_forbidden":
            return f"`{where}` is no field ({_instead(place)})"
        case "missing":
            return f"`{where}` is missing"
        case "value_error":
            return f"`{where}`: {error['ctx']['error']}" if where else str(error["ctx"]["error"])
    if needed := _needed(error, place):
        return f"`{where}` is {found}, needed: {needed}"
    return f"`{where}` is {found}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _instead(place: Sequence[Any]) -> str:
    """Which field may have been meant by one that there is not."""
    if place[-1] == "classes":
        return "the classes are those of the snapshot"
    names = list(dict.fromkeys(name for one in schemas(place[:-1]) for name in one.get("properties", ())))
    near = get_close_matches(str(place[-1]), names)
    told = [f"`{name}`" for name in near or names]
    return f"did you mean {' or '.join(told)}?" if near else f"there are {', '.join(told)}"


def _needed(error: Any, place: Sequence[Any]) -> str:
    """What belongs there, in our words; empty where we have none."""
    match error["type"]:
        case "string_pattern_mismatch":
            return PATTERNS[error["ctx"]["pattern"]]
        case "literal_error":
            return str(error["ctx"]["expected"])
        case "too_short":
            return f"entries, {error['ctx']['min_length']} or more"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            told = {one[key]: f"{word} {one[key]}" for one in schemas(place) for key, word in BOUNDS.items() if key in one}
            return " and ".join(told.values())
    return FORMS.get(error["type"].split("_")[0], "")


def schemas(place: Sequence[Any]) -> list[dict[str, Any]]:
    """What the request's JSON schema says of the field at this place: once for each form that it may have."""
    root = _schema()
    found = [root]
    for part in place:
        inner = [one.get("properties", {}).get(part) or one.get("additionalProperties") or one.get("items") or {} for one in found]
        found = [form for one in inner for form in _forms(one, root["$defs"])]
    return found


@cache
def _schema() -> dict[str, Any]:
    return RetrainRequest.model_json_schema()


def _forms(schema: dict[str, Any], nouns: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in schema:
        return _forms(nouns[schema["$ref"].rpartition("/")[2]], nouns)
    return [form for one in schema.get("anyOf", schema.get("oneOf", ())) for form in _forms(one, nouns)] or [schema]
