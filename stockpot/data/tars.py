"""Reading a WebDataset tar strictly: every member accounted for, every departure from the format named.

Stock readers take a damaged or missing header for the end of the archive, stop before what was joined behind it, merge names with dots,
split samples whose members are not adjacent, and drop hidden files, all in silence. Here nothing but zeros may follow the last member, at
least the archive's end marker, and everything else is a `Problem`. Format: POSIX 1003.1-2001 (ustar, pax) and GNU headers as Python's
tarfile reads them; names as in webdataset: the key is the path up to the first dot of its last part, the rest is the extension.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stockpot.data.examination import Problems

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})
"""Extensions that are the sample's picture."""

TOKENS = frozenset({"npy"})
"""Extensions that are the sample's text, as token ids, where it has no picture."""

BLOCK = 512


class Place(NamedTuple):
    """Bytes of a member inside its shard."""

    offset: int
    size: int


@dataclass
class Entry:
    """The members of one sample, in one run."""

    key: str
    members: dict[str, Place] = field(default_factory=dict)


class Found(NamedTuple):
    """A sample that can be read: the place of its picture or tokens, label and json fields."""

    key: str
    extension: str
    place: Place
    label: int
    fields: dict[str, Any]


def read_shard(path: Path, name: str, classes: tuple[str, ...] | None, problems: Problems) -> list[Found]:
    """Every whole sample of a tar on disk, in order; whatever is wrong goes to `problems` under the shard's `name`.

    `classes` lets a json label be a class name; None where they are not known.
    """
    size = path.stat().st_size
    if not size:
        problems.add("empty shard", name, "", "it has 0 bytes")
        return []
    with path.open("rb") as file:
        entries = _adjacent(_entries(file, size, name, problems), name, problems)
        found = [sample for entry in entries if (sample := _sample(file, entry, name, classes, problems))]
    if not entries and not any(problems.counts.values()):
        problems.add("no samples", name, "", f"a tar of {size:,} bytes without samples")
    return found


def _entries(file: BinaryIO, size: int, name: str, problems: Problems) -> list[Entry]:
    """Runs of members with one key, in file order."""
    entries: list[Entry] = []
    for member, place in _members(file, size, name, problems):
        folder, _, base = member.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            problems.ignored["hidden, or without an extension"] += 1
            continue
        key = f"{folder}/{stem}" if folder else stem
        if _unsafe(member):
            problems.add("unsafe member name", name, key, f"{member!r} is absolute, climbs with .., has control characters or is __meta__")
            continue
        if not entries or entries[-1].key != key:
            entries.append(Entry(key))
        if extension.lower() in entries[-1].members:
            problems.add("duplicate member", name, key, f"{member!r} occurs twice in a row; extensions of a sample must differ")
        entries[-1].members[extension.lower()] = place
    return entries


def _members(file: BinaryIO, size: int, name: str, problems: Problems) -> Iterator[tuple[str, Place]]:
    """Regular members, then a problem unless the archive ends where it says it ends."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.issparse():  # its size is what it unpacks to, so nobody knows where it ends
                    problems.add("sparse member", name, member.name, "its bytes do not lie in one piece; pack it without --sparse")
                    return
                end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isreg() else 0)
                if end > size:
                    problems.add("truncated shard", name, member.name, f"{size:,} bytes, its last member ends at byte {end:,}")
                    return
                if member.isreg():
                    yield member.name, Place(member.offset_data, member.size)
                elif not member.isdir():
                    problems.ignored["links and devices"] += 1
    except tarfile.ReadError as error:
        file.seek(0)
        start = file.read(16)
        if end or _names_itself_tar(file):
            problems.add("truncated shard", name, "", f"{size:,} bytes, {error} after byte {end:,}")
        else:
            problems.add("not a tar", name, "", f"{size:,} bytes that start with {start!r}")
        return
    file.seek(end)
    tail = file.read(2 * BLOCK)
    if len(tail) < 2 * BLOCK:
        problems.add("truncated shard", name, "", f"{size:,} bytes, no end marker after byte {end:,}: members may be missing")
    elif any(tail):
        problems.add("damaged header", name, "", f"the header at byte {end:,} of {size:,} is not valid; everything after it would be lost")
    elif any(block.strip(b"\0") for block in iter(lambda: file.read(2**20), b"")):
        problems.add(
            "data after the end", name, "", f"the archive ends at byte {end:,} of {size:,}, more follows; pack joined archives anew as one"
        )


def _names_itself_tar(file: BinaryIO) -> bool:
    file.seek(257)
    return file.read(5) == b"ustar"


def _unsafe(member: str) -> bool:
    """Names that mean another place, and those that webdataset drops in silence, such as `__meta__/a.png`."""
    first, *_ = parts = member.split("/")
    control = any(ord(letter) < 32 or ord(letter) == 127 for letter in member)
    return member.startswith("/") or ".." in parts or control or bool(re.fullmatch("__.*__", first))


def _adjacent(entries: list[Entry], name: str, problems: Problems) -> list[Entry]:
    """The entries whose key comes once; a key that comes back is either scattered or a duplicate."""
    first: dict[str, Entry] = {}
    spoiled: set[str] = set()
    for entry in entries:
        before = first.setdefault(entry.key, entry)
        if before is entry:
            continue
        spoiled.add(entry.key)
        if before.members.keys() & entry.members.keys():
            problems.add("duplicate key", name, entry.key, f"its member .{next(iter(entry.members))} comes again later in the shard")
        else:
            problems.add(
                "members not adjacent", name, entry.key, f".{', .'.join(entry.members)} do not follow .{', .'.join(before.members)}"
            )
    return [entry for entry in entries if entry.key not in spoiled]


def _sample(file: BinaryIO, entry: Entry, name: str, classes: tuple[str, ...] | None, problems: Problems) -> Found | None:
    pictures = input_extensions(entry.members)
    if len(pictures) > 1:
        problems.add("two images", name, entry.key, f"it has .{' and .'.join(pictures)}; a sample has one")
        return None
    if not pictures:
        dotted = [extension for extension in entry.members if extension.rpartition(".")[2] in IMAGES | TOKENS]
        if dotted:
            problems.add(
                "dots in name", name, entry.key, f"{entry.key}.{dotted[0]} has more than one dot, so others share its key; rename it"
            )
        else:
            problems.add("missing image", name, entry.key, f"it has only .{', .'.join(entry.members)}, neither an image nor tokens (.npy)")
        return None
    fields: dict[str, Any] = {}
    if "json" in entry.members:
        try:
            fields = dict(json.loads(_bytes(file, entry.members["json"])))
        except (ValueError, TypeError, RecursionError) as error:
            problems.add("json is no object", name, entry.key, str(error))
            return None
    label = _label(file, entry, fields, name, classes, problems)
    if label is None:
        return None
    return Found(entry.key, pictures[0], entry.members[pictures[0]], label, fields)


def input_extensions(extensions: Iterable[str]) -> list[str]:
    """Those that hold a sample's input: its pictures, or where there is none its tokens. A whole sample has one."""
    members = list(extensions)
    return [one for one in members if one in IMAGES] or [one for one in members if one in TOKENS]


def _label(
    file: BinaryIO, entry: Entry, fields: dict[str, Any], name: str, classes: tuple[str, ...] | None, problems: Problems
) -> int | None:
    if "cls" in entry.members:
        raw: Any = _bytes(file, entry.members["cls"]).decode("utf-8", "replace")
    elif "label" in fields:
        raw = fields["label"]
        if classes and raw in classes:
            return classes.index(raw)
    else:
        problems.add("missing label", name, entry.key, "it has neither .cls nor a `label` in its json")
        return None
    if isinstance(raw, bool) or not re.fullmatch(r"\s*[+-]?\d{1,9}\s*", str(raw)):
        way_out = "; a class name is read from the `label` of its json" if "cls" in entry.members else " and no class name"
        problems.add("label not an integer", name, entry.key, f"label {str(raw)[:40]!r} is no integer{way_out}")
        return None
    return int(raw)


def _bytes(file: BinaryIO, place: Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)
