"""A Primary made of many: sequences are paired (pairing.py), and another primary takes over when one dies.

Pure logic over interfaces.Primary; how replicas are reached and discovered is told from outside.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace

from tandem_serve.errors import Overloaded, RequestAborted, TandemError, Unavailable
from tandem_serve.interfaces import Primary
from tandem_serve.serving.pairing import Pairing, Pool
from tandem_serve.tracing import SpanSink, TraceContext, discard, spanning
from tandem_serve.types import FinishReason, GenerationRequest, GenerationStep, PrimaryInfo, PrimaryStatus

_RETRY_INTERVAL_S = 0.2  # between rounds over all primaries, while none can serve
_STATUS_TIMEOUT_S = 2.0
_MEASURES_INTERVAL_S = 2.0  # between looks at what primaries measure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrimaryOverview:
    """One primary as this router sees it. status is None where it did not answer."""

    name: str
    num_sequences: int
    status: PrimaryStatus | None


@dataclass(frozen=True, slots=True)
class DrafterOverview:
    """One drafter: how many of this router's sequences are paired with it, and which primaries are linked to it."""

    address: str
    num_sequences: int
    linked_primaries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClusterOverview:
    """Both pools, for `tandem-serve status` and the metrics."""

    primaries: tuple[PrimaryOverview, ...]
    drafters: tuple[DrafterOverview, ...]


class PairingRouter:
    """A Primary made of many: each sequence runs on one of them, paired with a drafter.

    A primary that fails in mid-sequence is replaced: another one is given the prompt and all tokens delivered so far,
    with the same seed, and goes on with the very token that was due (noise belongs to positions, not to replicas).
    """

    def __init__(
        self,
        *,
        start_timeout_s: float = 10.0,
        failover_timeout_s: float = 60.0,
        spans: SpanSink = discard,
        pairing: Pairing | None = None,
    ) -> None:
        """How long a sequence waits for a primary that can serve: before its first token, and once it has run."""
        self._start_timeout_s = start_timeout_s
        self._failover_timeout_s = failover_timeout_s
        self._spans = spans
        self._clients: dict[str, Primary] = {}
        self._pairing = pairing or Pairing()
        self._primaries, self._drafters = self._pairing.primaries, self._pairing.drafters
        self.num_failovers = 0  # sequences that another primary has taken over

    def pools(self) -> dict[str, Pool]:
        """By name, for the metrics."""
        return {"primary": self._primaries, "drafter": self._drafters}

    @property
    def num_primaries(self) -> int:
        """Those that may get sequences."""
        return len(self._primaries.members)

    def primaries(self) -> list[Primary]:
        """Those that may get sequences."""
        return list(self._clients.values())

    def set_primaries(self, clients: Mapping[str, Primary]) -> None:
        self._clients = dict(clients)
        self._primaries.set_members(clients)

    def set_drafters(self, addresses: Iterable[str]) -> None:
        self._drafters.set_members(addresses)

    def set_nodes(self, nodes: Mapping[str, str]) -> None:
        """Where primaries, by name, and drafters, by address, are."""
        self._pairing.set_nodes(nodes)

    async def watch(self) -> None:
        """Keeps an eye on what primaries measure of the drafters, until it is cancelled."""
        while True:
            try:
                await self.measure()
            except Exception:  # a look less
                logger.exception("what primaries measure is not known")
            await asyncio.sleep(_MEASURES_INTERVAL_S)

    async def measure(self) -> None:
        """One look. Takes at most a few seconds, whoever does not answer."""
        counted = self._pairing.counted()  # before they are asked: what comes meanwhile they may not know of yet
        primaries = (await self.overview()).primaries
        self._pairing.set_loads(
            {each.name: each.status.loads for each in primaries if each.status is not None}, counted
        )

    async def info(self) -> PrimaryInfo:
        """Any primary's, for they all serve the same model."""
        reason = "no primary is known"
        for client in list(self._clients.values()):
            try:
                return await client.info()
            except TandemError as error:
                reason = str(error)
        raise Unavailable(f"no primary can be reached: {reason}")

    async def status(self) -> PrimaryStatus:
        """The pool's sums, and the highest cache usage. Raises Unavailable where no primary answers."""
        known = [primary.status for primary in (await self.overview()).primaries if primary.status is not None]
        if not known:
            raise Unavailable("no primary answers")
        return PrimaryStatus(
            num_requests_running=sum(status.num_requests_running for status in known),
            num_requests_waiting=sum(status.num_requests_waiting for status in known),
            kv_cache_usage=max(status.kv_cache_usage for status in known),
            drafters=tuple(sorted({link for status in known for link in status.drafters})),
        )

    async def overview(self) -> ClusterOverview:
        """Every replica of both pools. Takes at most a few seconds, whoever does not answer."""
        names = self._primaries.members
        statuses = await asyncio.gather(*(_status_or_none(self._clients[name]) for name in names))
        links: dict[str, list[str]] = {address: [] for address in self._drafters.members}
        for name, status in zip(names, statuses, strict=True):
            for address, state in status.drafters if status else ():
                links.setdefault(address, []).extend([name] if state == "ready" else [])
        return ClusterOverview(
            primaries=tuple(
                PrimaryOverview(name, self._primaries.num_running(name), status)
                for name, status in zip(names, statuses, strict=True)
            ),
            drafters=tuple(
                DrafterOverview(address, self._drafters.num_running(address), tuple(linked))
                for address, linked in sorted(links.items())
            ),
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        """See interfaces.Primary."""
        delivered: list[int] = []
        failed: set[str] = set()
        attempt = 0
        started = asyncio.get_running_loop().time()
        deadline = started + self._start_timeout_s
        reason = "no primary is known"
        while True:
            name = await self._pick_primary(request.prompt_token_ids, failed, deadline, reason)
            drafter = request.drafter_address or self._pairing.pick_drafter(name)
            elapsed = asyncio.get_running_loop().time() - started
            part = replace(_resumed(request, delivered, attempt, elapsed), drafter_address=drafter)
            num_delivered = len(delivered)
            try:
                with (
                    self._primaries.carrying(name),
                    self._drafters.carrying(drafter),
                    self._traced(part, name, attempt) as part,
                ):
                    async with aclosing(self._steps(self._clients[name], part)) as steps:
                        async for step in steps:
                            delivered.extend(step.token_ids)
                            yield step
                return
            except Overloaded as error:
                failed.add(name)
                reason = str(error)
                if not delivered and self._primaries.pick(exclude=failed) is None:
                    raise  # one that has been running waits for room instead: its client has text already
            except (Unavailable, RequestAborted) as error:  # nobody but a primary that closes aborts what we run
                about = {"request_id": request.request_id}
                logger.warning("primary %s failed after %d tokens: %s", name, len(delivered), error, extra=about)
                self.num_failovers += 1
                failed.add(name)
                reason = str(error)
                if len(delivered) > num_delivered:  # it had been running: the clock starts anew
                    deadline = asyncio.get_running_loop().time() + self._failover_timeout_s
            attempt += 1

    @contextmanager
    def _traced(self, request: GenerationRequest, primary: str, attempt: int) -> Iterator[GenerationRequest]:
        """A span around one primary's share of a sequence, as whose child it gets the request."""
        parent = TraceContext.parse(request.traceparent)
        attributes: dict[str, str | int] = {
            "primary": primary,
            "drafter": request.drafter_address or "",
            "attempt": attempt,
        }
        with spanning(self._spans, "sequence", parent, attributes) as context:
            yield request if context is None else replace(request, traceparent=str(context))

    async def _steps(self, client: Primary, request: GenerationRequest) -> AsyncGenerator[GenerationStep, None]:
        """One primary's steps. A sequence that it gives up, or a stream that just ends, is a failed primary."""
        async with aclosing(client.generate(request)) as steps:
            async for step in steps:
                if step.finish_reason is FinishReason.ABORT:
                    raise Unavailable("the primary gave the sequence up")
                yield step
                if step.finish_reason is not None:
                    return
        raise Unavailable("the primary's stream ended early")

    async def _pick_primary(self, prompt: Sequence[int], failed: set[str], deadline: float, reason: str) -> str:
        """The next primary to try; once all have failed they are tried again, until the deadline."""
        while (name := self._pairing.pick_primary(prompt, exclude=failed)) is None:
            if asyncio.get_running_loop().time() >= deadline:
                raise Unavailable(f"no primary can serve: {reason}")
            await asyncio.sleep(_RETRY_INTERVAL_S)
            failed.clear()
        return name


def _resumed(request: GenerationRequest, delivered: list[int], attempt: int, elapsed_s: float) -> GenerationRequest:
    """What is left of a request: the tokens delivered so far become prompt."""
    if attempt == 0:
        return request
    if request.timeout_s is not None:
        request = replace(request, timeout_s=max(request.timeout_s - elapsed_s, 0.001))
    return replace(
        request,
        request_id=f"{request.request_id}.{attempt}",  # the failed primary may still know the old one
        prompt_token_ids=(*request.prompt_token_ids, *delivered),
        max_tokens=request.max_tokens - len(delivered),
    )


async def _status_or_none(client: Primary) -> PrimaryStatus | None:
    try:
        return await asyncio.wait_for(client.status(), _STATUS_TIMEOUT_S)
    except (TandemError, TimeoutError):
        return None
