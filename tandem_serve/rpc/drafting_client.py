"""How a primary reaches a drafter over gRPC: interfaces.DrafterLink on the Draft stream.

Three threads meet here: the engine's (send, receive), the link's own (connects, reads) and gRPC's (writes). Threads
and not asyncio, although a round trip is as fast in either: an event loop of ours beside another one of the process
that also speaks gRPC shares its completion queue, and both wake up for each event.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc

from tandem_serve.errors import InvalidRequest, ModelMismatch, Unavailable
from tandem_serve.interfaces import LinkState
from tandem_serve.rpc._gen.tandem.v1 import drafting_pb2
from tandem_serve.rpc.convert_drafting import MAX_COMMANDS, commands_request, parse_events
from tandem_serve.rpc.convert_handshake import DrafterTerms, parse_drafter_hello, primary_hello
from tandem_serve.rpc.listening import cancelled_after, channel_options
from tandem_serve.rpc.tls import DRAFTER, PeerTls, expect_server
from tandem_serve.types import (
    CreditGranted,
    DrafterCommand,
    DrafterInfo,
    DraftEvent,
    PrimaryInfo,
    credit_cost_bytes,
    mismatches,
)

DRAFT_METHOD = "/tandem.v1.DraftingService/Draft"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """When a link gives up on an attempt, and how long it then waits. Times in seconds."""

    handshake_timeout_s: float = 5.0
    min_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    stable_after_s: float = 1.0  # a connection that lasted so long starts the backoff over
    refused_retry_s: float = 30.0  # the right drafter may have been started at the address meanwhile


@dataclass(frozen=True, slots=True)
class GrpcLinkFactory:
    """interfaces.LinkFactory over gRPC."""

    options: LinkOptions = LinkOptions()
    tls: PeerTls | None = None

    def __call__(self, address: str, primary: PrimaryInfo, wake: Callable[[], None]) -> GrpcDrafterLink:
        return GrpcDrafterLink(address, primary, wake, self.options, self.tls)


@dataclass(slots=True)
class _Connection:
    """What belongs to one connection and ends with it."""

    terms: DrafterTerms
    outbox: SimpleQueue[bytes | None]  # None ends the stream
    credit_bytes: int


class GrpcDrafterLink:
    """One primary's link to one drafter; see interfaces.DrafterLink.

    A thread connects, shakes hands and reads, and starts over with jittered backoff whenever the stream ends, whatever
    the reason; where the models do not fit together (REFUSED), slowly. Messages are encoded by the caller of send().
    """

    def __init__(
        self,
        address: str,
        primary: PrimaryInfo,
        wake: Callable[[], None],
        options: LinkOptions | None = None,
        tls: PeerTls | None = None,
    ) -> None:
        self._address = address
        self._primary = primary
        self._wake = wake
        self._options = options or LinkOptions()
        self._tls = tls
        self._lock = threading.Lock()  # guards all below
        self._state = LinkState.CONNECTING
        self._epoch = 0
        self._info: DrafterInfo | None = None
        self._connection: _Connection | None = None  # while READY
        self._call: grpc.CallIterator[Any] | None = None  # the stream being opened or read
        self._events: list[DraftEvent] = []
        self._closed = threading.Event()
        threading.Thread(target=self._run, name=f"drafter-link {address}", daemon=True).start()

    # -------------------------------------------------------------- the engine's side

    @property
    def address(self) -> str:
        return self._address

    @property
    def state(self) -> LinkState:
        return self._state

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def info(self) -> DrafterInfo | None:
        return self._info

    def credit_bytes(self) -> int:
        connection = self._connection
        return connection.credit_bytes if connection else 0

    def send(self, commands: Sequence[DrafterCommand]) -> None:
        """Encodes and queues; see interfaces.DrafterLink.

        Commands beyond the credit or the drafter's longest message are dropped and logged: they would end the stream.
        """
        connection = self._connection
        if connection is None or not commands:
            return
        messages = _messages(commands, connection.terms)
        cost = sum(message.cost_bytes for message in messages)
        with self._lock:
            if cost > connection.credit_bytes:
                logger.error("%s: %d bytes of commands dropped, beyond the credit", self._address, cost)
                return
            connection.credit_bytes -= cost
        for message in messages:
            connection.outbox.put(message.data)

    def receive(self) -> list[DraftEvent]:
        with self._lock:
            events, self._events = self._events, []
        return events

    def close(self) -> None:
        with self._lock:
            self._state = LinkState.CLOSED
            self._connection = None
            self._events = []
            call = self._call
        self._closed.set()
        if call is not None:
            call.cancel()

    # -------------------------------------------------------------- the link's own thread

    def _run(self) -> None:
        failures = 0
        while not self._closed.is_set():
            epoch, began_s = self._epoch, time.monotonic()
            try:
                self._serve_one_connection()
                reason = "the drafter ended the stream"
            except ModelMismatch as error:
                self._refuse(str(error))
                failures = 0
                self._pause(self._options.refused_retry_s)
                continue
            except grpc.RpcError as error:
                reason = f"{error.code().name}: {error.details()}"
                if self._tls is not None and self._epoch == epoch:
                    reason += " (where it closes connections at once, its log says what is wrong with our certificate)"
            except InvalidRequest as error:
                reason = f"malformed answer: {error}"
            except Unavailable as error:
                reason = str(error)
            except Exception as error:  # a thread that died would leave the link in whatever state it was
                logger.exception("drafter %s: unexpected error on its link", self._address)
                reason = repr(error)
            was_stable = self._epoch != epoch and time.monotonic() - began_s >= self._options.stable_after_s
            failures = 1 if was_stable else failures + 1
            self._disconnected(reason, failures)
            self._pause(min(self._options.max_backoff_s, self._options.min_backoff_s * 2.0 ** min(failures - 1, 16)))

    def _pause(self, longest_s: float) -> None:
        self._closed.wait(longest_s * random.uniform(0.5, 1.0))

    def _serve_one_connection(self) -> None:
        outbox: SimpleQueue[bytes | None] = SimpleQueue()
        outbox.put(primary_hello(self._primary).SerializeToString())
        with self._open_channel() as channel:
            open_stream = channel.stream_stream(
                DRAFT_METHOD, request_serializer=None, response_deserializer=drafting_pb2.DraftResponse.FromString
            )
            call = open_stream(iter(outbox.get, None))
            try:
                with self._lock:
                    self._call = call
                    if self._state is LinkState.CLOSED:
                        return
                terms = parse_drafter_hello(_first_answer(call, self._options.handshake_timeout_s))
                if problems := mismatches(self._primary, terms.info):
                    raise ModelMismatch("; ".join(problems))
                self._connected(_Connection(terms, outbox, terms.credit_bytes))
                for response in call:
                    self._take(response, terms)
            finally:
                call.cancel()
                outbox.put(None)

    def _open_channel(self) -> grpc.Channel:
        """One for every attempt: gRPC's channels have a backoff too, and the two would add up."""
        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        if self._tls is None:
            return grpc.insecure_channel(self._address, options=options)
        options.append(expect_server(DRAFTER))
        return grpc.secure_channel(self._address, self._tls.channel_credentials(), options=options)

    def _connected(self, connection: _Connection) -> None:
        info = connection.terms.info
        with self._lock:
            if self._state is LinkState.CLOSED:
                return
            self._epoch += 1
            self._info = info
            self._events = []
            self._connection = connection
            self._state = LinkState.READY
        logger.info(
            "drafter %s ready: model %s, taps %s, representations in %s, %d MiB of credit",
            self._address,
            info.model,
            list(info.taps),
            connection.terms.representation_dtype,
            connection.credit_bytes >> 20,
        )
        self._wake()

    def _take(self, response: drafting_pb2.DraftResponse, terms: DrafterTerms) -> None:
        if response.WhichOneof("kind") != "events":
            raise InvalidRequest("a message that is neither hello nor events")
        events = parse_events(response.events, terms.info.vocab_size)
        with self._lock:
            if self._connection is None:  # closed meanwhile
                return
            for event in events:
                if isinstance(event, CreditGranted):  # never above the start: no drafter switches flow control off
                    credit = self._connection.credit_bytes + event.num_bytes
                    self._connection.credit_bytes = min(credit, terms.credit_bytes)
                else:
                    self._events.append(event)
        self._wake()

    def _disconnected(self, reason: str, failures: int) -> None:
        with self._lock:
            was_ready = self._connection is not None
            if self._state is LinkState.CLOSED:
                return
            self._state = LinkState.CONNECTING
            self._connection = None
        if was_ready or failures == 1:  # the tenth failed attempt says nothing new
            logger.warning("drafter %s not connected: %s", self._address, reason)
        if was_ready:
            self._wake()

    def _refuse(self, reason: str) -> None:
        with self._lock:
            if self._state is LinkState.CLOSED:
                return
            self._state = LinkState.REFUSED
            self._connection = None
        logger.error("drafter %s refused, it does not fit primary %s: %s", self._address, self._primary.model, reason)
        self._wake()


def _first_answer(call: grpc.CallIterator[drafting_pb2.DraftResponse], timeout_s: float) -> drafting_pb2.DraftResponse:
    """Raises ModelMismatch where the drafter says so.

    Raises Unavailable after timeout_s: what has accepted the connection may be stuck, or no drafter.
    """
    with cancelled_after(timeout_s, call.cancel) as expired:
        try:
            for answer in call:
                return answer
        except grpc.RpcError as error:
            if expired.is_set():
                raise Unavailable(f"no answer to the hello within {timeout_s:g} s") from None
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise ModelMismatch(error.details()) from None
            raise
    raise Unavailable("the stream ended before the drafter's hello")


class _Message(NamedTuple):
    """Commands as they travel, and what they cost of the credit."""

    data: bytes
    cost_bytes: int


def _messages(commands: Sequence[DrafterCommand], terms: DrafterTerms) -> list[_Message]:
    """The commands as one message, or as several where the drafter's limits want that."""
    if len(commands) <= MAX_COMMANDS:
        data = commands_request(commands, terms.representation_dtype).SerializeToString()
        if len(data) <= terms.max_message_bytes:
            return [_Message(data, sum(map(credit_cost_bytes, commands)))]
        if len(commands) == 1:
            logger.error("a command of %d bytes dropped, the drafter takes %d", len(data), terms.max_message_bytes)
            return []
    half = len(commands) // 2
    return [*_messages(commands[:half], terms), *_messages(commands[half:], terms)]
