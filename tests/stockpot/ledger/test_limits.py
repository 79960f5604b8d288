"""Guards: a text too long for MLflow's tables ends with a whole line and says where the rest is."""

from hypothesis import given
from hypothesis import strategies as st

from stockpot.ledger.limits import shortened

REST = "The rest is elsewhere."


@given(st.lists(st.text("ab |é", max_size=30), max_size=40), st.integers(60, 400))
def test_a_text_is_cut_at_a_whole_line(lines: list[str], most: int) -> None:
    text = "\n".join(lines)
    found = shortened(text, most, REST)
    if len(text) <= most:
        assert found == text
    else:
        kept = found.removesuffix(f"\n{REST}")
        assert len(found) <= most
        assert kept != found
        assert not kept or (kept.endswith("\n") and text.startswith(kept))
        assert most - len(found) < 31, "no line was left out that would have fitted"
