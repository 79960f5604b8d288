"""Where a publication's samples come from: a folder of class folders, or WebDataset shards, local or on S3."""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from stockpot import storage
from stockpot.data.examination import Problems
from stockpot.data.publishing import Sample
from stockpot.data.tars import IMAGES, TOKENS, read_shard
from stockpot.digests import short
from stockpot.errors import BadRequest, ObjectMissing, StockpotError, counted
from stockpot.storage import StoredObject

READ_AHEAD = 16
"""Files of a folder fetched at once."""

UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and what Python makes of file names that are no UTF-8."""


@dataclass(frozen=True)
class ClassFolders:
    """`SOURCE/<class>/.../<picture>`: one sample a picture, or where there are none a text as token ids (`.npy`), labelled by its first
    folder, in order of address."""

    uri: str
    named: tuple[str, ...] = ()
    """The classes in the order of their labels; default: the folders' names, sorted."""

    @cached_property
    def _listed(self) -> list[StoredObject]:
        return storage.list_prefix(f"{self.uri.rstrip('/')}/")

    @cached_property
    def _files(self) -> list[StoredObject]:
        storage.check(self.uri, missing="check the path")
        if odd := [item.uri for item in self._listed if UNWRITABLE.search(item.uri)]:
            raise BadRequest(
                f"Found {counted(len(odd), 'file name')} with control characters, or no UTF-8, such as {odd[0]!a}: rename what is named so."
            )
        shown = [item for item in self._listed if "/" in self._below(item) and not _hidden(self._below(item))]
        pictures, texts = ([item for item in shown if _extension(item) in kinds] for kinds in (IMAGES, TOKENS))
        if not pictures and not texts:
            raise self._nothing()
        self._require_no_empty_class(pictures or texts)
        return pictures or texts

    def _nothing(self) -> ObjectMissing:
        beside = [item.uri for item in self._listed if "/" not in self._below(item) and _extension(item) in IMAGES | TOKENS]
        if beside:
            return ObjectMissing(
                f"All samples of {self.uri} ({counted(len(beside), 'file')}, such as {beside[0]}) lie beside class folders, none in one: "
                "put each class into a folder of its own."
            )
        return ObjectMissing(
            f"There are no pictures, nor texts as token ids (.npy), in class folders under {self.uri} "
            f"({counted(len(self._listed), 'other file')}); check the path."
        )

    def _require_no_empty_class(self, samples: list[StoredObject]) -> None:
        """A folder without samples would be no class, and the labels behind it others, without a word."""
        filled = {self._below(item).split("/")[0] for item in samples}
        if empty := [name for name in storage.folders(self.uri) if name not in filled and not _hidden(name)]:
            raise ObjectMissing(
                f"No samples are in {counted(len(empty), 'folder')} under {self.uri} ({', '.join(empty[:5])}), needed is at least one in "
                "each class folder: fill or remove what is named."
            )

    def left_out(self) -> list[str]:
        """Sentences on the files that are no sample."""
        taken = {item.uri for item in self._files}
        rest = [item.uri for item in self._listed if item.uri not in taken]
        told = [f"left out as no samples in class folders: {counted(len(rest), 'file')}, such as {', '.join(rest[:3])}"] if rest else []
        names = f"{self.uri.rstrip('/')}/classes.txt"
        if names in rest and not self.named and self._are_classes(names):
            order = "labels are in the order of the folders' names"
            told.append(f"{names} names classes and was not read: {order}, or with --classes {names} in its own")
        return told

    def _are_classes(self, uri: str) -> bool:
        """Whether lines of a file are names of classes here; a file that cannot be read is none of ours, and publishing is over."""
        try:
            return bool({*_lines(uri, "replace")} & {*self.classes})
        except (StockpotError, OSError):
            return False

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Those named, or the folders' names, sorted. Raises `BadRequest` unless each name has its folder, and each folder its name."""
        found = {self._below(item).split("/")[0] for item in self._files}
        if self.named and found != {*self.named}:
            raise BadRequest(
                f"The class names given and the class folders of {self.uri} differ (folders not named: {_some(found - {*self.named})}; "
                f"names without a folder: {_some({*self.named} - found)}), needed is one folder for each name: correct names or folders."
            )
        return self.named or tuple(sorted(found))

    @property
    def identity(self) -> str:
        """Changes when a file is added, removed or replaced."""
        return short([[item.uri, item.size, item.etag] for item in self._files])

    @property
    def total(self) -> int:
        """Samples."""
        return len(self._files)

    def samples(self, start: int) -> Iterator[Sample]:
        """The samples after the first `start`."""
        labels = {name: label for label, name in enumerate(self.classes)}
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            rest = iter(self._files[start:])
            while batch := list(islice(rest, READ_AHEAD)):
                for item, data in zip(batch, pool.map(lambda item: storage.read_bytes(item.uri), batch), strict=True):
                    below = self._below(item)
                    yield Sample(safe_key(below), data, labels[below.split("/")[0]], _extension(item), origin=item.uri)

    def _below(self, item: StoredObject) -> str:
        return item.uri[len(self.uri.rstrip("/")) + 1 :]


@dataclass(frozen=True)
class ExistingShards:
    """The samples of WebDataset tars under a prefix, packed anew. Each tar is read strictly: a flaw in one stops the publication."""

    uri: str
    classes: tuple[str, ...]
    total: int | None = None
    _ignored: Counter[str] = field(default_factory=Counter)

    @cached_property
    def shards(self) -> list[StoredObject]:
        """The tars, in order of address."""
        return list_shards(self.uri)

    @property
    def identity(self) -> str:
        """Changes when a shard is added, removed or replaced."""
        return short([[item.uri, item.size, item.etag] for item in self.shards])

    def samples(self, start: int) -> Iterator[Sample]:
        """The samples after the first `start`. Raises `ProblemsFound` with all problems of the first flawed shard."""
        passed = 0
        with tempfile.TemporaryDirectory(prefix="stockpot-source-") as folder:
            for item in self.shards:
                path = Path(folder) / "shard.tar"
                storage.download(item.uri, path)
                problems = Problems()
                found = read_shard(path, item.uri, self.classes, problems)
                problems.raise_unless_within(0, len(found))
                self._ignored.update(problems.ignored)
                with path.open("rb") as file:
                    for sample in found[max(0, start - passed) :]:
                        file.seek(sample.place.offset)
                        yield Sample(sample.key, file.read(sample.place.size), sample.label, sample.extension, sample.fields)
                passed += len(found)

    def left_out(self) -> list[str]:
        """Sentences on the members that are no part of a sample, of the shards read so far."""
        return Problems(ignored=self._ignored).left_out()


def list_shards(uri: str) -> list[StoredObject]:
    """The tars under a prefix, or the one tar. Raises `ObjectMissing` with the number of objects that were listed, `BadRequest` for packed
    tars among them, whose samples would be missed."""
    if not uri.endswith(".tar"):
        uri = f"{uri.rstrip('/')}/"
    storage.check(uri, missing="check the path")
    listed = storage.list_prefix(uri)
    shards = [item for item in listed if item.uri.endswith(".tar")]
    if not shards:
        raise ObjectMissing(
            f"There are no .tar objects under {uri} ({counted(len(listed), 'other object')}); check the spelling of the prefix."
        )
    if packed := [item.uri for item in listed if re.search(r"\.(tar\.(gz|bz2|xz|zst|lz4|Z)|tgz|tbz2|txz)$", item.uri)]:
        raise BadRequest(
            f"{packed[0]} is packed ({counted(len(packed), 'such shard')}, {len(shards):,} plain): unpack it to .tar, or move it away."
        )
    return shards


def read_classes(uri: str) -> tuple[str, ...]:
    """Class names from a text file, one a line, the first is label 0."""
    try:
        names = _lines(uri)
    except UnicodeDecodeError as error:
        raise BadRequest(f"{uri} is no text in UTF-8 (byte {error.start}); write the class names in it, one a line.") from error
    if len(set(names)) != len(names) or not names:
        raise BadRequest(f"{uri} holds {len(names)} class names, {len(set(names))} of them different; write each once, one a line.")
    return names


def _lines(uri: str, errors: str = "strict") -> tuple[str, ...]:
    text = storage.read_bytes(uri).decode("utf-8-sig", errors)
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def safe_key(path: str) -> str:
    """A WebDataset key for a file: without dots, and as different as the paths are."""
    stem, _, extension = path.rpartition(".")
    plain = re.sub(r"^__", "-_", re.sub(r"[^A-Za-z0-9_/-]", "_", f"{stem}-{extension}"))  # webdataset drops what begins as `__meta__/`
    if plain == f"{stem}-{extension}" and len(plain) < 80:
        return plain
    return f"{plain[:70]}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def _extension(item: StoredObject) -> str:
    return item.uri.rpartition(".")[2].lower()


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "none"


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))
