"""Promise: a request that no machine could carry out is refused at once, with the field and the reason; identity covers what decides
a result and nothing else."""

import pytest
from pydantic import ValidationError

from stockpot.config import RetrainRequest, SweepSpec, sweep_id
from tests.requests_for_tests import DATA, INIT, REQUEST


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": "red"}, "colour"),
        ({"model": "two words"}, "model"),
        ({"store": "not a uri"}, "store"),
        ({"sweep": {"trials": 0}}, "greater than or equal to 1"),
        ({"sweep": {"space": {"learning_rat": {"choice": [1]}}}}, "`learning_rat` is no trial setting"),
        ({"sweep": {"space": {"learning_rate": {"log_uniform": [0, 1]}}}}, "needs 0 < lowest <= highest"),
        ({"sweep": {"space": {"mixup": {"uniform": [0.9, 0.1]}}}}, "the lowest value must come first"),
        ({"sweep": {"space": {"optimiser": {"choice": []}}}}, "at least 1 item"),
        ({"sweep": {"settings": {"optimiser": "adamv"}}}, "Input should be 'adamw'"),
        ({"sweep": {"settings": {"momentum": 0.9}}}, "Extra inputs are not permitted"),
        ({"base": {"arch": "timm:test_vit", "text_tower": "keep"}}, "has no text tower to keep"),
        ({"init": {"templates": ["a photo"]}}, "has no `{}`"),
        ({"init": {"templates": ["{} {x}"]}}, "template '{} {x}' has braces other than one `{}`"),
        ({"init": {"templates": ["{} {}"]}}, "has braces other than one `{}`"),
        ({"init": {"templates": ["{} {"]}}, "has braces other than one `{}`"),
        ({"init": {"templates": ["a {{}}"]}}, "has braces other than one `{}`"),
        ({"fan_out": {"quorum": 1.5}}, "less than or equal to 1"),
        ({"fan_out": {"sharded": True}}, "cuts a model over the GPUs of a trial, which has one"),
        ({"fan_out": {"stop": {"below": 0.001}}}, "asks after 8 finished trials and the sweep has 8, so it could spare none"),
    ],
)
def test_a_bad_request_is_refused_by_name(change, said):
    with pytest.raises(ValidationError, match="(?s).*" + said.replace("{", r"\{").replace("}", r"\}")):
        RetrainRequest.model_validate({**REQUEST, **change})


def test_every_field_of_the_form_says_what_it_is():
    schema = RetrainRequest.model_json_schema()
    nouns = {"RetrainRequest": schema, **schema["$defs"]}
    silent = [
        f"{noun}.{field}"
        for noun, body in nouns.items()
        for field, about in body.get("properties", {}).items()
        if "description" not in about
    ]
    assert silent == []


def test_identity_ignores_how_a_sweep_is_run_and_sees_what_decides_it():
    plain = RetrainRequest.model_validate(REQUEST)
    hurried = plain.model_copy(update={"fan_out": plain.fan_out.model_copy(update={"deadline_s": 60})})
    longer = plain.model_copy(update={"sweep": SweepSpec(trials=9)})
    assert sweep_id(plain, DATA, INIT) == sweep_id(hurried, DATA, INIT)
    assert sweep_id(plain, DATA, INIT) != sweep_id(longer, DATA, INIT)
    assert sweep_id(plain, DATA, INIT) != sweep_id(plain, DATA, INIT.model_copy(update={"digest": "c" * 64}))
