"""The drafter's end of the Draft stream: a gRPC server in front of interfaces.Drafter."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import grpc

from tandem_serve.config import DrafterEngineConfig
from tandem_serve.errors import InvalidRequest, TandemError
from tandem_serve.interfaces import Drafter
from tandem_serve.rpc import fields
from tandem_serve.rpc._gen.tandem.v1 import drafting_pb2
from tandem_serve.rpc.convert_drafting import events_response, parse_commands
from tandem_serve.rpc.convert_handshake import DrafterTerms, drafter_hello, parse_primary_hello
from tandem_serve.rpc.listening import Health, bind, cancelled_after, server_options
from tandem_serve.rpc.statuses import status_of
from tandem_serve.rpc.tls import PRIMARY, PeerTls, require_client
from tandem_serve.types import CreditGranted, DraftEvent

SERVICE = drafting_pb2.DESCRIPTOR.services_by_name["DraftingService"].full_name
MAX_STREAMS = 256  # primaries at a time
MAX_UNREAD = 16_384  # events that a primary may leave unread before it is cut off
HELLO_TIMEOUT_S = 10.0  # a stream holds one of MAX_STREAMS places from its start

logger = logging.getLogger(__name__)


class DraftingServer:
    """Serves a drafter to any number of primaries, one stream each; health and reflection beside it.

    It checks, converts and keeps the books of credit. It does not draft: that is the Drafter's, which has its own
    thread. A stream costs two threads here.
    """

    def __init__(
        self,
        drafter: Drafter,
        config: DrafterEngineConfig,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        hello_timeout_s: float = HELLO_TIMEOUT_S,
        tls: PeerTls | None = None,
    ) -> None:
        """Binds the port (0: any free one), so that `address` is known; serves after start(). Raises OSError."""
        self._drafter = drafter
        self._terms = DrafterTerms(
            drafter.info, config.representation_dtype, config.credit_bytes, config.max_message_bytes
        )
        self._hello_timeout_s = hello_timeout_s
        self._has_tls = tls is not None
        self._lock = threading.Lock()
        self._streams: set[_Stream] = set()
        self._numbers = itertools.count()
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_STREAMS + 16, thread_name_prefix="drafting"),
            options=server_options(config.max_message_bytes),
            maximum_concurrent_rpcs=MAX_STREAMS,
        )
        handler = grpc.stream_stream_rpc_method_handler(
            self._draft, request_deserializer=None, response_serializer=drafting_pb2.DraftResponse.SerializeToString
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Draft": handler}),))
        self._health = Health(self._server, [SERVICE])
        self._port = bind(self._server, host, port, tls)
        self._host = host

    @property
    def port(self) -> int:
        return self._port

    @property
    def address(self) -> str:
        return f"{self._host}:{self._port}"

    def start(self) -> None:
        self._server.start()
        self._health.set_serving(True)

    def stop(self, grace_s: float = 1.0) -> None:
        """Ends every stream with UNAVAILABLE, so that primaries go on alone, and returns when all is closed."""
        self._health.set_serving(False)
        stopped = self._server.stop(grace_s)
        with self._lock:
            for stream in self._streams:
                stream.end(_End(grpc.StatusCode.UNAVAILABLE, "the drafter is shutting down"))
        stopped.wait()

    def _draft(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[drafting_pb2.DraftResponse]:
        try:
            if self._has_tls:
                require_client(context, PRIMARY)
            with cancelled_after(self._hello_timeout_s, context.cancel):
                first = next(requests)
            primary = parse_primary_hello(fields.parse(drafting_pb2.DraftRequest, first))
            self._drafter.check_primary(primary)
        except (StopIteration, grpc.RpcError):  # gone, or cancelled, without a word
            return
        except TandemError as error:
            status = status_of(error)
            logger.warning("primary %s turned away: %s", context.peer(), status.details)
            context.abort(status.code, status.details)
        stream = _Stream(self._drafter, self._terms, f"{context.peer()}#{next(self._numbers)}", context)
        with self._lock:
            self._streams.add(stream)
        try:
            logger.info("primary %s at %s connected", primary.model, stream.peer_id)
            yield drafter_hello(self._terms)
            yield from stream.serve(requests)
        finally:
            with self._lock:
                self._streams.discard(stream)


@dataclass(frozen=True, slots=True)
class _End:
    """The last thing in a stream's outbox. No code: the primary has gone, or closed its side."""

    code: grpc.StatusCode | None = None
    details: str = ""


class _Stream:
    """One primary's stream, after the hellos: commands are read on a thread of its own, answers leave on gRPC's."""

    def __init__(self, drafter: Drafter, terms: DrafterTerms, peer_id: str, context: grpc.ServicerContext) -> None:
        self.peer_id = peer_id
        self._drafter = drafter
        self._terms = terms
        self._context = context
        self._outbox: SimpleQueue[list[DraftEvent] | _End] = SimpleQueue()
        self._lock = threading.Lock()  # guards all below
        self._credit_bytes = terms.credit_bytes
        self._num_unread = 0  # events in the outbox

    def serve(self, requests: Iterator[bytes]) -> Iterator[drafting_pb2.DraftResponse]:
        self._drafter.connect(self.peer_id, self._deliver)
        # The one place that disconnects: gRPC calls it once, however the stream ends.
        if not self._context.add_callback(self._gone):
            self._gone()
            return
        threading.Thread(target=self._read, args=(requests,), name=f"drafting {self.peer_id}", daemon=True).start()
        end: _End | None = None
        while end is None:
            events, end = self._next_events()
            if events:
                yield events_response(events)
        if end.code is not None:
            logger.warning("stream of primary %s ended: %s", self.peer_id, end.details)
            self._context.abort(end.code, end.details)

    def end(self, end: _End) -> None:
        self._outbox.put(end)

    def _next_events(self) -> tuple[list[DraftEvent], _End | None]:
        """Waits for a delivery; takes along whatever else has piled up behind it."""
        item = self._outbox.get()
        events: list[DraftEvent] = []
        while not isinstance(item, _End):
            events.extend(item)
            with self._lock:
                self._num_unread -= len(item)
            try:
                item = self._outbox.get_nowait()
            except Empty:
                return events, None
        return events, item

    def _deliver(self, events: list[DraftEvent]) -> None:
        """Takes the drafter's events, on its thread."""
        granted = sum(event.num_bytes for event in events if isinstance(event, CreditGranted))
        with self._lock:
            self._credit_bytes += granted
            self._num_unread += len(events)
            is_unread = self._num_unread > MAX_UNREAD
        self._outbox.put(events)
        if is_unread:
            logger.error("primary %s does not read its drafts: cut off", self.peer_id)
            self._context.cancel()

    def _gone(self) -> None:
        self._drafter.disconnect(self.peer_id)
        self.end(_End())

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            for data in requests:
                self._take(data)
            self.end(_End())
        except _Overdrawn as error:
            self.end(_End(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)))
        except grpc.RpcError:  # cancelled, or the connection broke
            self.end(_End())
        except Exception as error:  # whatever it is, it ends this stream alone
            status = status_of(error)
            self.end(_End(status.code, status.details))

    def _take(self, data: bytes) -> None:
        message = fields.parse(drafting_pb2.DraftRequest, data)
        if message.WhichOneof("kind") != "commands":
            raise InvalidRequest("after the hello there are only commands", field="kind")
        parsed = parse_commands(message.commands, self._terms)
        with self._lock:
            self._credit_bytes -= parsed.cost_bytes
            if self._credit_bytes < 0:
                raise _Overdrawn(f"a message of {parsed.cost_bytes} bytes overdraws the credit")
        self._drafter.submit(self.peer_id, parsed.commands)
        if parsed.rejections:
            self._deliver([*parsed.rejections, CreditGranted(parsed.waste_bytes)])


class _Overdrawn(Exception):
    """The primary sent more than it had credit for."""
