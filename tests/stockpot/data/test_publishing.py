"""Publishing: identical bytes each time, never half a snapshot, resumed after a kill, all problems at once, read by stock webdataset."""

import io
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from stockpot import storage
from stockpot.config import PinnedSnapshot
from stockpot.data import manifests, publishing, snapshots
from stockpot.data.examination import ProblemsFound
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.snapshots import open_snapshot, pin
from stockpot.data.splits import SplitSpec
from stockpot.errors import BadRequest, DataError, ObjectExists, SnapshotBroken, SnapshotMissing
from tests.object_store import ObjectStore
from tests.tiny_data import CLASSES, picture, publish_tiny, samples

pytestmark = pytest.mark.usefixtures("node")


def shards_of(root: Path) -> list[Path]:
    return sorted((root / "shards").iterdir())


def test_publishing_twice_gives_the_same_bytes_and_the_same_snapshot(tmp_path: Path) -> None:
    one, two = publish_tiny(f"{tmp_path}/one"), publish_tiny(f"{tmp_path}/two")
    assert one.digest == two.digest
    assert [path.read_bytes() for path in shards_of(tmp_path / "one")] == [path.read_bytes() for path in shards_of(tmp_path / "two")]
    assert publish_tiny(f"{tmp_path}/one") == one
    assert len(shards_of(tmp_path / "one")) > 5


def test_the_index_points_at_the_very_bytes(tmp_path: Path) -> None:
    snapshot = open_snapshot(publish_tiny(str(tmp_path)))
    keys = snapshot.index.keys(0, 120)
    assert sorted(keys) == [f"s{number:05d}" for number in range(120)]
    for key, row in zip(keys, snapshot.index.rows, strict=True):
        shard = (tmp_path / snapshot.manifest.shards[row["shard"]].key).read_bytes()
        assert shard[row["offset"] : row["offset"] + row["size"]] == picture(int(key[1:]))
        assert row["label"] == int(key[1:]) % 3


@pytest.mark.parametrize("key", ["käfer/ä", "deep/" * 30 + "down", "x" * 99, "x" * 95])
def test_the_index_points_at_the_very_bytes_behind_long_names_and_others_than_ascii(tmp_path: Path, key: str) -> None:
    given = [Sample(f"{key}{number}", picture(number), number % 3, fields={"n": number}) for number in range(9)]
    snapshot = open_snapshot(publish(str(tmp_path), "names", CLASSES, GivenSamples(given), splits="test"))
    (shard,) = shards_of(tmp_path)
    data = shard.read_bytes()
    assert [data[row["offset"] : row["offset"] + row["size"]] for row in snapshot.index.rows] == [one.data for one in given]
    assert [sample["__key__"] for sample in wds.WebDataset([str(shard)], shardshuffle=False)] == snapshot.index.keys(0, 9)


def test_stock_webdataset_reads_our_shards(tmp_path: Path) -> None:
    publish_tiny(str(tmp_path))
    urls = [str(path) for path in shards_of(tmp_path)]
    read = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls"))
    assert sorted(key for key, _, _ in read) == [f"s{number:05d}" for number in range(120)]
    assert all(pixels.shape == (24, 24, 3) and label == int(key[1:]) % 3 for key, pixels, label in read)


def test_a_dataset_stands_for_what_was_published_last(tmp_path: Path) -> None:
    first = publish_tiny(str(tmp_path), 120)
    second = publish_tiny(str(tmp_path), 150)
    assert pin(str(tmp_path)) == second
    assert pin(first.uri) == first
    publish_tiny(str(tmp_path), 120)
    assert pin(str(tmp_path)) == first


class Stopping(GivenSamples):
    """A source whose reading stops in the middle, as a killed publication would."""

    stop: int | None = None
    read = 0

    def samples(self, start: int) -> Iterator[Sample]:
        for place, sample in enumerate(samples(120 - start, start), start):
            if place == self.stop:
                raise KeyboardInterrupt
            object.__setattr__(self, "read", self.read + 1)
            yield sample


def test_an_interrupted_publication_leaves_no_snapshot_and_goes_on_after_its_last_shard(tmp_path: Path) -> None:
    rule = SplitSpec(held_out=0.2, gate=0.2)
    source = Stopping((), identity="source")
    object.__setattr__(source, "stop", 70)
    with pytest.raises(KeyboardInterrupt):
        publish(str(tmp_path), "tiny", CLASSES, source, splits=rule, shard_bytes=30_000)
    with pytest.raises(SnapshotMissing):
        pin(str(tmp_path))
    object.__setattr__(source, "stop", None)
    object.__setattr__(source, "read", 0)
    pinned = publish(str(tmp_path), "tiny", CLASSES, source, splits=rule, shard_bytes=30_000)
    assert source.read < 70
    assert pinned.digest == publish_tiny(f"{tmp_path}/whole").digest
    assert not list((tmp_path / "publishing").rglob("*.parquet"))


def test_a_shard_that_was_cut_in_storage_is_mended_by_publishing_it_again(tmp_path: Path) -> None:
    snapshot = open_snapshot(publish_tiny(str(tmp_path)))
    shard, index = Path(snapshot.shard_uri(2)), tmp_path / snapshot.manifest.index.key
    whole = {path: path.read_bytes() for path in (shard, index)}
    for path, data in whole.items():
        path.write_bytes(data[:-512])
    assert open_snapshot(publish_tiny(str(tmp_path))).digest == snapshot.digest
    assert {path: path.read_bytes() for path in whole} == whole


def test_the_share_that_is_said_to_let_unreadable_pictures_in_does(tmp_path: Path) -> None:
    given = [*samples(71), *(Sample(f"bad{number}", b"no image", number % 3) for number in range(29))]
    with pytest.raises(ProblemsFound, match=r"--skip-fraction 0\.29\.$"):
        publish(str(tmp_path), "some", CLASSES, GivenSamples(given), splits="train")
    pinned = publish(str(tmp_path), "some", CLASSES, GivenSamples(given), splits="train", skip_fraction=0.29)
    assert open_snapshot(pinned).manifest.unreadable == 29  # 0.29 * 100 is less


def test_a_disk_that_fills_while_a_shard_is_packed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publishing, "_append", full)
    with pytest.raises(DataError, match=r"shard\.tar cannot be written to disk: No space left on device\. Free some space"):
        publish_tiny(str(tmp_path))


def test_a_crash_before_the_manifest_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(manifests, "commit", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        publish_tiny(str(tmp_path))
    with pytest.raises(SnapshotMissing):
        pin(str(tmp_path))


def test_two_publishers_of_one_source_at_once_both_end_with_the_same_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second starts where the first has stored all, and finds its records going away under its hands."""
    rule = SplitSpec(held_out=0.2, gate=0.2)

    def run() -> PinnedSnapshot:
        return publish(str(tmp_path), "tiny", CLASSES, Stopping((), identity="source"), splits=rule, shard_bytes=30_000)

    second: list[PinnedSnapshot] = []
    read = storage.read_bytes

    def finish_first(uri: str) -> bytes:
        if uri.endswith("000002.parquet") and forgotten:
            forgotten.pop()()
        return read(uri)

    commit, forgotten = manifests.commit, []

    def commit_both(root: str, manifest: snapshots.Manifest) -> PinnedSnapshot:
        pinned = commit(root, manifest)
        if not second:
            second.append(pinned)
            (records,) = (tmp_path / "publishing").iterdir()
            forgotten.append(lambda: [path.unlink() for path in records.iterdir()])
            second.append(run())
        return pinned

    monkeypatch.setattr(storage, "read_bytes", finish_first)
    monkeypatch.setattr(manifests, "commit", commit_both)
    assert run() == second[1]
    assert not forgotten


def test_two_publishers_on_s3_never_overwrite_each_other(s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = s3.uri(tmp_path.name)
    one = publish_tiny(root)
    assert publish_tiny(root) == one
    assert open_snapshot(pin(root)).counts == open_snapshot(one).counts
    monkeypatch.setattr(storage, "exists", lambda uri: False)  # the other publisher looked a moment too early
    with pytest.raises(ObjectExists):
        storage.write_bytes(one.uri, b"{}", create=True)
    assert snapshots.commit(root, open_snapshot(one).manifest) == one
    assert open_snapshot(one).digest == one.digest


def test_a_manifest_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    pinned = publish_tiny(str(tmp_path))
    path = Path(pinned.uri)
    path.write_text(path.read_text().replace('"ant"', '"ape"'))
    for read in (lambda: open_snapshot(pinned), lambda: pin(pinned.uri), lambda: pin(str(tmp_path))):
        with pytest.raises(SnapshotBroken, match=f"has digest .*, needed is {pinned.digest[:12]}: the manifest was replaced"):
            read()
    path.write_text("{}")
    with pytest.raises(SnapshotBroken, match="no snapshot manifest"):
        open_snapshot(pinned)


def test_all_problems_of_a_source_are_reported_at_once(tmp_path: Path) -> None:
    bad = [
        Sample("x", b"", 0),
        Sample("y", b"<html>", 1),
        Sample("s00001", picture(900), 0),
        Sample("z", picture(901), 3),
        Sample("w", picture(902), -1),
    ]
    with pytest.raises(ProblemsFound) as caught:
        publish(str(tmp_path), "bad", CLASSES, GivenSamples([*samples(30), *bad]), splits="test")
    assert caught.value.problems.counts == {"unreadable sample": 2, "duplicate key": 1, "label out of range": 2}
    with pytest.raises(SnapshotMissing):
        pin(str(tmp_path))


def test_unreadable_pictures_may_stay_in_train_within_a_fraction_but_never_in_an_evaluation(tmp_path: Path) -> None:
    given = [*samples(90), *(Sample(f"bad{number}", b"no image %d" % number, number % 3) for number in range(9))]
    rule = SplitSpec(held_out=0.3, gate=0.3)
    with pytest.raises(ProblemsFound, match="9 x unreadable sample"):
        publish(str(tmp_path), "some", CLASSES, GivenSamples(given), splits=rule, skip_fraction=0.05)
    snapshot = open_snapshot(publish(str(tmp_path), "some", CLASSES, GivenSamples(given), splits=rule, skip_fraction=0.1))
    assert snapshot.manifest.unreadable == 9
    assert not [key for key in snapshot.index.keys(snapshot.counts["train"], 99) if key.startswith("bad")]


def test_identical_pictures_never_cross_splits_whatever_their_key_shard_or_format(tmp_path: Path) -> None:
    def twin(number: int) -> Sample:
        file = io.BytesIO()
        Image.open(io.BytesIO(picture(number))).save(file, "webp", lossless=True)
        return Sample(f"twin{number:05d}", file.getvalue(), number % 3, "webp")

    given = [*samples(90), *map(twin, range(90))]
    snapshot = open_snapshot(
        publish(str(tmp_path), "twins", CLASSES, GivenSamples(given), splits=SplitSpec(held_out=40, gate=0.2), shard_bytes=30_000)
    )
    seen: list[set[bytes]] = []
    start = 0
    for split in ("train", "held_out", "gate"):
        digests = snapshot.index.column("digest", start, start + snapshot.counts[split]).to_pylist()
        assert len(digests) == 2 * len(set(digests))
        seen.append(set(digests))
        start += snapshot.counts[split]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert snapshot.counts["held_out"] == 40


def test_samples_may_be_grouped_by_a_field_of_their_json(tmp_path: Path) -> None:
    given = [Sample(one.key, one.data, one.label, one.extension, {"patient": number // 6}) for number, one in enumerate(samples(180))]
    rule = SplitSpec(held_out=0.3, gate=0.2, group_by="patient")
    snapshot = open_snapshot(publish(str(tmp_path), "patients", CLASSES, GivenSamples(given), splits=rule))
    bounds = [0, snapshot.counts["train"], snapshot.counts["train"] + snapshot.counts["held_out"], 180]
    patients = [{int(key[1:]) // 6 for key in snapshot.index.keys(start, stop)} for start, stop in pairwise(bounds)]
    assert not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])
    with pytest.raises(ProblemsFound, match="missing group field"):
        publish(f"{tmp_path}/none", "none", CLASSES, GivenSamples(list(samples(90))), splits=rule)
    twins = [Sample(f"twin-{one.key}", one.data, one.label, one.extension, {"patient": f"other {one.key}"}) for one in given]
    with pytest.raises(DataError, match=r"pictures would be in several splits, needed 0: .* samples 's\d+' and 'twin-s\d+' are the same"):
        publish(f"{tmp_path}/twins", "twins", CLASSES, GivenSamples([*given, *twins]), splits=rule)


def test_growing_a_dataset_keeps_every_old_sample_in_its_split(tmp_path: Path) -> None:
    old = publish_tiny(str(tmp_path), 120, splits=SplitSpec(held_out=30, gate=25))
    grown = publish(str(tmp_path), "tiny", CLASSES, GivenSamples(samples(200)), splits=SplitSpec(), extends=old, shard_bytes=30_000)

    def splits(pinned: object) -> dict[str, str]:
        snapshot = open_snapshot(pinned)  # type: ignore[arg-type]
        return {
            key: split
            for split in snapshot.counts
            for key in snapshot.index.keys(snapshot.first(split), snapshot.first(split) + snapshot.counts[split])
        }

    before, after = splits(old), splits(grown)
    assert all(after[key] == split for key, split in before.items())
    assert set(after.values()) == {"train", "held_out", "gate"}
    with pytest.raises(BadRequest, match="keep the old order"):
        publish(str(tmp_path), "tiny", ("bee", "ant", "cat"), GivenSamples(samples(200)), splits=SplitSpec(), extends=old)


def test_a_split_without_a_class_is_refused_and_a_thin_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cat \(0\)"):
        publish(str(tmp_path), "two", CLASSES, GivenSamples([one for one in samples(60) if one.label < 2]), splits="test")
    for spec, empty in [(SplitSpec(held_out=1e-9, gate=20), "held_out"), (SplitSpec(held_out=0.7, gate=0.7), "train")]:
        with pytest.raises(DataError, match=rf"Split {empty} has no samples of 3 of 3 classes: ant \(0\)"):
            publish_tiny(str(tmp_path), 60, splits=spec)
    with pytest.raises(DataError, match=r"draw other shares \(--held-out (0\.\d+) --gate \1 would do\)") as small:
        publish_tiny(str(tmp_path), 60, splits=SplitSpec())
    share = float(re.findall(r"0\.\d+", str(small.value))[0])
    publish_tiny(str(tmp_path), 60, splits=SplitSpec(held_out=share, gate=share))
    snapshot = open_snapshot(publish_tiny(str(tmp_path), 60, splits=SplitSpec(held_out=10, gate=30)))
    assert any("held_out has fewer than 5" in sentence for sentence in manifests.thin_classes(snapshot))


def test_an_empty_source_and_an_unknown_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        publish(str(tmp_path), "none", CLASSES, GivenSamples([]), splits="test")
    with pytest.raises(BadRequest, match="no split `val`"):
        publish(str(tmp_path), "val", CLASSES, GivenSamples(samples(9)), splits="val")
