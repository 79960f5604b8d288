"""Guards: a cached score answers only the question it can answer, and its key holds everything that decides it."""

from pathlib import Path

import pytest
import torch

from stockpot.outcomes import Accuracy
from stockpot.soup import score_cache
from stockpot.soup.recipes.examining import Verdict
from stockpot.soup.score_cache import ScoreCache


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    return ScoreCache(tmp_path, "cpu")


def test_an_exact_score_answers_every_question(cache: ScoreCache) -> None:
    verdict = Verdict(Accuracy(correct=7, seen=10), 10)
    cache.put("k", verdict)
    assert [cache.get("k", need) for need in (0, 7, 8)] == [verdict] * 3
    assert cache.get("other", 0) is None


def test_a_bound_answers_only_that_more_is_not_reached(cache: ScoreCache) -> None:
    verdict = Verdict(Accuracy(correct=7, seen=10), 4)
    cache.put("k", verdict)
    assert cache.get("k", 8) == verdict
    assert cache.get("k", 7) is None


def test_a_score_that_a_crash_of_the_node_left_empty_is_none(cache: ScoreCache) -> None:
    cache.put("k", Verdict(Accuracy(correct=7, seen=10), 10))
    (cache.folder / "k.json").write_text("")
    assert cache.get("k", 0) is None


def test_the_key_knows_multiplicity_split_transform_device_and_arithmetic_but_no_order(
    cache: ScoreCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = cache.key(["a", "b"], "s", "held_out", "t")
    assert key == cache.key(["b", "a"], "s", "held_out", "t")
    others = [cache.key(["a", "b", "b"], "s", "held_out", "t"), cache.key(["a", "b"], "z", "held_out", "t"),
              cache.key(["a", "b"], "s", "gate", "t"), cache.key(["a", "b"], "s", "held_out", "u"),
              ScoreCache(cache.folder, "cuda").key(["a", "b"], "s", "held_out", "t")]  # fmt: skip
    for owner, name in ((score_cache, "ARITHMETIC"), (torch, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, "another")
            others.append(cache.key(["a", "b"], "s", "held_out", "t"))
    assert len({key, *others}) == 8
