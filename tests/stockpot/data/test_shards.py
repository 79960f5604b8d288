"""Reading: the same batches for any number of loader workers, after a resume, cached or streamed; everything counted; nothing inherited."""

import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stockpot.data import node_cache
from stockpot.data.images import decode, eval_transform
from stockpot.data.node_cache import NodeCache
from stockpot.data.publishing import GivenSamples, Sample, publish
from stockpot.data.shards import Batch, TrainReader, choose_reading, pixels, transform_digest
from stockpot.data.snapshots import Snapshot, open_snapshot
from stockpot.data.splits import SplitSpec
from stockpot.errors import BadRequest, SkipBudgetExceeded, SnapshotBroken
from stockpot.evaluation import share
from stockpot.preparation import Preprocess
from tests.tiny_data import CLASSES, PREPROCESS, picture, publish_tiny, samples


def noisy(image: Tensor, seed: int) -> Tensor:
    """An augmentation whose result shows its seed."""
    noise = torch.randint(0, 9, (3, PREPROCESS.size, PREPROCESS.size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return eval_transform(image, PREPROCESS) // 2 + noise


@pytest.fixture
def snapshot(tmp_path: Path, node: Path) -> Snapshot:
    return open_snapshot(publish_tiny(f"{tmp_path}/data", 120))


def reader(snapshot: Snapshot, **extra: Any) -> TrainReader:
    return TrainReader(snapshot, **{"preprocess": PREPROCESS, "augment": noisy, "batch_size": 8, "seed": 3} | extra)


def same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(one, two, strict=True)
    )


def test_every_train_sample_comes_once_an_epoch_as_it_is(snapshot: Snapshot) -> None:
    plain = reader(snapshot, augment=None)
    batches = list(plain.batches(0))
    assert len(batches) == plain.steps_per_epoch
    read = sorted(image.numpy().tobytes() for batch in batches for image in batch.images)
    keys = snapshot.index.keys(0, snapshot.counts["train"])
    assert read == sorted(eval_transform(decode(picture(int(key[1:]))), PREPROCESS).numpy().tobytes() for key in keys)
    assert batches[0].images.dtype == torch.uint8
    assert batches[0].labels.dtype == torch.int64


@pytest.mark.slow
def test_the_order_and_every_pixel_are_the_same_for_0_1_2_and_8_loader_workers(snapshot: Snapshot) -> None:
    alone = [list(reader(snapshot).batches(epoch)) for epoch in (0, 1)]
    assert not same(alone[0], alone[1])
    for workers in (1, 2, 8):
        several = reader(snapshot, loader_workers=workers)
        assert same(list(several.batches(0)), alone[0])
        assert same(list(several.batches(1)), alone[1])
        assert same(list(several.batches(1, skip=3)), alone[1][3:])
        assert several.counters["read"] == several.counters["planned"] == 2 * snapshot.counts["train"] + several.plan.planned - 24


def test_a_resumed_reader_goes_on_with_the_very_next_batch(snapshot: Snapshot) -> None:
    whole = list(reader(snapshot).batches(4))
    stopped = reader(snapshot).batches(4)
    first = [next(stopped) for _ in range(3)]
    stopped.close()
    assert same(first + list(reader(snapshot).batches(4, skip=3)), whole)


def test_streaming_gives_the_same_batches_and_leaves_no_shard_on_disk(snapshot: Snapshot, node: Path) -> None:
    streamed = [
        list(reader(snapshot, reading="streamed", loader_workers=2).batches(0)),
        list(reader(snapshot, reading="streamed").batches(0, 5)),
    ]
    assert not list(node.rglob("*.tar"))
    cached = list(reader(snapshot).batches(0))
    assert same(streamed[0], cached)
    assert same(streamed[1], cached[5:])


def test_streaming_skips_whole_groups_without_reading_them(tmp_path: Path, node: Path) -> None:
    many = open_snapshot(publish_tiny(f"{tmp_path}/many", 240, shard_bytes=8_000))
    assert len(many.manifest.shards) > 24
    whole = reader(many, reading="streamed")
    rest = reader(many, reading="streamed")
    expected = list(whole.batches(0))
    assert same(list(rest.batches(0, skip=whole.steps_per_epoch - 2)), expected[-2:])
    assert rest.counters["bytes_from_storage"] < whole.counters["bytes_from_storage"] / 2


def test_what_a_loader_worker_finds_wrong_is_its_sentence_and_no_traceback(tmp_path: Path, node: Path) -> None:
    broken = open_snapshot(publish_tiny(f"{tmp_path}/broken", 40, splits="train"))
    for shard in broken.manifest.shards:
        path = Path(broken.root.removeprefix("file://")) / shard.key
        path.chmod(0o644)
        path.write_bytes(b"?" * shard.size)
    with pytest.raises(SnapshotBroken) as caught:
        list(reader(broken, loader_workers=1).batches(0))
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stream_that_is_left_early_ends_its_threads(snapshot: Snapshot) -> None:
    import threading

    stream = reader(snapshot, reading="streamed").batches(0)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stockpot-")]


@pytest.mark.parametrize("reading", ["cached", "streamed"])
def test_ranks_read_equal_batches_that_make_up_those_of_one(snapshot: Snapshot, reading: Any) -> None:
    alone = list(reader(snapshot).batches(0))
    ranks = [list(reader(snapshot, rank=rank, world=2, reading=reading).batches(0)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(alone)
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert len(parts[0].labels) == len(parts[1].labels)
        together = torch.stack([part.images for part in parts], 1).flatten(0, 1)
        assert torch.equal(together, whole.images[: len(together)])


def test_inherited_variables_change_nothing(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(reader(snapshot).batches(0))
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "WORKER": "1", "NUM_WORKERS": "3", "WDS_SEED": "x", "WDS_VERBOSE_CACHE": "1",
                        "GOPEN_REWRITE": f"{os.sep}=/nowhere", "GOPEN_VERBOSE": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert same(list(reader(snapshot).batches(0)), expected)
    assert same(list(reader(snapshot, reading="streamed").batches(0)), expected)


@pytest.mark.parametrize("reading", ["cached", "streamed"])
def test_what_an_epoch_left_early_took_from_storage_is_counted(snapshot: Snapshot, node: Path, reading: Any) -> None:
    """As when `max_steps` ends a trial within one: the shards are read, by the node cache or by nobody."""
    left = reader(snapshot, reading=reading)
    batches = left.batches(0)
    next(batches)
    batches.close()
    stored = sum(path.stat().st_size for path in node.rglob("*.tar"))
    assert left.counters["bytes_from_storage"] == (stored or sum(shard.size for shard in snapshot.manifest.shards)) > 0


@pytest.mark.parametrize("by", ["training", "evaluation"])
def test_the_janitor_spares_what_is_being_read(snapshot: Snapshot, node: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    left: list[int] = []
    monkeypatch.setattr(node_cache, "_unlocked", lambda path: path.is_file())  # the folder being built has a lock, held by this process

    class OnAFullDisk(NodeCache):
        def free(self) -> int:
            return 0

    def meddling(image: Tensor, seed: int | Preprocess) -> Tensor:
        before = set(node.rglob("*.tar"))
        OnAFullDisk().evict(1)
        left.append(len(before - set(node.rglob("*.tar"))))
        return eval_transform(image, PREPROCESS)

    if by == "training":
        assert len(list(reader(snapshot, augment=meddling).batches(0))) == reader(snapshot).steps_per_epoch
    else:
        monkeypatch.setattr("stockpot.data.preparing.as_evaluated", meddling)
        pixels(snapshot, "gate", PREPROCESS)
    assert left
    assert not any(left)


def test_everything_is_counted(snapshot: Snapshot) -> None:
    size = sum(shard.size for shard in snapshot.manifest.shards)
    first, second = reader(snapshot), reader(snapshot)
    list(first.batches(0))
    list(second.batches(0))
    train, shards = snapshot.counts["train"], len(snapshot.manifest.shards)
    none = {"skipped": 0, "skipped_empty": 0, "skipped_image": 0, "skipped_tokens": 0, "retries": 0}
    assert dict(first.counters) == {"planned": train, "read": train, "bytes_from_storage": size, "cache_hits": 0, **none}
    assert dict(second.counters) == {"planned": train, "read": train, "bytes_from_storage": 0, "cache_hits": shards, **none}


class Slow(Counter[str]):
    """Counts that take a moment to be read, in which another thread may change them."""

    def get(self, *key: Any) -> Any:
        count = super().get(*key)
        time.sleep(0.002)
        return count


@pytest.mark.parametrize("reading", ["cached", "streamed"])
def test_what_a_thread_fetches_is_counted_while_a_batch_is(snapshot: Snapshot, reading: Any) -> None:
    counting = reader(snapshot, reading=reading)
    counting.counters = Slow(counting.counters)
    list(counting.batches(0))
    assert counting.counters["bytes_from_storage"] == sum(shard.size for shard in snapshot.manifest.shards)


@pytest.mark.parametrize("reading", ["cached", "streamed"])
def test_unreadable_samples_are_counted_by_name_and_stop_the_trial_over_the_budget(tmp_path: Path, node: Path, reading: Any) -> None:
    given = [*samples(60), *(Sample(f"bad{number}", data, number) for number, data in enumerate((b"<html>", b"<xml>", b"")))]
    snapshot = open_snapshot(
        publish(f"{tmp_path}/data", "some", CLASSES, GivenSamples(given), splits=SplitSpec(held_out=0.3, gate=0.3), skip_fraction=0.1)
    )
    tolerant = reader(snapshot, skip_fraction=0.2, reading=reading)
    assert sum(len(batch.labels) for batch in tolerant.batches(0)) == snapshot.counts["train"] - 3
    assert tolerant.counters["skipped"] == 3
    assert {kind: tolerant.counters[f"skipped_{kind}"] for kind in ("empty", "image", "tokens")} == {"empty": 1, "image": 2, "tokens": 0}
    assert sorted(line.split("'")[1] for line in tolerant.skipped) == ["bad0", "bad1", "bad2"]
    with pytest.raises(SkipBudgetExceeded, match=r"A batch of epoch 0 has 1 samples, all unreadable, .* sample 'bad\d' is "):
        list(reader(snapshot, skip_fraction=0.2, reading=reading, batch_size=1).batches(0))
    told = r"1 of \d+ samples of epoch 0 are unreadable, `skip_fraction` allows 0 of them\..* sample 'bad\d' is (not a readable|empty)"
    with pytest.raises(SkipBudgetExceeded, match=told):
        list(reader(snapshot, reading=reading).batches(0))


def test_a_split_that_is_not_there_and_classes_that_differ_are_refused(snapshot: Snapshot) -> None:
    with pytest.raises(BadRequest, match="no split `test`"):
        reader(snapshot, split="test")
    with pytest.raises(BadRequest, match="no split `test`"):
        pixels(snapshot, "test", PREPROCESS)
    with pytest.raises(SnapshotBroken, match="3 classes"):
        snapshot.require_classes(("ant", "bee"))
    snapshot.require_classes(CLASSES)


def test_auto_streams_only_what_the_disk_cannot_hold_and_says_so(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert choose_reading(snapshot, "auto", said.append) == "cached"
    monkeypatch.setattr(NodeCache, "free", lambda self: 1000)
    assert choose_reading(snapshot, "auto", said.append) == "streamed"
    assert len(said) == 1
    assert "streamed from storage" in said[0]


def test_an_evaluation_split_is_complete_ordered_shared_and_read_only(snapshot: Snapshot, node: Path) -> None:
    one, two = pixels(snapshot, "held_out", PREPROCESS), pixels(snapshot, "held_out", PREPROCESS)
    start = snapshot.first("held_out")
    assert list(one.keys) == snapshot.index.keys(start, start + snapshot.counts["held_out"])
    for key, label, image in zip(one.keys, one.labels, one.images, strict=True):
        assert label == int(key[1:]) % 3
        assert np.array_equal(image, eval_transform(decode(picture(int(key[1:]))), PREPROCESS).numpy())
    assert isinstance(one.images, np.memmap)
    assert not one.images.flags.writeable
    assert one.images.filename == two.images.filename  # type: ignore[union-attr]
    assert one.transform_digest == transform_digest(PREPROCESS)
    other = Preprocess(**{**PREPROCESS.model_dump(), "size": 8})
    assert pixels(snapshot, "held_out", other).images.shape[-1] == 8
    assert pixels(snapshot, "held_out", other).transform_digest != one.transform_digest
    assert len(list((node / "pixels").glob("*/meta.json"))) == 2


@pytest.mark.parametrize("world", [1, 2, 5, 64])
def test_ranks_that_map_the_same_pixels_evaluate_every_sample_of_the_split_once(snapshot: Snapshot, world: int) -> None:
    held_out = pixels(snapshot, "held_out", PREPROCESS)
    shares = [share(len(held_out.images), rank, world, 4) for rank in range(world)]
    seen = [held_out.keys[sample] for mine in shares for sample in mine]
    assert tuple(seen) == held_out.keys
    assert len(seen) == snapshot.counts["held_out"]


def test_an_evaluation_split_of_a_snapshot_that_does_not_fit_is_the_same(
    snapshot: Snapshot, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "fits", lambda self: False)
        streamed = np.array(pixels(snapshot, "gate", PREPROCESS).images)
    assert not list(node.rglob("*.tar"))
    shutil.rmtree(node / "pixels")
    assert np.array_equal(pixels(snapshot, "gate", PREPROCESS).images, streamed)


def test_pixels_that_a_disk_damaged_are_built_again(snapshot: Snapshot, node: Path) -> None:
    expected = np.array(pixels(snapshot, "gate", PREPROCESS).images)
    (store,) = (node / "pixels").glob("*/images.npy")
    store.chmod(0o644)
    damaged = bytearray(store.read_bytes())
    damaged[-7] ^= 1
    store.write_bytes(damaged)
    assert np.array_equal(pixels(snapshot, "gate", PREPROCESS).images, expected)


@pytest.mark.parametrize("left", [None, "", '{"images'])
def test_a_build_that_was_killed_is_built_again(snapshot: Snapshot, node: Path, left: str | None) -> None:
    expected = np.array(pixels(snapshot, "gate", PREPROCESS).images)
    (folder,) = [path for path in (node / "pixels").iterdir() if path.is_dir()]
    (folder / "meta.json").unlink() if left is None else (folder / "meta.json").write_text(left)
    (folder.parent / f"{folder.name}.dead.part").mkdir()
    assert np.array_equal(pixels(snapshot, "gate", PREPROCESS).images, expected)
    assert not list((node / "pixels").glob("*.part"))
