"""MS as the drafter engine uses it: write verified positions of many sequences at once, then draft many blocks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from tandem_serve.decoding.stopping_rules import UNTRAINED, Scorer
from tandem_serve.engine.draft_ahead import MAX_DRAFTS, OpenBlock
from tandem_serve.engine.draft_cache import DraftSequence
from tandem_serve.engine.draft_loop import DraftJob, draft_blocks
from tandem_serve.engine.draft_scores import AcceptanceScorer
from tandem_serve.engine.forward import Rows, forward
from tandem_serve.models.acceptance import AcceptanceModel
from tandem_serve.models.decoder import Decoder
from tandem_serve.models.tandem import TandemDrafter
from tandem_serve.types import ExtendSequence

MAX_BATCHED_TOKENS = 1024  # that a plain drafter runs in one pass; a tandem drafter does not run prompts
MERGED_TOKENS = 32  # verified tokens that a plain drafter runs in the same pass as a block's first token


class DraftModel:
    """A tandem drafter or a plain decoder. Holds no sequences; a step's sequences are handed in."""

    def __init__(self, model: TandemDrafter | Decoder, acceptance: AcceptanceModel | None) -> None:
        self._tandem = model if isinstance(model, TandemDrafter) else None
        self.decoder = model.decoder if isinstance(model, TandemDrafter) else model
        self._scorer: Scorer = UNTRAINED if acceptance is None else AcceptanceScorer(acceptance, self.decoder)

    def receive(self, sequence: DraftSequence, command: ExtendSequence) -> None:
        """Notes verified positions; `take_in` writes them."""
        chosen = command.token_ids if command.next_token_id is None else (*command.token_ids, command.next_token_id)
        sequence.odds.learn(command.start_position, chosen)
        if self._tandem is None:
            sequence.receive_tokens(command.token_ids)
        elif command.token_ids:
            sequence.num_received += len(command.token_ids)
            sequence.tail = []

    def take_in(
        self, arrived: Mapping[DraftSequence, list[ExtendSequence]], drafting: Collection[DraftSequence]
    ) -> list[DraftSequence]:
        """Writes what has been received. Returns sequences whose representations are not finite: nothing is written.

        `drafting` are those whose block is drafted next: a plain drafter leaves them a few tokens for its first pass.
        """
        if self._tandem is None:
            self._run_verified(arrived, drafting)
            return []
        entries = [
            (sequence, command.start_position, command.representations)
            for sequence, commands in arrived.items()
            for command in commands
            if command.representations is not None and command.token_ids
        ]
        if not entries:
            return []
        if bad := _sequences_not_finite(entries):
            entries = [entry for entry in entries if entry[0] not in bad]
        if entries:
            self._write_representations(self._tandem, entries)
        return bad

    def draft(self, rounds: Mapping[DraftSequence, ExtendSequence]) -> dict[DraftSequence, list[int]]:
        """Drafts each sequence's block behind its verified positions. Rounds that ask for none are left out."""
        jobs = {
            sequence: DraftJob(
                sequence.kv,
                sequence.num_cached + (command.num_unverified or 0),
                [*sequence.unrun, command.next_token_id],
                command.block_length,
                sequence.sampling,
                command.stopping,
                sequence.odds,
            )
            for sequence, command in rounds.items()
            if command.block_length and command.next_token_id is not None
        }
        if not jobs:
            return {}
        blocks = dict(zip(jobs, draft_blocks(self.decoder, list(jobs.values()), self._scorer), strict=True))
        for sequence, drafts in blocks.items():
            sequence.unrun = []
            kept = sequence.tail[: rounds[sequence].num_unverified or 0]
            sequence.tail = [*kept, jobs[sequence].token_ids[-1], *drafts[:-1]]
        return blocks

    def open_block(self, sequence: DraftSequence, opening_token_id: int, drafts: Seq[int]) -> OpenBlock | None:
        """A block that may be drafted ahead of. None: it is too long, near the last position, or MS is a plain
        drafter, which keeps what it has run of the text and has no places to spare for branches."""
        block = OpenBlock(sequence.kv, sequence.num_cached, (opening_token_id, *drafts), sequence.sampling)
        has_room = block.last_position < self.decoder.config.max_position_embeddings
        return block if self._tandem is not None and 0 < len(drafts) <= MAX_DRAFTS and has_room else None

    def _write_representations(self, tandem: TandemDrafter, entries: list[tuple[DraftSequence, int, Tensor]]) -> None:
        """Keys and values of verified positions from the primary's taps (paper Eq. 2), all sequences in one pass."""
        positions = [start + i for _, start, states in entries for i in range(len(states))]
        parts = [states for _, _, states in entries]
        states = parts[0] if len(parts) == 1 else torch.cat(parts)
        device, dtype = self.decoder.device, self.decoder.dtype
        layers = tandem.project(states.to(device, dtype), torch.tensor(positions, device=device))
        row = 0
        for sequence, start, part in entries:
            sequence.kv.write(start, layers, slice(row, row + len(part)))
            row += len(part)

    def _run_verified(
        self, arrived: Mapping[DraftSequence, list[ExtendSequence]], drafting: Collection[DraftSequence]
    ) -> None:
        """A plain drafter's prefill, in passes of at most MAX_BATCHED_TOKENS."""
        waiting = [s for s in arrived if len(s.unrun) > (MERGED_TOKENS if s in drafting else 0)]
        while waiting:
            rows, room = [], MAX_BATCHED_TOKENS
            for sequence in waiting:
                part = sequence.unrun[:room]
                if part:
                    rows.append((sequence, Rows(sequence.kv, sequence.num_cached, part, 0)))
                    room -= len(part)
            forward(self.decoder, [row for _, row in rows])
            for sequence, row in rows:
                del sequence.unrun[: len(row.token_ids)]
            waiting = [sequence for sequence in waiting if sequence.unrun]


def _sequences_not_finite(entries: list[tuple[DraftSequence, int, Tensor]]) -> list[DraftSequence]:
    """A sum is finite only if every summand is: one cheap look at each, and a thorough one where that fails."""
    return [
        sequence
        for sequence, _, states in entries
        if not math.isfinite(float(states.sum())) and not bool(torch.isfinite(states).all())
    ]
