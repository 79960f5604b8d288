"""Every field of a request with what it means, what may stand there and its default, as YAML to fill in: made from the model itself."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from deployments.reading import BOUNDS, schemas
from stockpot.config import RetrainRequest

WIDTH = 120
KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
    "object": "fields",
    "null": "null",
}
"""What JSON schema's types are called."""


def template() -> str:
    """The request of defaults, in which what is needed is left empty."""
    return "\n".join(_fields(RetrainRequest, ()))


def _fields(model: type[BaseModel], place: tuple[str, ...]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner, default = _noun(field.annotation), field.get_default(call_default_factory=True)
        below = [f"{name}:", *textwrap.indent("\n".join(_fields(inner, (*place, name))), "  ").splitlines()] if inner else []
        needed = "" if inner else f" ({'needed: ' if field.is_required() else ''}{_range((*place, name))})"
        meaning = re.sub(r"\bNone\b", "null", field.description or "")  # as YAML has it
        yield from textwrap.wrap(f"{meaning}{needed}", WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        if inner and (field.is_required() or default is not None):
            yield from below
        elif field.is_required():
            yield f"{name}:"
        else:
            yield f"{name}: {_plain(default)}"
            yield from (f"# {line}" for line in below)


def _noun(annotation: Any) -> type[BaseModel] | None:
    """The record a field holds, be it optional."""
    return next((one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _range(place: tuple[str, ...]) -> str:
    """What may stand there, as the schema limits it."""
    return " or ".join(dict.fromkeys(_form(one) for one in schemas(place) if one))


def _form(schema: dict[str, Any]) -> str:
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(map(str, values))
    if within := schema.get("items", {}).get("enum"):
        return f"a list of {', '.join(map(str, within))}"
    bounds = {schema[key]: f"{word} {schema[key]}" for key, word in BOUNDS.items() if key in schema}
    return f"{KINDS[schema['type']]} {' and '.join(bounds.values())}".rstrip()


def _plain(value: Any) -> str:
    """As YAML, on one line."""
    return yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
