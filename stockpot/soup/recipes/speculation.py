"""Scoring greedy's next candidates on several devices at once, as if the ones before them were left out, which most are. The decisions are
the sequential ones: an answer is used only when greedy asks that very question, and what an acceptance made idle is thrown away.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from stockpot.soup.recipes.examining import Verdict
from stockpot.soup.recipes.greedy import Question, Score


class Speculation:
    """A `score` for `greedy` with one scorer a device behind it, and the `ahead` that goes with it."""

    def __init__(self, scorers: Sequence[Score]) -> None:
        self.width = len(scorers)
        self._idle: SimpleQueue[Score] = SimpleQueue()
        for scorer in scorers:
            self._idle.put(scorer)
        self._pool = ThreadPoolExecutor(len(scorers))
        self._asked: dict[Question, Future[Verdict]] = {}
        self._dropped: list[Future[Verdict]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._forget(set())
        self._pool.shutdown()

    def ahead(self, questions: Sequence[Question]) -> None:
        """What greedy asks now and, if all of it is left out, next. Questions that no longer come are dropped."""
        wanted = list(dict.fromkeys(questions))[: self.width]
        self._forget(set(wanted))
        for question in wanted:
            if question not in self._asked:
                self._asked[question] = self._pool.submit(self._answer, question)

    def score(self, trials: Sequence[str], need: int) -> Verdict:
        """The answer, waited for."""
        return self._asked.pop((tuple(trials), need)).result()

    @property
    def wasted(self) -> list[Verdict]:
        """Answers nobody asked for in the end; those under way are waited for."""
        return [answer.result() for answer in self._dropped if not answer.exception()]

    def _answer(self, question: Question) -> Verdict:
        scorer = self._idle.get()
        try:
            return scorer(*question)
        finally:
            self._idle.put(scorer)

    def _forget(self, but: set[Question]) -> None:
        for question in self._asked.keys() - but:
            answer = self._asked.pop(question)
            if not answer.cancel():
                self._dropped.append(answer)
