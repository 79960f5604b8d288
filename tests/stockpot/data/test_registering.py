"""Registering: shards that exist become a snapshot in one read, untouched; every problem is reported at once; verify says what changed."""

import os
from pathlib import Path

import pytest

from stockpot import storage
from stockpot.config import PinnedSnapshot
from stockpot.data.examination import ProblemsFound
from stockpot.data.registering import register, verify
from stockpot.data.shards import TrainReader, pixels
from stockpot.data.snapshots import open_snapshot, pin
from stockpot.data.sources import ClassFolders, ExistingShards, read_classes, safe_key
from stockpot.data.splits import SplitSpec
from stockpot.errors import BadRequest, DataError, ObjectMissing, SnapshotBroken
from tests.object_store import ObjectStore
from tests.stockpot.data.test_tars import GOOD, PICTURES, flipped, sample, second, tar
from tests.tiny_data import CLASSES, PREPROCESS, picture, publish_tiny

pytestmark = pytest.mark.usefixtures("node")
RULE = SplitSpec(held_out=0.25, gate=0.25)


def lay(root: str, shards: int = 4, each: int = 24) -> None:
    """Plain WebDataset tars, as another tool would have written them."""
    for number in range(shards):
        ids = range(number * each, (number + 1) * each)
        members = [member for one in ids for member in sample(f"k{one:04d}", b"%d\n" % (one % 3), picture(one))]
        storage.write_bytes(storage.join(root, f"part-{number:03d}.tar"), tar(members))


def registered(root: str, **extra: object) -> PinnedSnapshot:
    return register([root], root=root, name="theirs", classes=CLASSES, splits=RULE, **extra)  # type: ignore[arg-type]


def test_registered_shards_on_s3_are_read_like_published_ones_and_not_touched(s3: ObjectStore, tmp_path: Path) -> None:
    root = s3.uri(tmp_path.name)
    lay(root)
    before = storage.list_prefix(f"{root}/part-")
    seen: list[tuple[int, int | None]] = []
    snapshot = open_snapshot(registered(root, progress=lambda done, total: seen.append((done, total))))
    assert storage.list_prefix(f"{root}/part-") == before
    assert seen[-1] == (4, 4)
    assert sum(snapshot.counts.values()) == 96
    reader = TrainReader(snapshot, preprocess=PREPROCESS, augment=None, batch_size=8, seed=0)
    assert sum(len(batch.labels) for batch in reader.batches(0)) == snapshot.counts["train"]
    assert len(pixels(snapshot, "gate", PREPROCESS).keys) == snapshot.counts["gate"]
    assert verify(snapshot) == []
    assert verify(snapshot, deep=True) == []


def test_every_problem_of_every_shard_is_reported_at_once(tmp_path: Path) -> None:
    root = str(tmp_path)
    lay(root, shards=2)
    broken = {
        "cut.tar": GOOD[:second],
        "flip.tar": flipped(GOOD, second + 10),
        "empty.tar": b"",
        "page.tar": b"<html></html>" * 99,
        "labels.tar": tar([*sample("l1", b"999999"), *sample("l2", b"-1"), *sample("l3", b"cat."), ("l4.png", PICTURES[0])]),
        "images.tar": tar([*sample("i1", image=b""), *sample("i2", image=PICTURES[0][:90]), *sample("i3", image=b"text")]),
        "again.tar": tar(sample("k0001", image=PICTURES[1])),
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ProblemsFound) as caught:
        registered(root)
    assert dict(caught.value.problems.counts) == {
        "truncated shard": 1, "damaged header": 1, "empty shard": 1, "not a tar": 1, "label out of range": 2, "label not an integer": 1,
        "missing label": 1, "unreadable sample": 3, "duplicate key": 2,
    }  # fmt: skip
    shards = {example.shard for examples in caught.value.problems.examples.values() for example in examples}
    assert shards >= {"cut.tar", "flip.tar", "empty.tar", "page.tar", "labels.tar", "images.tar"}


def test_a_shard_listed_twice_and_a_prefix_without_tars_are_refused(tmp_path: Path) -> None:
    lay(str(tmp_path), shards=1)
    shard = f"{tmp_path}/part-000.tar"
    with pytest.raises(BadRequest, match="listed twice"):
        register([shard, shard], root=str(tmp_path), name="x", classes=CLASSES, splits="test")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.txt").write_text("hi")
    with pytest.raises(ObjectMissing, match=r"no \.tar objects .* \(1 other object\)"):
        registered(f"{tmp_path}/other")


def test_packed_tars_among_the_shards_are_refused(tmp_path: Path) -> None:
    lay(str(tmp_path), shards=1)
    (tmp_path / "part-001.tar.gz").write_bytes(b"more samples")
    with pytest.raises(BadRequest, match=r"part-001\.tar\.gz is packed \(1 such shard, 1 plain\)"):
        registered(str(tmp_path))


def test_one_wrong_label_does_not_make_a_million_classes(tmp_path: Path) -> None:
    lay(str(tmp_path), shards=1)
    (tmp_path / "typo.tar").write_bytes(tar(sample("t", b"99999")))
    with pytest.raises(DataError, match=r"highest label is 99,999 among 25 samples"):
        register([str(tmp_path)], root=str(tmp_path), name="x", classes=None, splits="test")


def test_members_that_are_no_part_of_a_sample_are_said(tmp_path: Path) -> None:
    lay(str(tmp_path), shards=1)
    (tmp_path / "hidden.tar").write_bytes(tar([*sample("h", b"1", picture(99)), (".h.png", b"x"), ("README", b"hi")]))
    said: list[str] = []
    registered(str(tmp_path), say=said.append)
    assert said == ["left out: 2 members (hidden, or without an extension)"]
    source = ExistingShards(str(tmp_path), CLASSES)
    assert len(list(source.samples(0))) == 25
    assert source.left_out() == said


def test_an_interrupted_registration_reads_no_shard_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(str(tmp_path))
    read: list[str] = []
    fetch = storage.fetch

    def counting(uri: str, *args: object, **kwargs: object) -> object:
        if uri.endswith(".tar"):
            if len(read) == 2:
                raise KeyboardInterrupt
            read.append(uri)
        return fetch(uri, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(storage, "fetch", counting)
        with pytest.raises(KeyboardInterrupt):
            registered(str(tmp_path))
        read_before, read[:] = list(read), []
        patch.setattr(storage, "fetch", lambda uri, *args, **kwargs: (read.append(uri), fetch(uri, *args, **kwargs))[1])
        registered(str(tmp_path))
    assert not set(read_before) & set(read)
    assert sum(open_snapshot(pin(str(tmp_path))).counts.values()) == 96


def test_verify_names_what_changed_by_size_etag_and_hash(tmp_path: Path) -> None:
    lay(str(tmp_path))
    snapshot = open_snapshot(registered(str(tmp_path)))
    paths = [tmp_path / f"part-{number:03d}.tar" for number in range(4)]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes() + b"more")
    os.utime(paths[2], ns=(1, 1))
    stat = paths[3].stat()
    paths[3].write_bytes(flipped(paths[3].read_bytes(), 3000))
    os.utime(paths[3], ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert {change.key: change.found.split()[0] for change in verify(snapshot)} == {
        "part-000.tar": "missing", "part-001.tar": f"{stat.st_size + 4:,}", "part-002.tar": "etag",
    }  # fmt: skip
    assert "part-003.tar" in {change.key for change in verify(snapshot, deep=True)}


def test_a_replaced_registered_shard_stops_the_reader(tmp_path: Path) -> None:
    lay(str(tmp_path))
    snapshot = open_snapshot(registered(str(tmp_path)))
    path = tmp_path / "part-002.tar"
    path.write_bytes(flipped(path.read_bytes(), 3000))
    with pytest.raises(SnapshotBroken, match=r"part-002\.tar was replaced"):
        list(TrainReader(snapshot, preprocess=PREPROCESS, augment=None, batch_size=8, seed=0).batches(0))


def test_class_folders_become_samples_with_safe_and_different_keys(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["dog/a.png", "dog/a.b.png", "dog/a.jpg", "ant/deep/er/c d.png", "ant/.hidden.png", "ant/notes.txt", "top.png"]
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    source = ClassFolders(str(tmp_path))
    found = list(source.samples(0))
    assert source.classes == ("ant", "dog")
    assert [one.label for one in found] == [0, 1, 1, 1]
    assert len({one.key for one in found}) == 4
    assert not any("." in one.key or " " in one.key for one in found)
    assert [one.key for one in source.samples(2)] == [one.key for one in found[2:]]
    identity = source.identity
    (tmp_path / "dog/new.png").write_bytes(picture(9))
    assert ClassFolders(str(tmp_path)).identity != identity
    assert safe_key("x/" + "long" * 50 + ".png") != safe_key("x/" + "long" * 51 + ".png")
    (left_out,) = ClassFolders(str(tmp_path)).left_out()
    assert left_out.startswith("left out as no samples in class folders: 3 files, such as ")
    assert all(f"{tmp_path}/{name}" in left_out for name in ("ant/.hidden.png", "ant/notes.txt", "top.png"))
    assert safe_key("__meta__/a.png").startswith("-_meta__/a-png-")  # webdataset drops `__meta__/`


def test_an_address_may_be_written_in_any_way(tmp_path: Path) -> None:
    publish_tiny(f"{tmp_path}/old", 30, splits="test")
    for number, name in enumerate(CLASSES):
        storage.write_bytes(f"{tmp_path}/source/{name}/1.png", picture(number))
    for source, data in [(f"{tmp_path}//source", f"{tmp_path}/./old/"), (f"file://{tmp_path}//source/.//", f"file://{tmp_path}//old")]:
        assert ClassFolders(source).classes == CLASSES
        assert [one.key for one in ClassFolders(source).samples(0)] == ["ant/1-png", "bee/1-png", "cat/1-png"]
        assert verify(open_snapshot(pin(data))) == []
        again = register([f"{data}/shards"], root=data, name="again", classes=CLASSES, splits="test")
        assert verify(open_snapshot(again), deep=True) == []


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a\nb.png"])
def test_file_names_that_no_manifest_can_hold_are_refused(tmp_path: Path, name: bytes) -> None:
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / os.fsdecode(name)).write_bytes(picture(0))
    with pytest.raises(BadRequest, match=r"Found 1 file name with control characters, or no UTF-8, such as '.*\\(udce9|n).*png'"):
        list(ClassFolders(str(tmp_path)).samples(0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ant\nbée\n", None),
        ("\ufeffant\r\nbée", None),
        (b"ant\nb\xe9e", "no text in UTF-8 .byte 5"),
        ("ant\nant", "2 class names, 1 of them"),
    ],
)
def test_class_names_are_read_as_they_are_meant(tmp_path: Path, text: str | bytes, said: str | None) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if said is None:
        assert read_classes(str(path)) == ("ant", "bée")
    else:
        with pytest.raises(BadRequest, match=said):
            read_classes(str(path))


@pytest.mark.parametrize("remote", [False, True], ids=["local", "s3"])
def test_a_class_folder_without_pictures_is_refused(tmp_path: Path, remote: bool, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue("s3").uri(tmp_path.name, "ä b") if remote else f"{tmp_path}/ä b"
    for number, name in enumerate(["ant/1.png", "bee/deep/2.PNG", "cat\u3000dög/3.heic", ".git/4"]):
        storage.write_bytes(f"{root}/{name}", picture(number))
    with pytest.raises(ObjectMissing, match=r"No samples are in 1 folder under .* \(cat\u3000dög\), needed is at least one"):
        list(ClassFolders(root).samples(0))
    storage.write_bytes(f"{root}/cat\u3000dög/4.png", picture(9))
    source = ClassFolders(root)
    assert source.classes == ("ant", "bee", "cat\u3000dög")
    assert [one.label for one in source.samples(0)] == [0, 1, 2]
    if not remote:
        (tmp_path / "ä b" / "dog").mkdir()
        with pytest.raises(ObjectMissing, match=r"\(dog\)"):
            list(ClassFolders(root).samples(0))


def test_shards_can_be_packed_anew_and_a_flawed_one_stops_it(tmp_path: Path) -> None:
    publish_tiny(f"{tmp_path}/old", 60, splits="test")
    source = ExistingShards(f"{tmp_path}/old/shards", CLASSES)
    assert sorted(one.key for one in source.samples(0)) == [f"s{number:05d}" for number in range(60)]
    assert [one.key for one in source.samples(25)] == [one.key for one in source.samples(0)][25:]
    lay(f"{tmp_path}/flawed", shards=1)
    (tmp_path / "flawed/z.tar").write_bytes(GOOD[:second])
    with pytest.raises(ProblemsFound, match="truncated shard"):
        list(ExistingShards(f"{tmp_path}/flawed", CLASSES).samples(0))
