"""Promise: somebody with texts and the command line has a champion that reads them: class folders of token ids become a snapshot, a request
of the paper's text search a sweep, its soup a version, and `stockpot predict` tells a text's topic.

Everything is real: servers, workers, commands. The encoder is a tiny BERT with random weights.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny_texts import BERT, LENGTH, TOPICS, texts

pytestmark = [pytest.mark.slow, pytest.mark.stack, pytest.mark.timeout(2400)]

SEARCH = Path(__file__).parents[2] / "deployments" / "requests" / "text_search.yaml"


def stockpot(*words: object) -> str:
    command = [sys.executable, "-c", "from deployments.cli import main; main()", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_texts_become_a_champion_by_the_command_line(stack, tmp_path):
    for number, text in enumerate(texts(150)):
        path = tmp_path / "texts" / TOPICS[text.label] / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.data)
    stockpot("data", "publish", tmp_path / "texts", "s3://stockpot/topics", "--held-out", 40, "--gate", 20)
    (tmp_path / "bert.json").write_text(json.dumps(BERT))

    request = yaml.safe_load(SEARCH.read_text())
    request |= {"model": "topics", "data": {"snapshot": "s3://stockpot/topics"}}
    request["base"] = {"arch": f"transformers:{tmp_path}/bert.json", "max_tokens": LENGTH}
    request["sweep"]["trials"] = 2
    (tmp_path / "request.yaml").write_text(yaml.safe_dump(request))
    told = stockpot("retrain", tmp_path / "request.yaml", "--watch")
    assert "champion" in told
    (row,) = json.loads(stockpot("predict", "topics", tmp_path / "texts" / TOPICS[0] / "0.npy", "--json"))
    assert row["label"] in TOPICS
