"""Spans as the engines know them: plain records with explicit ids, and a place to hand them to.

A request that is not traced carries no trace context, and then none of this runs. Who decides that, and how spans leave
the process, is serving/tracing.py's business.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span's place: its trace and itself. Only traced requests have one, so the sampled flag is always set."""

    trace_id: int  # 128 bits
    span_id: int  # 64 bits; 0: a trace that has no span yet

    @staticmethod
    def is_valid(traceparent: str) -> bool:
        """Whether it is a trace context of version 00 at all, sampled or not."""
        found = _TRACEPARENT.fullmatch(traceparent)
        return found is not None and int(found[1], 16) != 0

    @classmethod
    def parse(cls, traceparent: str | None) -> TraceContext | None:
        """From the W3C's text form; None for none, for one that is not sampled, and for anything malformed."""
        found = _TRACEPARENT.fullmatch(traceparent or "")
        if found is None or int(found[1], 16) == 0 or not int(found[3], 16) & 1:
            return None
        return cls(int(found[1], 16), int(found[2], 16))

    @classmethod
    def new_trace(cls) -> TraceContext:
        return cls(secrets.randbits(128) or 1, 0)

    def child(self) -> TraceContext:
        """A new span of the same trace."""
        return TraceContext(self.trace_id, secrets.randbits(64) or 1)

    def __str__(self) -> str:
        """The W3C's text form, `traceparent`."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-01"


Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time. Times are time.monotonic()'s of the process that it happened in."""

    name: str
    context: TraceContext
    parent: TraceContext
    start_s: float
    end_s: float
    attributes: Attributes = field(default_factory=dict)
    error: str = ""


SpanSink = Callable[[Span], None]  # called from any thread; does not block


def discard(span: Span) -> None:
    """The SpanSink of a process that exports none."""


@contextmanager
def spanning(
    sink: SpanSink, name: str, parent: TraceContext | None, attributes: Attributes
) -> Iterator[TraceContext | None]:
    """A span around a block, whose context it yields; nothing without a parent. `attributes` are read at the end."""
    if parent is None:
        yield None
        return
    context, start_s, error = parent.child(), time.monotonic(), ""
    try:
        yield context
    except GeneratorExit:
        error = "closed by its reader"
        raise
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}"
        raise
    finally:
        sink(Span(name, context, parent, start_s, time.monotonic(), dict(attributes), error))
