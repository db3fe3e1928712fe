"""A bug on the way to a drafter costs drafts, never a request."""

from __future__ import annotations

import pytest

from tandem_serve.decoding.requested_policy import RequestedPolicy
from tests.engines import Output, a_request, drive, generate, tiny_drafter
from tests.scripted_engine import REQUEST, started, whole_text
from tests.scripted_link import ScriptedLink, oracle, silence


def broken(*_: object) -> None:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("method", ["receive", "send", "credit_bytes", "close"])
@pytest.mark.parametrize("answers", [True, False])
def test_a_link_that_raises_costs_the_drafts_alone(method: str, answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    link = ScriptedLink(tiny_drafter()[1], oracle({"r": whole_text()}) if answers else silence)
    engine, output, clock = started(link)
    while "r" not in link.lives or not link.lives["r"].rounds:
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(link, method, broken)
        engine.set_drafters([])  # that closes the link once nobody drafts there
        drive(engine, clock)
    assert not output.errors
    assert REQUEST.prompt_token_ids + output.token_ids == whole_text()
    assert engine.num_failed_steps == 0


@pytest.mark.parametrize("method", ["plan", "observe_step", "observe_round"])
def test_a_policy_that_raises_costs_the_drafts_alone(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, output, clock = started(ScriptedLink(tiny_drafter()[1], oracle({"r": whole_text()})))
    monkeypatch.setattr(RequestedPolicy, method, broken)
    drive(engine, clock)
    assert REQUEST.prompt_token_ids + output.token_ids == whole_text()
    assert not output.errors and engine.num_failed_steps == 0


def test_sequences_that_come_after_the_error_draft_again() -> None:
    link = ScriptedLink(tiny_drafter()[1], oracle({"r": whole_text(), "next": whole_text()}))
    engine, output, clock = started(link)
    receive = link.receive

    def broken_once() -> list[object]:
        link.receive = receive  # type: ignore[method-assign]
        raise RuntimeError("a bug in a link")

    while len(output.steps) < 4:
        engine.step()
    num_drafts = output.num_draft_tokens
    link.receive = broken_once  # type: ignore[method-assign, assignment]
    drive(engine, clock)
    assert num_drafts == output.num_draft_tokens > 0
    assert link.closed == ["r"]
    assert generate(engine, [a_request("next", REQUEST.prompt_token_ids, 120)])["next"].num_accepted_tokens > 90


def test_an_error_while_sending_wakes_those_that_waited_for_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their block will never come: the step that failed counts as one that did something."""
    link = ScriptedLink(tiny_drafter()[1], silence)
    engine, output, clock = started(link)
    while "r" not in link.lives or not link.lives["r"].rounds:
        engine.step()
    assert not engine.step()
    engine.submit(a_request("second"), Output())
    monkeypatch.setattr(link, "send", broken)
    while engine.step():
        pass
    assert not engine.has_work and clock.now_s == 0.0
    assert REQUEST.prompt_token_ids + output.token_ids == whole_text()


def test_closing_the_engine_survives_a_broken_link(monkeypatch: pytest.MonkeyPatch) -> None:
    link = ScriptedLink(tiny_drafter()[1], silence)
    engine, output, _ = started(link)
    engine.step()
    monkeypatch.setattr(link, "credit_bytes", broken)
    engine.close()
    assert output.steps and output.finish_reason is not None and link.is_closed
