"""Plain against tandem decoding as a client of a running cluster sees them: over HTTP, one request at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import openai

from tandem_serve.bench.summary import PromptRun, ratio_spread, ratios, summarize
from tandem_serve.types import GenerationStep

# Drafts a round asked of the cluster; None is its own default.
_MODES: dict[str, int | None] = {"plain": 0, "tandem": None}


def measure_cluster(
    url: str, prompts: Sequence[tuple[int, ...]], max_tokens: int, done: Callable[[], None]
) -> dict[str, Any]:
    """Completes every prompt greedily with and without drafts, turn about."""
    modes = {name: (url, block_length) for name, block_length in _MODES.items()}
    return measure_turn_about(modes, prompts, max_tokens, done, reference="plain")


def measure_turn_about(
    modes: Mapping[str, tuple[str, int | None]],
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    done: Callable[[], None],
    *,
    reference: str,
    during: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Any]:
    """Completes every prompt greedily in every mode, turn about. Returns "modes" and the ratios as bench decode does.

    The first prompt is completed once in each mode before anything is timed. Modes change places from prompt to prompt,
    so that none profits from its place.

    Args:
        modes: by name, a router's URL and the block length to ask for; None is the cluster's own.
        reference: the mode whose text the others' is compared with.
        during: told a mode's name, what its completions run in.
    """
    runs: dict[str, list[PromptRun]] = {name: [] for name in modes}
    with ExitStack() as stack:
        clients = {
            url: stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
            for url, _ in modes.values()
        }
        for turn in range(-1, len(prompts)):
            for name in _places(list(modes), turn):
                url, block_length = modes[name]
                with during(name):
                    run = _complete(clients[url], prompts[max(turn, 0)], max_tokens, block_length)
                if turn >= 0:
                    runs[name].append(run)
                    done()
    return {
        "modes": {name: summarize(of_mode, runs[reference]) for name, of_mode in runs.items()},
        "ratios": ratios(runs),
        "ratio_spread": ratio_spread(runs),
        "tokens_per_s_by_prompt": {name: [run.tokens_per_s for run in of_mode] for name, of_mode in runs.items()},
        "num_prompts": len(prompts),
    }


def _places(names: list[str], turn: int) -> list[str]:
    """There and back from each name in turn: over 2 * len(names) turns each is in each place twice."""
    first = turn // 2 % len(names)
    return [*names[first:], *names[:first]][:: -1 if turn % 2 else 1]


def _complete(client: openai.OpenAI, prompt: tuple[int, ...], max_tokens: int, block_length: int | None) -> PromptRun:
    started = time.perf_counter()
    steps: list[GenerationStep] = []
    times: list[float] = []
    for chunk in client.completions.create(
        model="",
        prompt=list(prompt),
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "block_length": block_length},
    ):
        extra = chunk.choices[0].model_extra or {}
        times.append(time.perf_counter())
        steps.append(
            GenerationStep("demo", tuple(extra["token_ids"]), extra["num_accepted_tokens"], extra["num_draft_tokens"])
        )
    return PromptRun(
        steps=tuple(steps),
        first_token_s=times[0] - started,
        decode_s=times[-1] - times[0],
        draft_s=(),
        verify_s=(),
    )
