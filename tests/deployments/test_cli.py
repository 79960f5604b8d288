"""Promise: whatever a person gets wrong costs one sentence on standard error and exit code 1 (2 for wrong usage), never a traceback,
and nothing is started."""

import json
import time
from importlib.metadata import version

import pytest
import yaml

from tests.requests_for_tests import REQUEST


def write(tmp_path, document):
    (tmp_path / "request.yaml").write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return tmp_path / "request.yaml"


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({**REQUEST, "colour": "red"}, "`colour` is no field (there are `model`, `store`, `data`, `base`, `init`, `sweep`, "),
        ({**REQUEST, "classes": ["cat"]}, "`classes` is no field (the classes are those of the snapshot)."),
        ({**REQUEST, "sweep": {"trails": 3}}, "`sweep.trails` is no field (did you mean `trials`?)."),
        ({**REQUEST, "base": {"arch": "a", "preprocess": {"sise": 8}}}, "`base.preprocess.sise` is no field (did you mean `size`?)"),
        ({**REQUEST, "base": None}, "`base` is empty, needed: fields."),
        ({**REQUEST, "base": {"arch": "timm:test_vit"}, "init": {"head": "zero_shot"}}, "is refused: `timm:test_vit` has no text tower"),
        ({key: REQUEST[key] for key in ("model", "store", "data")}, "`base` is missing"),
        ({**REQUEST, "sweep": {"trials": 0}}, "`sweep.trials` is 0, needed: at least 1 and at most 1000."),
        ({**REQUEST, "sweep": {"trials": "many"}}, "`sweep.trials` is 'many', needed: a whole number."),
        ({**REQUEST, "sweep": {"settings": {"smallest_crop": 0}}}, "`sweep.settings.smallest_crop` is 0, needed: above 0 and at most 1."),
        ({**REQUEST, "sweep": {"settings": {"schedule": "step"}}}, "is 'step', needed: 'cosine', 'constant' or 'linear'."),
        ({**REQUEST, "sweep": {"grid": {"seed": []}}}, "`sweep.grid.seed` is [], needed: entries, 1 or more."),
        (
            {**REQUEST, "sweep": {"space": {"learning_rate": {"log_uniform": ["low", 1]}}}},
            "`sweep.space.learning_rate.log_uniform.0` is 'low', needed: a number.",
        ),
        (
            {**REQUEST, "sweep": {"space": {"mixup": {"probability": 2, "value": 0, "otherwise": {"uniform": [0, 1]}}}}},
            "`sweep.space.mixup.probability` is 2, needed: at least 0 and at most 1.",
        ),
        ({**REQUEST, "sweep": {"space": {"learning_rate": 0.1}}}, "`sweep.space.learning_rate` is 0.1: no distribution; write choice"),
        (
            {**REQUEST, "sweep": {"space": {"learning_rate": {"log_uniform": [0, 1]}}}},
            "impossible",
        ),
        (
            {**REQUEST, "sweep": {"space": {"learning_rate": {"log_unifrm": [0.1, 1]}}}},
            "no distribution; write choice, uniform",
        ),
        ({**REQUEST, "model": "my photos"}, "`model` is 'my photos', needed: a name of letters"),
        ({**REQUEST, "store": "store"}, "`store` is 'store', needed: an address such as s3://bucket/photos"),
        ("model: [", "is not YAML: line 1, column 9: expected the node content, but found the end of the file."),
        ("model: a\nstore: b: c", "is not YAML: line 2, column 9: mapping values are not allowed here."),
        ("model: \0", "is not YAML: it holds characters that are no text."),
        ("", "is empty; start from one of deployments/requests/."),
        ("- model", "holds a list, not fields"),
        ("just words", "holds a single value, not fields"),
    ],
)
def test_a_bad_request_is_one_sentence(stockpot, tmp_path, document, said):
    code, out, err = stockpot("retrain", write(tmp_path, document))
    assert (code, out) == (1, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_missing_request_file(stockpot):
    code, _, err = stockpot("retrain", "nowhere.yaml")
    assert code == 1
    assert "There is no request file nowhere.yaml" in err


def test_a_request_that_is_no_text(stockpot, tmp_path):
    assert stockpot("retrain", tmp_path) == (1, "", f"The request {tmp_path} is a folder; give a YAML file.\n")
    (tmp_path / "cat.png").write_bytes(b"\x89PNG\xff")
    assert stockpot("retrain", tmp_path / "cat.png") == (1, "", f"The request {tmp_path}/cat.png is no text; give a YAML file.\n")


def test_no_prefect_address(stockpot, tmp_path):
    code, _, err = stockpot("retrain", write(tmp_path, REQUEST))
    assert code == 1
    assert "PREFECT_API_URL is not set" in err
    assert "stockpot stack up" in err


def test_no_prefect_server(stockpot, tmp_path, monkeypatch, closed_port):
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{closed_port}/api")
    code, _, err = stockpot("retrain", write(tmp_path, REQUEST))
    assert code == 1
    assert f"No Prefect server answers at PREFECT_API_URL=http://127.0.0.1:{closed_port}/api" in err


@pytest.mark.parametrize("words", [("status",), ("soup", "0123456789ab"), ("predict", "digits", "image.png")])
def test_no_mlflow_server(stockpot, tmp_path, monkeypatch, closed_port, words):
    (tmp_path / "image.png").write_bytes(b"not yet looked at")
    monkeypatch.setattr("deployments.surroundings.check_prefect", lambda: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    began = time.monotonic()
    code, _, err = stockpot(*words)
    assert code == 1
    assert f"MLFLOW_TRACKING_URI=http://127.0.0.1:{closed_port}" in err
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("words", [("status",), ("models",), ("predict", "digits", "image.png")])
def test_no_mlflow_address(stockpot, tmp_path, monkeypatch, words):
    (tmp_path / "image.png").write_bytes(b"not yet looked at")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, _, err = stockpot(*words)
    assert code == 1
    assert "MLFLOW_TRACKING_URI is not set, so there is no ledger; set it" in err


def test_wrong_usage_is_2(stockpot):
    assert stockpot("retrain")[0] == 2
    assert stockpot("retrein")[0] == 2
    assert stockpot("predict", "digits", "missing.png")[0] == 2


def test_the_ready_made_requests_are_valid():
    from deployments.deploying import ROOT
    from deployments.reading import read_request
    from stockpot.sweeps import draw

    for path in sorted((ROOT / "deployments" / "requests").glob("*.yaml")):
        assert draw(read_request(path).sweep), path


def test_json_is_one_document(stockpot, monkeypatch):
    from stockpot.ledger import connection, tracking
    from stockpot.outcomes import SweepSummary

    row = SweepSummary(
        sweep_id="a", model="digits", mlflow_run_id="b", trials=8, finished=8, status="FINISHED", started="2026-01-01T00:00:00+00:00"
    )
    monkeypatch.setattr(connection, "check_server", lambda: None)
    monkeypatch.setattr(tracking, "list_sweeps", lambda: [row])
    code, out, _ = stockpot("status", "--json")
    assert code == 0
    assert json.loads(out)[0]["sweep_id"] == "a"


def test_ctrl_c_is_one_sentence_even_in_the_middle_of_an_import(stockpot, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    def broken_class():
        try:
            interrupted()
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error

    for act in (interrupted, broken_class):
        monkeypatch.setattr("deployments.surroundings.check_prefect", act)
        code, _, err = stockpot("deploy")
        assert code == 130
        assert err == "Interrupted; what was finished is kept, and the same command goes on from there.\n"


def test_a_scheduled_request_is_checked_when_it_is_deployed(stockpot, tmp_path, monkeypatch):
    folder = tmp_path / "deployments"
    folder.mkdir()
    schedule = {"cron": "0 3 * * 1", "parameters": {"request": {**REQUEST, "modle": "digits"}}}
    document = {"deployments": [{"name": "stockpot", "entrypoint": "flows.retrain.retrain", "schedules": [schedule]}]}
    (folder / "prefect.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.setattr("deployments.deploying.ROOT", tmp_path)
    monkeypatch.setattr("deployments.surroundings.check_prefect", lambda: None)
    code, _, err = stockpot("deploy")
    assert code == 1
    assert "of a schedule of flows.retrain.retrain in deployments/prefect.yaml is refused: `modle` is no field" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("deployments: [", "deployments/prefect.yaml is not YAML: line 1, column 15: expected the node content"),
        ("name: stockpot\n", "deployments/prefect.yaml has no list `deployments`"),
        (None, "deployments/prefect.yaml cannot be read"),
    ],
)
def test_a_broken_deployment_file_is_one_sentence(stockpot, tmp_path, monkeypatch, text, said):
    (tmp_path / "deployments").mkdir()
    if text is not None:
        (tmp_path / "deployments" / "prefect.yaml").write_text(text)
    monkeypatch.setattr("deployments.deploying.ROOT", tmp_path)
    monkeypatch.setattr("deployments.surroundings.check_prefect", lambda: None)
    code, out, err = stockpot("deploy")
    assert (code, out, len(err.strip().splitlines())) == (1, "", 1)
    assert said in err


def test_the_version_is_told(stockpot):
    assert stockpot("--version") == (0, f"stockpot {version('stockpot')}\n", "")


@pytest.mark.parametrize("words", [(), ("stack", "up"), ("data", "publish"), ("retrain",), ("prune",)])
def test_flags_show_no_type_in_the_help(stockpot, words):
    code, out, _ = stockpot(*words, "--help")
    assert code == 0
    assert "--help" in out
    assert "bool" not in out
