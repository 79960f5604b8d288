"""Guards: the mean of files that arrive one after another is to the bit the mean of the same files on this node; two of them are here at
the most, the next on its way while one is added; and whatever breaks ends in a sentence with every file given back."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks._memory import Watched
from stockpot import storage
from stockpot.checkpoints import save_weights
from stockpot.errors import IngredientMismatch, ServerUnreachable, SnapshotBroken
from stockpot.soup.recipes import streaming
from stockpot.soup.recipes.averaging import average
from stockpot.soup.recipes.streaming import average_streamed
from stockpot.soup.recipes.weights import Weights, open_weights
from tests.faulty_proxy import FaultyProxy, faulty_proxy
from tests.object_store import ObjectStore
from tests.waiting import PATIENCE_S

State = dict[str, Tensor]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Warehouse:
    """Files by sha256, brought into a folder as storage would, and what was there whenever one was asked for."""

    def __init__(self, folder: Path, states: Sequence[State]) -> None:
        self.here = folder / "here"
        self.here.mkdir(parents=True)
        self.paths = {}
        self.contents = []
        for number, state in enumerate(states):
            sha256 = save_weights(folder / f"{number}.safetensors", state)
            self.paths[sha256] = folder / f"{number}.safetensors"
            self.contents.append(sha256)
        self.open_when_asked: list[int] = []

    def fetch(self, sha256: str) -> Weights:
        self.open_when_asked.append(self.held)
        place = self.here / sha256
        shutil.copyfile(self.paths[sha256], place)
        try:
            return open_weights(place, sha256).held()
        finally:
            place.unlink()

    def streamed(self, fetch: Callable[[str], Weights] | None = None) -> State:
        """Of the files as they arrive."""
        return average_streamed(self.contents, {sha256: sha256 for sha256 in self.contents}, fetch or self.fetch)

    @property
    def held(self) -> int:
        """Files of the folder that this process keeps open: what takes room on the disk, with a name or without."""
        return sum(target.is_relative_to(self.here) for target in open_files())

    def average(self) -> State:
        """Of the same files, all here."""
        files = [open_weights(self.paths[sha256], sha256) for sha256 in self.contents]
        try:
            return average(files)
        finally:
            for file in files:
                file.close()


def open_files() -> Iterator[Path]:
    for one in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            yield one.readlink()


def bits(state: State) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (tensor.dtype, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for name, tensor in state.items()}


def drawn_state(seed: int, dtypes: Sequence[torch.dtype], signs: bool) -> State:
    rng = torch.Generator().manual_seed(seed)
    state = {f"{number}.weight": torch.randn(3, 5, generator=rng).mul(4).to(dtype) for number, dtype in enumerate(dtypes)}
    state |= {"scale": torch.randn((), generator=rng), "bn.num_batches_tracked": torch.tensor(seed % 7), "index": torch.arange(3)}
    for tensor in state.values():
        if signs and tensor.dim() == 2:
            tensor[0] = torch.tensor([0.0, -0.0, -0.0, 1e-30, -1e-30]).to(tensor.dtype)
    state["tied.weight"] = state["0.weight"]
    return state


@settings(max_examples=25)
@given(
    seeds=st.lists(st.integers(0, 50), min_size=1, max_size=7),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=4),
    signs=st.booleans(),
)
def test_it_is_to_the_bit_the_mean_of_the_files_on_this_node(
    tmp_path_factory: pytest.TempPathFactory, seeds: list[int], dtypes: list[torch.dtype], signs: bool
) -> None:
    store = Warehouse(tmp_path_factory.mktemp("bits"), [drawn_state(seed, dtypes, signs) for seed in seeds])  # equal seeds are duplicates
    found = store.streamed()
    assert bits(found) == bits(store.average())
    assert found["tied.weight"].data_ptr() == found["0.weight"].data_ptr()
    assert len(store.open_when_asked) == len(set(seeds))  # nothing is fetched twice


def test_two_files_and_one_sum_are_here_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    size = 8 << 20
    states = [{f"{part}": torch.randn(size // 32, generator=rng) for part in range(8)} for _ in range(10)]
    store = Warehouse(tmp_path, states)
    del states
    added: list[Weights] = []

    def with_patience(file: Weights, _: Weights) -> None:
        """Add a file only once the next is asked for."""
        added.append(file)
        deadline = time.monotonic() + PATIENCE_S
        while len(store.open_when_asked) < min(len(added) + 1, 10) and time.monotonic() < deadline:
            time.sleep(0.001)

    monkeypatch.setattr(streaming, "require_kin", with_patience)
    with Watched() as memory:
        found = store.streamed()
    assert store.open_when_asked == [0] + [1] * 9  # the next is asked for while one is added, and no third
    assert store.held == 0
    assert memory.grown["Anonymous"] < 1.6 * size
    assert bits(found) == bits(store.average())


def broken_in_the_middle(store: Warehouse, how: Callable[[Path], None]) -> str:
    """Spoil the third file to be added; returns its sha256."""
    third = sorted(store.contents)[2]
    how(store.paths[third])
    return third


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (lambda path: os.truncate(path, 300), "{} has 300 bytes, its header describes"),
        (lambda path: path.write_text("no weights"), "{} has no safetensors header|{} ends inside"),
        (lambda path: save_weights(path, {"other": torch.ones(2)}), r"{}` cannot be averaged with `.*`0\.weight` is missing in it"),
        (lambda path: path.unlink(), "{}"),
    ],
    ids=["truncated", "foreign", "a stranger", "gone"],
)
def test_a_file_that_cannot_be_added_is_named_and_every_other_given_back(tmp_path: Path, how: Callable[[Path], None], told: str) -> None:
    store = Warehouse(tmp_path, [drawn_state(seed, [torch.float32], signs=False) for seed in range(5)])
    third = broken_in_the_middle(store, how)
    with pytest.raises((IngredientMismatch, FileNotFoundError), match=told.replace("{}", f"{third}|{store.paths[third].name}")):
        store.streamed()
    assert store.held == 0


@pytest.fixture
def proxy(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3.port) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


def test_from_object_storage_a_cut_connection_is_resumed_and_a_dead_one_ends_in_a_sentence(
    proxy: FaultyProxy, s3: ObjectStore, tmp_path: Path
) -> None:
    rng = torch.Generator().manual_seed(1)
    store = Warehouse(tmp_path, [{"w": torch.randn(150_000, generator=rng)} for _ in range(3)])
    for sha256, path in store.paths.items():
        storage.upload(path, s3.uri("streamed", f"{sha256}.safetensors"))

    def fetch(sha256: str) -> Weights:
        place = store.here / sha256
        storage.download(s3.uri("streamed", f"{sha256}.safetensors"), place, sha256)
        weights = open_weights(place, sha256).held()
        place.unlink()
        return weights

    proxy.break_next("cut", times=2, after=100_000, match=b".safetensors")
    assert bits(store.streamed(fetch)) == bits(store.average())
    assert proxy.broken == 2

    proxy.break_next("mute", times=0, match=b".safetensors")
    storage.write_bytes(s3.uri("streamed", f"{sorted(store.contents)[1]}.safetensors"), b"something else")
    with pytest.raises(SnapshotBroken, match=f"{sorted(store.contents)[1]}.safetensors hashes to sha256"):
        store.streamed(fetch)

    proxy.break_next("cut", times=10**6, after=0, match=b".safetensors")
    with pytest.raises(ServerUnreachable, match="The object store does not answer"):
        store.streamed(fetch)
    assert store.held == 0
    assert list(store.here.iterdir()) == []
