"""What `bench policies` counts, on the real engines of a tiny pair."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tandem_serve.bench import policies, turns
from tandem_serve.bench.policies import Cell, PolicyUnderTest
from tandem_serve.bench.turns import GroupRun, OwnTime, in_turn
from tandem_serve.errors import ConfigError, DeadlineExceeded
from tandem_serve.models.checkpoint import load_decoder, primary_info
from tests.checkpoints import make_drafter, make_primary
from tests.engines import a_request


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    make_drafter(folder / "drafter", make_primary(folder / "primary"))
    return folder


def decoded(pair: Path, name: str, max_tokens: list[int], num_at_once: int, *, steady: bool) -> GroupRun:
    folder = pair / "primary"
    drafters = policies._Drafters(pair)
    contender = PolicyUnderTest(name, load_decoder(folder), primary_info(folder), drafters, num_at_once)
    requests = [a_request(str(i), (5 + i, 6, 7), length) for i, length in enumerate(max_tokens)]
    start = partial(contender.run, requests, num_at_once, steady=steady)
    ((_, run),) = in_turn({name: start}, first=0)
    contender.close()
    return run


def test_requests_that_begin_together_count_from_their_first_tokens_to_the_last(pair: Path) -> None:
    run = decoded(pair, "fixed-0", [6, 10, 6], 3, steady=False)
    assert [len(text) for text in run.texts] == [6, 10, 6]
    assert run.num_tokens == run.num_rounds == 4 + 8 + 4  # but for the first token, and for the step behind it
    assert run.seconds > 0


def test_a_steady_load_counts_steps_that_find_every_place_decoding(pair: Path) -> None:
    run = decoded(pair, "fixed-0", [6, 10, 6], 2, steady=True)
    assert [len(text) for text in run.texts] == [6, 10, 6]
    # Four steps until the first ends, two until the second does, none until the third: beside each prompt two steps are
    # left out.
    assert run.num_tokens == run.num_rounds == 2 * 4 + 2 * 2


def test_texts_do_not_depend_on_how_they_are_measured(pair: Path) -> None:
    plain, closed, steady = (
        decoded(pair, name, [20, 30, 25, 20], 2, steady=steady).texts
        for name, steady in (("fixed-0", False), ("fixed-3", False), ("optimal", True))
    )
    assert plain == closed == steady


def test_policies_take_turns_until_the_last_is_ready() -> None:
    said: list[str] = []

    def steps(name: str, count: int) -> Generator[None, None, str]:
        for _ in range(count):
            said.append(name)
            yield
        return name.upper()

    runs: Any = {"a": partial(steps, "a", 2), "b": partial(steps, "b", 4), "c": partial(steps, "c", 1)}
    assert list(in_turn(runs, first=1)) == [("c", "C"), ("a", "A"), ("b", "B")]
    assert said[:6] == ["b", "c", "a", "b", "a", "b"]  # c has ended in its second turn, and begins again
    assert said.count("b") == 4


def test_what_runs_for_nothing_leaves_nothing_behind(pair: Path) -> None:
    folder = pair / "primary"
    contender = PolicyUnderTest("fixed-2", load_decoder(folder), primary_info(folder), policies._Drafters(pair), 2)
    run = contender.run([a_request("a", max_tokens=50), a_request("b", max_tokens=50)], 2)
    for _ in range(4):
        next(run)
    run.close()
    assert not contender._engine.has_work


def test_a_request_that_fails_fails_the_run(pair: Path) -> None:
    folder = pair / "primary"
    contender = PolicyUnderTest("fixed-2", load_decoder(folder), primary_info(folder), policies._Drafters(pair), 1)
    request = a_request("a", max_tokens=50, timeout_s=0.0)
    with pytest.raises(DeadlineExceeded):
        list(contender.run([request], 1))


def test_a_clock_of_its_own_stands_still_in_others_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now)
    clock = OwnTime()
    for _ in range(2):
        with clock:
            before = clock()
            now += 2
            assert clock() == before + 2
        now += 50
    assert clock() == 4


def test_groups_are_as_many_prompts_as_the_load_takes() -> None:
    prompts = [(i,) for i in range(13)]
    assert [len(group) for group in Cell(2, 1, 0.0).groups(prompts, steady=False)] == [2] * 6
    assert [len(group) for group in Cell(2, 1, 0.0).groups(prompts, steady=True)] == [6] * 2
    with pytest.raises(ConfigError, match="--batch 8 needs 24 prompts"):
        Cell(8, 1, 0.0).groups(prompts, steady=True)
