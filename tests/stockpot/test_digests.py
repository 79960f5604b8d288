"""Promise: equal values have equal digests, whatever their order of keys; different values do not; a file's digest is sha256."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.digests import canonical, digest, file_digest, short

VALUES = st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.booleans()), max_size=5)


@given(VALUES)
def test_key_order_does_not_matter(value):
    assert digest(dict(reversed(list(value.items())))) == digest(value)


@given(VALUES, VALUES)
def test_digests_differ_when_values_do(one, other):
    assert (canonical(one) == canonical(other)) == (digest(one) == digest(other))


def test_not_a_number_has_no_identity():
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


def test_a_file_is_its_sha256(tmp_path):
    (tmp_path / "bytes").write_bytes(b"soup")
    assert file_digest(tmp_path / "bytes") == hashlib.sha256(b"soup").hexdigest()
    assert len(short("soup")) == 12
