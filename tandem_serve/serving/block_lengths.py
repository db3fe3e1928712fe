"""The router's say in how long blocks are: what primaries have measured comes in, what they are to do goes out."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence

from tandem_serve.config import SpeculationConfig
from tandem_serve.decoding.block_costs import best_block_lengths
from tandem_serve.errors import TandemError
from tandem_serve.interfaces import Directable, Primary
from tandem_serve.types import BlockLengths, DraftingCosts

INTERVAL_S = 1.0
_TIMEOUT_S = 2.0
_MAX_BATCH = 128  # more sequences get what so many get
_NEWS = 1.5
_NONE = BlockLengths((), ())  # to each its own configuration

logger = logging.getLogger(__name__)


class BlockLengthControl:
    """Decides for all primaries together, from what all of them have measured.

    Remembers nothing: what holds at present the primaries say. So several routers, and new ones, go on from the same.
    """

    def __init__(self, primaries: Callable[[], Sequence[Primary]], config: Callable[[], SpeculationConfig]) -> None:
        """Both are asked anew each time."""
        self._primaries, self._config = primaries, config

    async def run(self) -> None:
        """Until it is cancelled. An unexpected error costs one round."""
        while True:
            try:
                await self.decide()
            except Exception:
                logger.exception("block lengths stay as they are")
            await asyncio.sleep(INTERVAL_S)

    async def decide(self) -> None:
        """One round: asks what rounds have cost, decides, and tells those that go by something else."""
        primaries = [each for each in self._primaries() if isinstance(each, Directable)]
        heard = await asyncio.gather(*(_direct(each, None) for each in primaries))
        known = [costs for costs in heard if costs is not None]
        present = _most_common([costs.lengths for costs in known if costs.lengths is not None])
        lengths = self._best(known, present)
        others = [
            primary
            for primary, costs in zip(primaries, heard, strict=True)
            if costs is not None and lengths is not None and _is_news(lengths, costs.lengths or _NONE)
        ]
        if lengths is None or not others:
            return
        await asyncio.gather(*(_direct(primary, lengths) for primary in others))
        if present is None or present.by_batch != lengths.by_batch:
            logger.info("block lengths by sequences running: %s", lengths)

    def _best(self, known: Sequence[DraftingCosts], present: BlockLengths | None) -> BlockLengths | None:
        """None: all as it is."""
        config = self._config()
        if not config.adapts:
            return _NONE
        lengths = best_block_lengths(known, config.longest_block_length, _MAX_BATCH, present)
        return lengths or present  # one that has just come does as the others


def _is_news(lengths: BlockLengths, present: BlockLengths) -> bool:
    """Other lengths, or probes at quite another distance, which moves a little with everything that is measured."""
    pairs = zip(lengths.probe_every, present.probe_every, strict=False)
    return lengths.by_batch != present.by_batch or any(max(a, b) > _NEWS * min(a, b) for a, b in pairs)


def _most_common(lengths: Sequence[BlockLengths]) -> BlockLengths | None:
    return next((most for most, _ in Counter(lengths).most_common(1)), None)


async def _direct(primary: Directable, lengths: BlockLengths | None) -> DraftingCosts | None:
    """None where it does not answer, or decides by itself."""
    try:
        return await asyncio.wait_for(primary.direct(lengths), _TIMEOUT_S)
    except (TandemError, TimeoutError):
        return None
