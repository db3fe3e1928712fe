"""The router's say in how long blocks are: what primaries have measured goes in, what they are to do comes out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from tandem_serve.config import SpeculationConfig
from tandem_serve.decoding.block_costs import best_block_lengths
from tandem_serve.errors import TandemError
from tandem_serve.interfaces import Directable, Primary
from tandem_serve.types import BlockLengths, DraftingCosts

INTERVAL_S = 1.0
_TIMEOUT_S = 2.0
_MAX_BATCH = 128  # more sequences get what so many get

logger = logging.getLogger(__name__)


class BlockLengthControl:
    """Decides for all primaries together, from what all of them have measured. Each router does so for itself."""

    def __init__(self, primaries: Callable[[], Sequence[Primary]], config: Callable[[], SpeculationConfig]) -> None:
        """Both are asked anew each time."""
        self._primaries, self._config = primaries, config
        self.lengths: BlockLengths | None = None  # what was decided last

    async def run(self) -> None:
        """Until it is cancelled. An unexpected error costs one round."""
        while True:
            try:
                await self.decide()
            except Exception:
                logger.exception("block lengths stay as they are")
            await asyncio.sleep(INTERVAL_S)

    async def decide(self) -> None:
        """One round: hands out what was decided last, and decides anew by what it hears."""
        config = self._config()
        if not config.adapts:
            self.lengths = None
        heard = await asyncio.gather(
            *(self._direct(each) for each in self._primaries() if isinstance(each, Directable))
        )
        known = [costs for costs in heard if costs is not None]
        if config.adapts and known:
            lengths = best_block_lengths(known, config.longest_block_length, _MAX_BATCH, self.lengths)
            if lengths is not None and (self.lengths is None or self.lengths.by_batch != lengths.by_batch):
                logger.info("block lengths by sequences running: %s", lengths)
            self.lengths = lengths or self.lengths  # where those that know are silent: as before

    async def _direct(self, primary: Directable) -> DraftingCosts | None:
        """None where it does not answer, or decides by itself."""
        try:
            return await asyncio.wait_for(primary.direct(self.lengths), _TIMEOUT_S)
        except (TandemError, TimeoutError):
            return None
