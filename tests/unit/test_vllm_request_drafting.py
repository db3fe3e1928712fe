"""The drafting of vLLM's requests, without vLLM: a test plays its scheduler, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tandem_serve.engine.local_link import local_link_factory
from tandem_serve.engine.vllm_primary import requirements
from tandem_serve.engine.vllm_primary.options import TandemOptions
from tandem_serve.engine.vllm_primary.prefixes import PrefixRepresentations
from tandem_serve.engine.vllm_primary.request_args import drafting_request, extra_args, noise_sampling
from tandem_serve.engine.vllm_primary.request_drafting import Outcome, RequestDrafting
from tandem_serve.errors import ConfigError
from tandem_serve.interfaces import LinkState
from tandem_serve.metrics import WithoutDraft
from tandem_serve.types import DraftEvent, ExtendSequence, PolicyName, SamplingParams
from tests.drafter_peer import TEXT, expected_drafts, representations
from tests.engines import GREEDY, a_request, make_drafter_engine, tiny_drafter, tiny_primary
from tests.scripted_link import Clock, Life, ScriptedLink, block

BLOCK = 8  # positions a KV block
HASHES = [f"hash {index}" for index in range(len(TEXT) // BLOCK)]  # of TEXT's blocks


def make(kind: str = "tandem", link: ScriptedLink | None = None, **options: object) -> tuple[RequestDrafting, Clock]:
    clock = Clock()
    options = {"taps": tiny_drafter(kind)[1].taps, "drafters": ("d",), "block_length": 4, **options}
    factory = link or local_link_factory({"d": make_drafter_engine(kind)}, synchronous=True)
    return (
        RequestDrafting(
            TandemOptions(tiny_primary()[1], **options),  # type: ignore[arg-type]
            link_factory=factory,
            block_size=BLOCK,
            clock=clock,
        ),
        clock,
    )


def begin(drafting: RequestDrafting, name: str = "v", num_prompt: int = 20) -> None:
    drafting.add(name, a_request(f"seq-{name}", TEXT[:num_prompt], 40))


def step(
    drafting: RequestDrafting,
    start: int,
    num_rows: int,
    token_ids: Sequence[int],
    *,
    name: str = "v",
    num_drafts: int = 0,
    tandem: bool = True,
) -> None:
    """One step for one request, over TEXT."""
    states = representations(TEXT[: start + num_rows])[start:] if tandem else None
    drafting.record([Outcome(name, start, num_rows, num_drafts, token_ids, HASHES)], states)
    drafting.send()


@pytest.mark.parametrize("kind", ["tandem", "plain"])
def test_drafts_follow_a_chunked_prompt_and_each_verification(kind: str) -> None:
    drafting, _ = make(kind)
    begin(drafting)
    step(drafting, 0, 12, (), tandem=kind == "tandem")
    assert drafting.select(()).drafts == {}, "nothing is asked for before the prompt has run"
    step(drafting, 12, 8, TEXT[20:21], tandem=kind == "tandem")
    drafts = expected_drafts(20, 4, GREEDY, kind)
    assert drafting.select(["v"]).drafts == {"v": drafts}
    assert drafting.select(["v"]).drafts == {"v": drafts}, "until it has run"
    drafting.take(["v"])
    assert drafting.select(["v"]).drafts == {}
    step(drafting, 20, 5, TEXT[21:24], num_drafts=4, tandem=kind == "tandem")  # two accepted
    assert drafting.select(["v"]).drafts == {"v": expected_drafts(23, 4, GREEDY, kind)}
    assert drafting.last_step == {"seq-v": (4, 2)}
    assert drafting.metrics.num_accepted_tokens._value.get() == 2


def test_a_request_is_held_until_its_drafts_are_there_or_late() -> None:
    link = ScriptedLink(tiny_drafter()[1], lambda *round: [])  # never answers
    drafting, clock = make(link=link, draft_timeout_s=0.5)
    begin(drafting)
    step(drafting, 0, 20, TEXT[20:21])
    assert drafting.select(["v"]).held == {"v"}
    clock.now_s = 0.6
    assert drafting.select(["v"]).held == set()
    drafting.take(["v"])
    assert drafting.metrics.without_draft[WithoutDraft.LATE]._value.get() == 1
    step(drafting, 20, 1, TEXT[21:22])
    assert drafting.select(["v"]).held == set(), "it cools down"
    drafting.finish(["v"])
    drafting.send()
    assert link.closed


def test_who_is_ready_waits_for_others_as_long_as_a_pass_of_all_saves_more() -> None:
    asked: dict[str, Callable[[], None]] = {}

    def script(link: ScriptedLink, life: Life, command: ExtendSequence) -> list[DraftEvent]:
        asked[command.sequence_id] = lambda: link.events.append(block(life, command, TEXT[: command.block_length]))
        return []

    drafting, clock = make(link=ScriptedLink(tiny_drafter()[1], script), adapts=False)
    drafting.policy.observe_step(5, 0.10)
    drafting.policy.observe_step(10, 0.12)  # 0.08 less than two of five
    names = ["a", "b"]
    for name in names:
        begin(drafting, name)
        step(drafting, 0, 20, TEXT[20:21], name=name)
    ends = 20
    for answers, at_s, alone, runs in (
        (["a", "b"], 0.010, True, {"a", "b"}),
        (["a"], 0.015, True, set()),  # b's are expected at 0.020
        ([], 0.090, True, set()),  # they are late
        ([], 0.096, True, {"a"}),  # a has waited for all that there was to gain
    ):
        clock.now_s = at_s
        for name in answers:
            asked[f"seq-{name}"]()
        assert drafting.select(names, alone=alone).drafts.keys() == runs, at_s
        if len(runs) == 2:
            drafting.take(names)
            for name in names:
                step(drafting, ends, 5, TEXT[ends + 1 : ends + 2], num_drafts=4, name=name)
    clock.now_s = 0.015
    assert drafting.select(names, alone=False).drafts.keys() == {"a"}, "a prompt runs, and a beside it"


def test_who_is_aborted_while_waiting_for_others_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    link = ScriptedLink(tiny_drafter()[1], lambda *round: [])
    drafting, clock = make(link=link, adapts=False)
    for num_tokens in (1, 5, 6):
        drafting.policy.observe_step(num_tokens, 0.10)  # a pass of all saves a whole one
    begin(drafting, "held")
    step(drafting, 0, 20, TEXT[20:21], name="held")
    drafting.add("ready", a_request("seq-ready", TEXT[:20], 40, block_length=0))
    step(drafting, 0, 20, TEXT[20:21], name="ready")
    names = ["held", "ready"]
    assert drafting.select(names, alone=True).held == set(names)
    timeouts: list[float] = []
    monkeypatch.setattr(drafting._arrived, "wait", timeouts.append)
    drafting.wait(5.0)
    drafting.finish(names)
    clock.now_s = 60.0
    drafting.wait(5.0)
    assert 0 < timeouts[0] <= 0.10
    assert timeouts[1] == 5.0


def test_nobody_waits_where_nothing_is_measured_or_drafts_take_longer_than_a_pass() -> None:
    link = ScriptedLink(tiny_drafter()[1], lambda *round: [])
    drafting, _ = make(link=link, adapts=False)
    begin(drafting, "held")
    step(drafting, 0, 20, TEXT[20:21], name="held")
    drafting.add("ready", a_request("seq-ready", TEXT[:20], 40, block_length=0))
    step(drafting, 0, 20, TEXT[20:21], name="ready")
    names = ["held", "ready"]
    assert drafting.select(names, alone=True).held == {"held"}
    drafting.policy.observe_step(1, 0.10)
    drafting.policy.observe_step(6, 0.7)  # one by one is as fast
    drafting.take(["ready"])
    assert drafting.select(names, alone=True).held == {"held"}


def test_a_cached_prefix_is_drafted_from_what_was_kept_of_it() -> None:
    drafting, _ = make()
    begin(drafting, "first", 20)
    step(drafting, 0, 20, TEXT[20:21], name="first")
    begin(drafting, "second", 20)
    step(drafting, 16, 4, TEXT[20:21], name="second")  # vLLM had two blocks of eight
    assert drafting.select(["second"]).drafts == {"second": expected_drafts(20, 4, GREEDY, "tandem")}


def test_a_cached_prefix_that_nobody_kept_goes_undrafted() -> None:
    drafting, _ = make(prefix_memory_bytes=0)
    begin(drafting, "first", 20)
    step(drafting, 0, 20, TEXT[20:21], name="first")
    begin(drafting, "second", 20)
    step(drafting, 16, 4, TEXT[20:21], name="second")
    assert drafting.select(["first", "second"]).drafts.keys() == {"first"}
    drafting.take(["second"])
    assert drafting.metrics.without_draft[WithoutDraft.NO_REPRESENTATIONS]._value.get() == 1


def test_what_is_computed_again_after_a_preemption_is_not_sent_again() -> None:
    drafting, _ = make()
    begin(drafting)
    step(drafting, 0, 20, TEXT[20:21])
    assert "v" in drafting.select(["v"]).drafts
    step(drafting, 0, 12, ())  # preempted, and prefilled again
    step(drafting, 12, 9, TEXT[21:22])
    assert drafting.select(["v"]).drafts == {"v": expected_drafts(21, 4, GREEDY, "tandem")}


def test_an_error_costs_drafts_alone() -> None:
    link = ScriptedLink(tiny_drafter()[1], lambda *round: [])
    drafting, _ = make(link=link)
    begin(drafting)
    step(drafting, 0, 20, TEXT[20:21])
    link.receive = lambda: 1 // 0  # type: ignore[assignment,return-value]
    assert drafting.select(["v"]).held == set()
    link.state = LinkState.CLOSED
    assert drafting.select(["v"]).held == set()


def test_prefixes_are_bounded_and_the_least_recently_used_goes_first() -> None:
    block = representations(TEXT[:BLOCK])
    prefixes = PrefixRepresentations(BLOCK, 2 * block.nbytes)
    for name in ("a", "b"):
        prefixes.put(name, block)
    assert prefixes.read(["a"], 2, 7) is not None
    prefixes.put("c", block)
    assert [name in prefixes for name in "abc"] == [True, False, True]
    assert prefixes.num_bytes == 2 * block.nbytes
    assert prefixes.read(["a", "b"], 0, 16) is None
    found = prefixes.read(["a", "c"], 4, 12)
    assert found is not None and found.equal(block[[4, 5, 6, 7, 0, 1, 2, 3]])


def test_options_and_requests_survive_their_way_through_vllm() -> None:
    kept = TandemOptions(tiny_primary()[1], taps=(1, 3), drafters=("a:1",), block_length=3)
    assert TandemOptions.from_config(kept.to_config()) == kept
    for damaged in ({}, None, {"tandem": {"primary": {}}}):
        with pytest.raises(ConfigError, match="additional_config"):
            TandemOptions.from_config(damaged)
    options = {"block_length": 2, "drafter_address": "a:1", "policy": PolicyName.ENTROPY, "threshold": 0.3}
    request = a_request("r", (1, 2), 9, SamplingParams(0.8, seed=3), **options)
    extra = extra_args(request, shared_noise=True)
    assert drafting_request("vllm-id", (1, 2), 9, extra) == request
    assert noise_sampling(extra) == request.sampling
    plain = drafting_request("v" * 200, (1, 2), 9, None)
    assert (plain.sampling, len(plain.request_id)) == (GREEDY, 128)
    assert noise_sampling(extra_args(request, shared_noise=False)) is None


@pytest.mark.parametrize("extra", [None, {}, {"tandem": "x"}, {"tandem": ["sampling"]}, {"other": 1}])
def test_what_other_clients_put_there_is_none_of_ours(extra: dict[str, object] | None) -> None:
    assert noise_sampling(extra) is None
    assert drafting_request("r", (1, 2), 3, extra).sampling.temperature == 0


def test_the_docs_list_what_is_relied_on() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    parts = (requirements.RUNNER, requirements.BATCH, requirements.SAMPLER, requirements.EXECUTE_STATE)
    names = {name for part in (*parts, requirements.SCHEDULER, requirements.REQUEST) for name in part}
    assert {name for name in names if f"{name}`" not in docs} == set()
    assert all(version in docs for version in requirements.TESTED)


def test_a_vllm_that_lacks_something_is_named() -> None:
    class Sampler:
        logprobs_mode = use_fp64_gumbel = None

    with pytest.raises(ConfigError, match=r"sampler has no apply_logits_processors.*docs/vllm.md"):
        requirements._require("the sampler", Sampler(), requirements.SAMPLER)
