"""What a primary remembers of its hidden states, so that a sequence can be shown to another drafter from the start.

The log is the source of everything sent: what flow control holds back simply stays here. Host memory, bounded over all
sequences together.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RepresentationLog:
    """Taps of one sequence's verified positions start .. end - 1, in chunks as they were computed.

    `num_sent` positions have gone to the present drafter. start > 0 means that the beginning was dropped: the present
    drafter can be fed on, another one cannot take over. Without taps (plain drafters only) the log counts positions and
    holds no bytes.
    """

    __slots__ = ("_chunks", "_starts", "end", "num_bytes", "num_sent", "start", "taps")

    def __init__(self, taps: tuple[int, ...]) -> None:
        self.taps = taps
        self.start = 0
        self.end = 0
        self.num_sent = 0
        self.num_bytes = 0
        self._starts: list[int] = []
        self._chunks: list[Tensor] = []  # [n, num_taps, d_L], CPU

    @property
    def num_unsent(self) -> int:
        return self.end - self.num_sent

    def covers(self, taps: tuple[int, ...]) -> bool:
        """Whether a drafter with these taps can be started from this log."""
        return self.start == 0 and set(taps) <= set(self.taps)

    def append(self, num_positions: int, chunk: Tensor | None) -> None:
        """The next positions; chunk [num_positions, num_taps, d_L] in memory of its own, None without taps."""
        if chunk is not None:
            self._starts.append(self.end)
            self._chunks.append(chunk)
            self.num_bytes += chunk.nbytes
        self.end += num_positions

    def read(self, start: int, end: int, taps: tuple[int, ...]) -> Tensor | None:
        """Positions start .. end - 1 of these taps, [end - start, len(taps), d_L]; None without taps or positions."""
        if not taps or start == end:
            return None
        parts = []
        for index in range(len(self._chunks) - 1, -1, -1):  # what is asked for is nearly always the last chunk
            offset = self._starts[index]
            if offset < end:
                parts.append(self._chunks[index][max(start - offset, 0) : end - offset])
            if offset <= start:
                break
        found = parts[0] if len(parts) == 1 else torch.cat(parts[::-1])
        if taps != self.taps:
            found = found[:, [self.taps.index(tap) for tap in taps]]
        return found

    def drop_before(self, position: int) -> int:
        """Forgets whole chunks that end at or before position. Returns the bytes freed."""
        num_dropped = 0
        while (
            num_dropped < len(self._chunks) and self._starts[num_dropped] + len(self._chunks[num_dropped]) <= position
        ):
            num_dropped += 1
        if num_dropped == 0:
            return 0
        freed = sum(chunk.nbytes for chunk in self._chunks[:num_dropped])
        del self._starts[:num_dropped], self._chunks[:num_dropped]
        self.start = self._starts[0] if self._starts else self.end
        self.num_bytes -= freed
        return freed


class RepresentationMemory:
    """The bound on all logs of an engine. When it is reached the largest log gives up what it has already sent.

    That costs its sequence the way back after a drafter's death, not its present drafts. A log that has nothing sent to
    give up is dropped whole, and its sequence goes on alone.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._logs: dict[RepresentationLog, None] = {}

    def new_log(self, taps: tuple[int, ...]) -> RepresentationLog:
        log = RepresentationLog(taps)
        self._logs[log] = None
        return log

    def append(self, log: RepresentationLog, num_positions: int, chunk: Tensor | None) -> None:
        """Adds to a log, evicting where that takes more than the limit."""
        log.append(num_positions, chunk)
        if chunk is not None:
            self.num_bytes += chunk.nbytes
            while self.num_bytes > self.limit_bytes:
                largest = max(self._logs, key=lambda each: each.num_bytes)
                freed = largest.drop_before(largest.num_sent)
                self.num_bytes -= freed or largest.drop_before(largest.end)

    def mark_sent(self, log: RepresentationLog, num_sent: int) -> None:
        """Positions below num_sent are the drafter's now. A log that cannot start over keeps none of them."""
        log.num_sent = num_sent
        if log.start > 0:
            self.num_bytes -= log.drop_before(num_sent)

    def release(self, log: RepresentationLog) -> None:
        """Forgets a finished sequence's log."""
        del self._logs[log]
        self.num_bytes -= log.num_bytes
