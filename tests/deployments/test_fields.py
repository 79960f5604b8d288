"""Promise: `stockpot request` prints every field there is, and what it prints is a request: of the defaults, once its gaps are filled."""

import re

import pytest
import yaml

from deployments.fields import template
from deployments.reading import as_request
from stockpot.config import RetrainRequest
from stockpot.errors import BadRequest

NEEDED = {"model": "photos", "store": "/store", "data": {"snapshot": "/photos"}, "base": {"arch": "ViT-B-32"}}


def filled(text):
    document = yaml.safe_load(text)
    for name, value in NEEDED.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else value
    return document


def described(model):
    for field in model.model_fields.values():
        yield field.description
        for one in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(one, "model_fields"):
                yield from described(one)


def test_what_is_printed_is_the_request_of_all_defaults_once_what_is_needed_is_filled_in(stockpot):
    code, out, err = stockpot("request")
    assert (code, err) == (0, "")
    assert as_request(filled(out), "it") == RetrainRequest.model_validate(NEEDED)
    gaps = r"`model` is empty.*; `store` is empty.*; `data\.snapshot` is empty.*; `base\.arch` is empty[^`]*$"
    with pytest.raises(BadRequest, match=gaps):
        as_request(yaml.safe_load(out), "it")


def test_every_field_is_told_with_its_range():
    told = " ".join(re.sub(r"^[ #]*", "", line) for line in template().splitlines())
    meanings = [re.sub(r"\bNone\b", "null", sentence) for sentence in described(RetrainRequest)]
    assert [sentence for sentence in meanings if sentence not in told] == []
    assert "(a number above 0 and below 1) learning_rate: 2.0e-05" in told
    assert "(needed: a whole number at least 1 and at most 4096) size:" in told
    assert "(fp32, bf16, fp16) precision: fp32" in told


def test_an_optional_part_is_there_to_be_uncommented():
    text = template()
    (part,) = re.findall(r"^  stop: null\n((?:  # .*\n?)+)", text, flags=re.MULTILINE)
    spoken = text.replace(f"  stop: null\n{part}", re.sub("^  # ", "  ", part, flags=re.MULTILINE))
    document = filled(spoken.replace("below:", "below: 0.0005"))
    document["sweep"]["trials"] = 16
    stop = as_request(document, "it").fan_out.stop
    assert stop is not None
    assert (stop.below, stop.after) == (0.0005, 8)
