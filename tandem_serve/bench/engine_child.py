"""One engine of `bench engines` in a process of its own: waves of prompts in, what they took out, as lines of JSON.

Read by bench/engines.py. A process each, because a vLLM engine takes a process for itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tandem_serve.types import GenerationRequest, GenerationStep, PrimaryInfo, SamplingParams

CONNECT_TIMEOUT_S = 120.0
Deliver = Callable[[int, GenerationStep, float], None]


class Contender(Protocol):
    """An engine that completes a wave of prompts at once, telling of each step: (prompt, step, time)."""

    def complete(
        self,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int,
        sampling: Sequence[SamplingParams],
        deliver: Deliver,
    ) -> None: ...


@dataclass
class Wave:
    """What came of one wave. Times in seconds from its start."""

    token_ids: list[list[int]]
    step_times: list[list[float]]  # of each prompt's steps
    step_tokens: list[list[int]]  # how many tokens each brought
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_drafts: int = 0
    idle_s: float = 0.0  # the primary's, waiting for drafts
    total_s: float = 0.0
    stalls: dict[str, float] = field(default_factory=dict)  # rounds without drafts, by cause


def run_wave(contender: Contender, command: dict[str, Any]) -> Wave:
    """One wave, seeded by prompt number where it samples."""
    prompts = [tuple(prompt) for prompt in command["prompts"]]
    sampling = [SamplingParams(temperature=command["temperature"], seed=seed) for seed in command["seeds"]]
    wave = Wave([[] for _ in prompts], [[] for _ in prompts], [[] for _ in prompts])
    started_s = time.perf_counter()

    def deliver(index: int, step: GenerationStep, now_s: float) -> None:
        wave.token_ids[index] += step.token_ids
        wave.step_times[index].append(now_s - started_s)
        wave.step_tokens[index].append(len(step.token_ids))
        wave.num_accepted_tokens += step.num_accepted_tokens
        wave.num_draft_tokens += step.num_draft_tokens
        wave.num_drafts += step.num_draft_tokens > 0

    counts: Callable[[], dict[str, float]] = getattr(contender, "counts", dict)
    before = counts()
    contender.complete(prompts, command["max_tokens"], sampling, deliver)
    wave.total_s = time.perf_counter() - started_s
    changes = {name: value - before.get(name, 0.0) for name, value in counts().items()}
    wave.idle_s = changes.pop("idle_s", 0.0)
    wave.stalls = {name: value for name, value in changes.items() if value}
    return wave


class OurEngine:
    """TorchPrimary or VllmPrimary, with a drafter elsewhere or without."""

    def __init__(self, engine: Any, drafter: str | None) -> None:
        self._engine = engine
        self._block_length = None if drafter else 0
        if drafter:
            engine.set_drafters([drafter])
            deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
            while dict(engine.status().drafters).get(drafter) != "ready":
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"the drafter at {drafter} is not ready: {engine.status()}")
                if not engine.step():
                    engine.wait(0.05)

    def counts(self) -> dict[str, float]:
        """Counters, to be compared before and after."""
        metrics = self._engine.metrics
        causes = {cause.value: child._value.get() for cause, child in metrics.without_draft.items()}
        return {"idle_s": metrics.draft_idle._value.get(), **causes}

    def complete(
        self,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int,
        sampling: Sequence[SamplingParams],
        deliver: Deliver,
    ) -> None:
        """See Contender."""
        for index, (prompt, how) in enumerate(zip(prompts, sampling, strict=True)):
            request = GenerationRequest(str(index), prompt, how, max_tokens, block_length=self._block_length)
            self._engine.submit(request, lambda step, index=index: deliver(index, step, time.perf_counter()))
        self._engine.run_until_idle()


class AssistedGeneration:
    """transformers' assisted generation: one prompt at a time, for it takes no batch."""

    def __init__(self, model: str, assistant: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        kind = getattr(torch, dtype)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=kind)  # in eval mode, as they all come
        self._assistant: Any = AutoModelForCausalLM.from_pretrained(assistant, dtype=kind)

    def complete(
        self,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int,
        sampling: Sequence[SamplingParams],
        deliver: Deliver,
    ) -> None:
        """See Contender. Greedy alone, for its sampling knows no seeds. Steps are what its streamer is given."""

        class Streamer:
            def __init__(self, index: int) -> None:
                self._index = index
                self._is_prompt = True

            def put(self, value: Any) -> None:
                if self._is_prompt:
                    self._is_prompt = False
                    return
                token_ids = tuple(value.reshape(-1).tolist())
                deliver(self._index, GenerationStep(str(self._index), token_ids), time.perf_counter())

            def end(self) -> None:
                pass

        for index, prompt in enumerate(prompts):
            inputs = self._torch.tensor([prompt])
            self._model.generate(
                inputs,
                attention_mask=self._torch.ones_like(inputs),
                assistant_model=self._assistant,
                do_sample=False,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                streamer=Streamer(index),
                pad_token_id=0,
            )


def build(mode: str, options: dict[str, Any]) -> Contender:
    """The contender of a mode. options: model, plain_drafter, info, dtype, taps, block_length, drafter (address)."""
    from tandem_serve.config import PrimaryEngineConfig, VllmEngineConfig
    from tandem_serve.rpc.drafting_client import GrpcLinkFactory

    model, dtype, drafter = options["model"], options["dtype"], options.get("drafter")
    info = PrimaryInfo(**options["info"])
    if mode == "transformers-assisted":
        return AssistedGeneration(model, options["plain_drafter"], dtype)
    if mode in ("torch", "torch-tandem"):
        from tandem_serve.engine.torch_primary import TorchPrimary
        from tandem_serve.models.checkpoint import DTYPES, load_decoder

        decoder = load_decoder(model, dtype=DTYPES[dtype]).pack()
        torch_config = PrimaryEngineConfig(
            dtype=dtype, block_length=options["block_length"], draft_timeout_s=options["draft_timeout_s"]
        )
        return OurEngine(TorchPrimary(decoder, info, torch_config, link_factory=GrpcLinkFactory()), drafter)
    if mode.startswith("vllm-tandem") or mode == "vllm-undrafted":
        from tandem_serve.engine.vllm_primary.build import build_vllm_primary

        vllm_config = VllmEngineConfig(
            dtype=dtype,
            kv_cache_tokens=32_768,
            enforce_eager=True,
            taps=tuple(options["taps"]),
            block_length=options["block_length"],
            draft_timeout_s=options["draft_timeout_s"],
            sampling="rejection" if mode == "vllm-tandem-rejection" else "shared_noise",
            synchronous=mode == "vllm-tandem-synchronous",
        )
        return OurEngine(build_vllm_primary(model, info, vllm_config, link_factory=GrpcLinkFactory()), drafter)
    from tandem_serve.engine.vllm_primary.peers import StockVllm

    speculative: dict[str, dict[str, Any] | None] = {
        "vllm": None,
        "vllm-ngram": {
            "method": "ngram",
            "num_speculative_tokens": options["block_length"],
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        },
        "vllm-draft-model": {
            "method": "draft_model",
            "model": options["plain_drafter"],
            "num_speculative_tokens": options["block_length"],
        },
    }
    return StockVllm(model, dtype=dtype, max_model_len=info.max_model_len, speculative=speculative[mode])


def main() -> None:
    """argv: mode, options as JSON. stdin: a wave a line; its own answers go to what was stdout, all else to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints
    mode, options = sys.argv[1], json.loads(sys.argv[2])
    if options["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, options["cores"])
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    contender = build(mode, options)
    print(json.dumps({"ready": mode, "model": Path(options["model"]).name}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(vars(run_wave(contender, json.loads(line)))), file=answers, flush=True)
    os._exit(0)  # engines leave threads behind that nobody waits for


if __name__ == "__main__":
    main()
