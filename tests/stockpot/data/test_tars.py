"""No tar loses a sample in silence: each way of being broken, as listed from reproductions with the stock reader, gives a named problem."""

import io
import tarfile
from pathlib import Path

import pytest

from stockpot.data.examination import Problems
from stockpot.data.tars import Found, read_shard
from tests.tiny_data import CLASSES, picture

PICTURES = [picture(number) for number in range(3)]


def tar(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def sample(key: str, label: bytes = b"1", image: bytes = PICTURES[0]) -> list[tuple[str, bytes]]:
    return [(f"{key}.cls", label), (f"{key}.png", image)]


def sparse(members: list[tuple[str, bytes]]) -> bytes:
    """As `tar --sparse` leaves it: the picture is one byte after a hole of a megabyte, by its map."""
    data = bytearray(tar(members[:-1])[: 2 * 512])
    info = tarfile.TarInfo(members[-1][0])
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 1
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (2**20, 1)
    header[483:495] = b"%011o\0" % (2**20 + 1)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(data + header + b"x".ljust(512, b"\0") + bytes(1024))


GOOD = tar([*sample("a"), *sample("b"), *sample("c")])


def flipped(data: bytes, byte: int) -> bytes:
    return data[:byte] + bytes([data[byte] ^ 4]) + data[byte + 1 :]


def read(tmp_path: Path, data: bytes, classes: tuple[str, ...] | None = CLASSES) -> tuple[list[Found], Problems]:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    problems = Problems()
    return read_shard(path, "x.tar", classes, problems), problems


def test_a_good_tar_gives_every_sample_where_its_bytes_are(tmp_path: Path) -> None:
    found, problems = read(tmp_path, GOOD)
    assert [(one.key, one.label, one.extension) for one in found] == [("a", 1, "png"), ("b", 1, "png"), ("c", 1, "png")]
    assert all(GOOD[one.place.offset : one.place.offset + one.place.size] == PICTURES[0] for one in found)
    assert not problems.counts
    assert not problems.ignored


second = GOOD.index(b"b.cls")
image_of_b = GOOD.index(b"b.png")

BROKEN = {
    "truncated at a member boundary": (GOOD[:second], "truncated shard"),
    "truncated between label and image": (GOOD[:image_of_b], "truncated shard"),
    "truncated inside a header": (GOOD[: second + 100], "truncated shard"),
    "truncated inside an image": (GOOD[: image_of_b + 700], "truncated shard"),
    "a flipped bit in a later header": (flipped(GOOD, second + 10), "damaged header"),
    "a flipped bit in the first header": (flipped(GOOD, 10), "truncated shard"),
    "zero bytes": (b"", "empty shard"),
    "no members": (tar([]), "no samples"),
    "an HTML page": (b"<html><body>403 Forbidden</body></html>" * 40, "not a tar"),
    "a short HTML page": (b"<html>no</html>", "not a tar"),
    "missing label": (tar([("a.png", PICTURES[0]), *sample("b")]), "missing label"),
    "missing image": (tar([("a.cls", b"1"), *sample("b")]), "missing image"),
    "label 'cat.'": (tar(sample("a", b"cat.")), "label not an integer"),
    "label 1.5": (tar(sample("a", b"1.5")), "label not an integer"),
    "empty label": (tar(sample("a", b"")), "label not an integer"),
    "label with a byte order mark": (tar(sample("a", b"\xef\xbb\xbf1")), "label not an integer"),
    "label that is not text": (tar(sample("a", b"\xff\xfe1")), "label not an integer"),
    "json that is no object": (tar([("a.json", b"[1"), ("a.png", PICTURES[0])]), "json is no object"),
    "key repeated later": (tar([*sample("a"), *sample("b"), *sample("a")]), "duplicate key"),
    "member twice in a row": (tar([("a.cls", b"1"), ("a.png", PICTURES[0]), ("a.png", PICTURES[1])]), "duplicate member"),
    "members not adjacent": (
        tar([("a.png", PICTURES[0]), ("b.png", PICTURES[1]), ("a.cls", b"0"), ("b.cls", b"1")]),
        "members not adjacent",
    ),
    "dots in names": (tar([("i.v1.png", PICTURES[0]), ("i.v1.cls", b"0"), ("i.v2.png", PICTURES[1]), ("i.v2.cls", b"1")]), "dots in name"),
    "two images": (tar([("a.cls", b"1"), ("a.jpg", PICTURES[0]), ("a.png", PICTURES[1])]), "two images"),
    "climbing name": (tar(sample("../../etc/x")), "unsafe member name"),
    "absolute name": (tar(sample("/abs/y")), "unsafe member name"),
    "newline in name": (tar(sample("a\nb")), "unsafe member name"),
    "a name that webdataset drops": (tar(sample("__meta__/a")), "unsafe member name"),
    "two archives joined": (GOOD + tar(sample("d")), "data after the end"),
    "a json deeper than any": (tar([("a.json", b"[" * 10**5), ("a.png", PICTURES[0])]), "json is no object"),
    "a sparse member": (sparse(sample("a")), "sparse member"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tar_is_named(tmp_path: Path, case: str) -> None:
    data, kind = BROKEN[case]
    _, problems = read(tmp_path, data)
    assert kind in problems.counts, (case, problems.counts)
    example = problems.examples[kind][0]
    assert example.shard == "x.tar"
    assert example.detail


def test_hidden_members_and_files_without_extension_are_counted(tmp_path: Path) -> None:
    found, problems = read(tmp_path, tar([(".hidden.png", PICTURES[0]), ("README", b"hi"), *sample("a")]))
    assert [one.key for one in found] == ["a"]
    assert sum(problems.ignored.values()) == 2
    assert not problems.counts
    assert problems.left_out() == ["left out: 2 members (hidden, or without an extension)"]


def test_a_label_may_be_a_field_of_the_json_by_number_or_name(tmp_path: Path) -> None:
    members = [("a.json", b'{"label": "cat", "patient": 7}'), ("a.png", PICTURES[0]), ("b.json", b'{"label": 1}'), ("b.png", PICTURES[1])]
    found, problems = read(tmp_path, tar(members))
    assert [(one.label, one.fields.get("patient")) for one in found] == [(2, 7), (1, None)]
    assert not problems.counts


def test_a_class_name_in_a_cls_is_told_where_it_belongs(tmp_path: Path) -> None:
    _, problems = read(tmp_path, tar(sample("a", b"cat")))
    (problem,) = problems.examples["label not an integer"]
    assert problem.detail == "label 'cat' is no integer; a class name is read from the `label` of its json"


def test_long_names_in_folders_are_read_in_gnu_and_pax_format(tmp_path: Path) -> None:
    for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=style) as archive:
            for name, data in sample("/".join(["part"] * 40 + ["é"])):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        found, problems = read(tmp_path, file.getvalue())
        assert [one.label for one in found] == [1]
        assert not problems.counts
