"""Turns of a step each: how several ways of decoding the same requests are measured side by side.

A machine that others share is now faster, now slower by a tenth, for seconds: turns of a step each are all hit alike.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tandem_serve.errors import TandemError
from tandem_serve.types import GenerationRequest, GenerationStep


@dataclass(frozen=True)
class GroupRun:
    """One group of requests. Prompts and first tokens are left out."""

    texts: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_rounds: int  # of single sequences, with drafts or without
    num_drafts: int
    num_accepted: int
    seconds: float


class Group:
    """A group of requests as it is decoded, with others of which only the steps count."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        self._names = [request.request_id for request in requests]
        self._texts: dict[str, list[int]] = {}
        self._ended: set[str] = set()
        self._counted: list[GenerationStep] = []
        self.error: TandemError | None = None
        self.is_counting = False  # of the present step
        self.seconds = 0.0  # of all that are counted

    @property
    def all_have_begun(self) -> bool:
        """Whether each has its first token."""
        return all(name in self._texts for name in self._names)

    @property
    def has_ended(self) -> bool:
        return self._ended.issuperset(self._names)

    @property
    def decoding(self) -> list[str]:
        """Those that have a token, and want more."""
        return [name for name in self._texts if name not in self._ended]

    def add(self, step: GenerationStep) -> None:
        self._texts.setdefault(step.request_id, []).extend(step.token_ids)
        if step.finish_reason is not None:
            self._ended.add(step.request_id)
        if self.is_counting:
            self._counted.append(step)

    def run(self) -> GroupRun:
        return GroupRun(
            texts=tuple(tuple(self._texts[name]) for name in self._names),
            num_tokens=sum(len(step.token_ids) for step in self._counted),
            num_rounds=len(self._counted),
            num_drafts=sum(step.num_draft_tokens for step in self._counted),
            num_accepted=sum(step.num_accepted_tokens for step in self._counted),
            seconds=self.seconds,
        )


class OwnTime:
    """A clock that stands still while others have their turns: engines learn costs from theirs."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began: float | None = None

    def __call__(self) -> float:
        return self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds = self()
        self._began = None


def again_and_again(requests: Sequence[GenerationRequest]) -> Iterator[GenerationRequest]:
    """The requests, and then the same ones under other names, without end."""
    yield from requests
    for turn in itertools.count(1):
        yield from (replace(request, request_id=f"{request.request_id}-again-{turn}") for request in requests)


def in_turn(
    runs: Mapping[str, Callable[[], Generator[None, None, GroupRun]]], first: int
) -> Iterator[tuple[str, GroupRun]]:
    """Steps all in turn, beginning with that one; each result, by its name, as it comes.

    Who is ready begins again, for nothing, until all are: the others' turns should not become other ones.
    """
    names = [*runs][first % len(runs) :] + [*runs][: first % len(runs)]
    going = {name: runs[name]() for name in names}
    ended: set[str] = set()
    while len(ended) < len(names):
        for name in names:
            try:
                next(going[name])
            except StopIteration as end:
                if name not in ended:
                    ended.add(name)
                    yield name, end.value
                going[name] = runs[name]()
    for run in going.values():
        run.close()
