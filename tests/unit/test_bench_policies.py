"""What `bench policies` counts, on the real engines of a tiny pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem_serve.bench import policies
from tandem_serve.bench.policies import Cell, GroupRun, OwnTime, PolicyUnderTest
from tandem_serve.errors import ConfigError
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
    ((_, run),) = policies._in_turn({name: contender.run(requests, num_at_once, steady=steady)})
    contender.close()
    return run


def test_requests_that_begin_together_count_from_their_first_tokens_to_the_last(pair: Path) -> None:
    run = decoded(pair, "fixed-0", [6, 10, 6], 3, steady=False)
    assert [len(text) for text in run.texts] == [6, 10, 6]
    assert run.num_tokens == run.num_rounds == 5 + 9 + 5
    assert run.seconds > 0


def test_a_steady_load_counts_steps_that_find_every_place_decoding(pair: Path) -> None:
    run = decoded(pair, "fixed-0", [6, 10, 6], 2, steady=True)
    assert [len(text) for text in run.texts] == [6, 10, 6]
    # Both of the first two until the first ends; a step with the third's prompt; the two that are left; a tail.
    assert run.num_tokens == run.num_rounds == 2 * 5 + 2 * 3


def test_texts_do_not_depend_on_how_they_are_measured(pair: Path) -> None:
    plain, closed, steady = (
        decoded(pair, name, [20, 30, 25, 20], 2, steady=steady).texts
        for name, steady in (("fixed-0", False), ("fixed-3", False), ("optimal", True))
    )
    assert plain == closed == steady


def test_policies_take_turns_step_by_step() -> None:
    said: list[str] = []

    def steps(name: str, count: int):  # type: ignore[no-untyped-def]
        for _ in range(count):
            said.append(name)
            yield
        return name.upper()

    ended = list(policies._in_turn({"a": steps("a", 2), "b": steps("b", 4)}))
    assert said == ["a", "b", "a", "b", "b", "b"]
    assert ended == [("a", "A"), ("b", "B")]


def test_a_clock_of_its_own_stands_still_in_others_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(policies.time, "perf_counter", lambda: now)
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
