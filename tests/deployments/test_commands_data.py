"""`stockpot data`: a folder becomes a snapshot, shards are registered, changes are found; failures are one sentence and exit 1."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deployments.commands_data import app
from stockpot.data.shards import pixels
from stockpot.data.snapshots import open_snapshot, pin
from stockpot.errors import StockpotError
from stockpot.preparation import Tokens
from tests.object_store import ObjectStore
from tests.tiny_data import CLASSES, picture
from tests.tiny_texts import LENGTH, TOPICS, VOCABULARY, texts

pytestmark = pytest.mark.usefixtures("node")
SPLITS = ["--held-out", "20", "--gate", "0.2"]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for number in range(90):
        path = tmp_path / "source" / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return tmp_path / "source"


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_folder_of_class_folders_becomes_a_snapshot_that_verifies(folders: Path, tmp_path: Path) -> None:
    (folders / "ant" / "notes.txt").write_text("no picture")
    (folders / "classes.txt").write_text("bee\nant\ncat\n")
    answer = run("publish", folders, tmp_path / "data", *SPLITS, "--json")
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    order = "labels are in the order of the folders' names"
    assert document["warnings"][:2] == [
        f"left out as no samples in class folders: 2 files, such as {folders}/ant/notes.txt, {folders}/classes.txt",
        f"{folders}/classes.txt names classes and was not read: {order}, or with --classes {folders}/classes.txt in its own",
    ]
    assert document["splits"]["held_out"] == 20
    assert pin(str(tmp_path / "data")).digest == document["digest"]
    assert open_snapshot(pin(document["uri"])).classes == CLASSES
    assert "as they were (sizes; --deep reads every byte)" in run("verify", tmp_path / "data").stdout
    assert "every byte read" in run("verify", tmp_path / "data", "--deep").stdout


def test_texts_in_class_folders_become_a_snapshot_and_a_picture_goes_before_tokens(folders: Path, tmp_path: Path) -> None:
    for number, text in enumerate(texts(90)):
        path = tmp_path / "texts" / TOPICS[text.label] / f"{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.data)
    answer = run("publish", tmp_path / "texts", tmp_path / "read", *SPLITS, "--json")
    assert answer.exit_code == 0, answer.output
    snapshot = open_snapshot(pin(str(tmp_path / "read")))
    assert (snapshot.classes, sum(snapshot.counts.values())) == (tuple(sorted(TOPICS)), 90)
    form = Tokens(length=LENGTH, vocabulary=VOCABULARY, padding=0)
    assert pixels(snapshot, "held_out", form).images.shape == (20, LENGTH)
    (folders / CLASSES[0] / "features.npy").write_bytes(b"no text")
    assert run("publish", folders, tmp_path / "data", *SPLITS).exit_code == 0


def test_shards_are_registered_where_they_lie(folders: Path, tmp_path: Path) -> None:
    assert run("publish", folders, tmp_path / "data", "--split", "test").exit_code == 0
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    answer = run("register", tmp_path / "data" / "shards", "--dest", tmp_path / "other", "--classes", names, *SPLITS, "--json")
    assert answer.exit_code == 0, answer.output
    snapshot = open_snapshot(pin(str(tmp_path / "other")))
    assert snapshot.classes == CLASSES
    assert Path(snapshot.shard_uri(0)).parent == tmp_path / "data" / "shards"
    assert "(sizes and etags)" in run("verify", tmp_path / "other").stdout
    again = run("publish", tmp_path / "data" / "shards", tmp_path / "anew", "--classes", names, *SPLITS)
    assert again.exit_code == 0, again.output


def test_problems_are_a_table_and_one_sentence(folders: Path, tmp_path: Path) -> None:
    (folders / "ant" / "broken.png").write_bytes(b"no picture")
    answer = run("publish", folders, tmp_path / "data", *SPLITS)
    assert isinstance(answer.exception, StockpotError)
    assert "Found 1 problem in 91 samples (1 x unreadable sample)" in str(answer.exception)
    assert f"{folders}/ant/broken.png" in str(answer.exception)
    assert "--skip-fraction 0.011" in str(answer.exception)
    (problem,) = json.loads(run("publish", folders, tmp_path / "data", *SPLITS, "--json").stdout)["problems"]
    assert (problem["problem"], problem["count"], problem["sample"]) == ("unreadable sample", 1, f"{folders}/ant/broken.png")
    assert run("publish", folders, tmp_path / "data", *SPLITS, "--skip-fraction", "0.011").exit_code == 0


def test_class_folders_are_labelled_in_the_order_of_a_file_that_names_them_all(folders: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\nant\nbee\n")
    answer = run("publish", folders, tmp_path / "data", "--split", "test", "--classes", names)
    assert "classes in 1 shard\n" in answer.stdout, answer.output
    snapshot = open_snapshot(pin(str(tmp_path / "data")))
    assert snapshot.classes == ("cat", "ant", "bee")
    labels = snapshot.index.column("label", 0, 90).to_pylist()
    found = {key.split("/")[0]: label for key, label in zip(snapshot.index.keys(0, 90), labels, strict=True)}
    assert found == {"cat": 0, "ant": 1, "bee": 2}
    names.write_text("dog\nant\nbee\n")
    answer = run("publish", folders, tmp_path / "other", "--split", "test", "--classes", names)
    assert "(folders not named: cat; names without a folder: dog), needed is one folder for each name" in str(answer.exception)
    assert not (tmp_path / "other").exists()


def test_pictures_beside_class_folders_are_said_to_be(folders: Path, tmp_path: Path) -> None:
    answer = run("publish", folders / "ant", tmp_path / "data")
    assert f"All samples of {folders}/ant (30 files, such as {folders}/ant/0.png) lie beside class folders" in str(answer.exception)


def test_a_dataset_of_one_class_is_refused(folders: Path, tmp_path: Path) -> None:
    answer = run("publish", folders.parent, tmp_path / "one", *SPLITS)
    assert "has 1 class (source), needed at least 2" in str(answer.exception)
    assert not (tmp_path / "one").exists()


def test_what_changed_is_said(folders: Path, tmp_path: Path) -> None:
    run("publish", folders, tmp_path / "data", *SPLITS)
    shard = next((tmp_path / "data" / "shards").iterdir())
    shard.write_bytes(b"short")
    answer = run("verify", tmp_path / "data", "--json")
    assert json.loads(answer.stdout)["changes"][0]["found"] == "5 bytes"
    assert "1 of 2 objects" in str(answer.exception)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["publish", "/nowhere", "/tmp/x"], "There is no file or folder /nowhere; check the path."),
        (["register", "/nowhere"], "There is no file or folder /nowhere; check the path."),
        (["verify", "/nowhere"], "There is no file or folder /nowhere; check the address, or publish"),
        (["verify", "/usr"], "/usr holds no snapshot"),
    ],
)
def test_addresses_that_hold_nothing_are_named(words: list[str], sentence: str) -> None:
    assert sentence in str(run(*words).exception)


@pytest.mark.parametrize(
    "words", [["publish", "/usr", "s3:/stockpot/x"], ["publish", "gs://stockpot/x", "/tmp/x"], ["verify", "S3:///stockpot/x"]]
)
def test_a_mistyped_address_is_no_folder_here(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "is no address (did you mean s3://stockpot/x?)" in str(run(*words).exception)
    assert not list(tmp_path.iterdir())


def test_an_address_is_refused_before_torch_is_loaded(s3: ObjectStore) -> None:
    code = """
from deployments.commands_data import app
from stockpot.errors import ObjectMissing

for words in (["verify"], ["publish", "."]):
    try:
        app([*words, "s3://nobucket/x"], standalone_mode=False)
    except ObjectMissing as error:
        print(error)
"""
    ended = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.count("There is no bucket `nobucket`") == 2
    assert "botocore" in ended.stderr
    assert "| torch" not in ended.stderr


def test_a_share_that_is_none_is_wrong_usage(folders: Path, tmp_path: Path) -> None:
    assert run("publish", folders, tmp_path / "data", "--held-out", "half").exit_code == 2
