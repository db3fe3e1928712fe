"""The records that cross a thread, a process or a pool. Frozen, plain, and all in this one place.

Vocabulary (docs/architecture.md draws it): a *position* is a token's index in its sequence, prompt included, from 0. A
*tap* j is the output of primary layer j at a position: tap 0 the embedding, tap L the last layer before the final norm.
A *round* is one request for a block of drafts; an *incarnation* is one life of a sequence at one drafter. Together they
fence off late and duplicate messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_BLOCK_LENGTH = 64  # drafts a round that anybody may ask for or send

# ------------------------------------------------------------------ requests


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one token is chosen from a row of logits (decoding/sampling.py). Temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0  # (0, 1]; 1 keeps all
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0  # [0, 1); 0 keeps all
    seed: int = 0  # 64 bits, signed; the text depends on prompt, seed and primary alone


class PolicyName(StrEnum):
    """Who decides how many drafts a round gets (decoding/block_policy.py). None of them changes a token."""

    FIXED = "fixed"  # block_length drafts
    ENTROPY = "entropy"  # until the drafter's own uncertainty says that its last draft may be wrong
    ROUTER = "router"  # until the router MLP says so (the paper's adaptive block length)
    OPTIMAL = "optimal"  # until one more draft costs more time than the tokens that it may bring save


class DecodingMode(StrEnum):
    """What the two models do for a sequence. The first two write the same text, which is the primary's."""

    PLAIN = "plain"  # the primary alone
    SPECULATIVE = "speculative"  # the drafter proposes, the primary has the last word
    # Standalone tandem (the paper's): drafts are text, unverified; every block_length of them the primary runs what was
    # written, for its representations alone. The text depends on the drafter, on block_length, and on drafts in time.
    TANDEM = "tandem"  # and writes the token that opens the next block
    TANDEM_REPRESENTATIONS = "tandem-representations"  # and writes nothing

    @property
    def is_standalone(self) -> bool:
        return self in (DecodingMode.TANDEM, DecodingMode.TANDEM_REPRESENTATIONS)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. Token level: text, stop strings and `n` are the front end's business."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()  # the model's own end-of-text ids included; any of them ends with STOP
    num_logprobs: int | None = None  # None: none; 0: of the chosen token alone; n: and of the n likeliest
    block_length: int | None = None  # drafts a round, at most; None: the engine's default; 0: the primary alone
    drafter_address: str | None = None  # the router's pairing; None: any drafter that the engine knows
    timeout_s: float | None = None  # from its arrival at the primary; then it is ended, wherever it is
    traceparent: str | None = None  # W3C trace context of the caller's span; None: not traced
    policy: PolicyName | None = None  # None: the engine's default
    threshold: float | None = None  # StoppingRule.threshold; None: the policy's own
    mode: DecodingMode = DecodingMode.SPECULATIVE


class FinishReason(StrEnum):
    """Why a sequence ended (OpenAI's words, plus ABORT)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one emitted token under the primary's unfiltered softmax at temperature 1."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token_id, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class GenerationStep:
    """What one engine step adds to one sequence: accepted drafts, then the primary's own token.

    token_ids[:num_accepted_tokens] were drafts; the rest (one token at most) is the primary's. The final step carries
    finish_reason; a token that ended the sequence is included.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_accepted_tokens: int = 0
    num_draft_tokens: int = 0  # drafts that this step verified
    logprobs: tuple[TokenLogprob, ...] = ()  # one a token where asked for, else empty
    finish_reason: FinishReason | None = None


# ------------------------------------------------------------------ text level


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One prompt to complete n times: what the HTTP endpoints and the public gRPC service have in common."""

    request_id: str
    model: str  # "" for the only one
    prompt: str | tuple[int, ...]
    max_tokens: int | None = 16  # None: as many as fit
    temperature: float = 1.0  # the fields down to seed: see SamplingParams
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None  # None: a random one; completion i of n draws from its own seed, derived from this one
    n: int = 1
    stop: tuple[str, ...] = ()  # the text ends before the first that occurs
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end-of-text ids
    ignore_eos: bool = False  # go on past the model's own end-of-text ids
    logprobs: int | None = None  # as GenerationRequest.num_logprobs
    block_length: int | None = None  # these as in GenerationRequest
    traceparent: str | None = None
    policy: PolicyName | None = None
    threshold: float | None = None
    mode: DecodingMode = DecodingMode.SPECULATIVE
    timeout_s: float | None = None  # from its arrival at the router to its last token; None: the operator's
    client: str = ""  # whose it is, where clients share what there is; "": of everybody who does not say


@dataclass(frozen=True, slots=True)
class TextUsage:
    """What one completion took."""

    prompt_tokens: int
    completion_tokens: int
    num_drafts: int = 0  # rounds that had drafts
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one engine step adds to one of a request's completions.

    text may lag behind token_ids (an incomplete character, the start of a stop string). The last delta of an index
    carries finish_reason and usage.
    """

    index: int  # 0 .. n - 1
    text: str
    token_ids: tuple[int, ...] = ()  # accepted drafts first
    num_accepted_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_chars: int = 0  # text[:num_accepted_chars] comes from accepted drafts
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: TextUsage | None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model that a TextService serves."""

    id: str
    max_model_len: int


# ------------------------------------------------------------------ who is who


@dataclass(frozen=True, slots=True)
class PrimaryInfo:
    """What a primary serves. Compared in the drafting handshake and listed by the router."""

    model: str
    fingerprint: str
    tokenizer_hash: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """What a drafter needs of a primary, and what it offers. A plain drafter has no taps and any primary."""

    model: str
    fingerprint: str
    primary_fingerprint: str  # "" for a plain drafter: it fits any primary with the same tokenizer
    tokenizer_hash: str
    vocab_size: int
    taps: tuple[int, ...]  # ascending primary layer numbers; () for a plain drafter
    primary_hidden_size: int  # 0 for a plain drafter
    max_block_length: int
    max_model_len: int


def mismatches(primary: PrimaryInfo, drafter: DrafterInfo) -> list[str]:
    """What keeps this drafter from drafting for this primary, naming both sides; empty where they fit together."""
    pairs = [
        ("tokenizer hash", primary.tokenizer_hash, drafter.tokenizer_hash),
        ("vocab_size", primary.vocab_size, drafter.vocab_size),
    ]
    if drafter.primary_fingerprint:
        pairs.append(("primary fingerprint", primary.fingerprint, drafter.primary_fingerprint))
    if drafter.taps:
        pairs.append(("hidden_size of the primary", primary.hidden_size, drafter.primary_hidden_size))
    found = [
        f"{what}: the primary has {ours!r}, the drafter needs {theirs!r}"
        for what, ours, theirs in pairs
        if ours != theirs
    ]
    if drafter.taps and max(drafter.taps) > primary.num_layers:
        found.append(f"taps: the primary has {primary.num_layers} layers, the drafter reads {list(drafter.taps)}")
    return found


@dataclass(frozen=True, slots=True)
class CostPoint:
    """What things of about the same size have taken, in the mean. Recent ones weigh more."""

    size: float
    seconds: float
    weight: float  # how many they were, as far as they still count


@dataclass(frozen=True, slots=True)
class DraftingCosts:
    """What a primary has measured of its rounds: what decides how long blocks should be (decoding/block_costs.py)."""

    verify: tuple[CostPoint, ...]  # an engine step, by the tokens that it verifies; ascending
    draft: tuple[CostPoint, ...]  # the wait for a block, by its drafts; ascending
    tried: tuple[float, ...]  # drafts by their place in the block, where those before were right
    right: tuple[float, ...]  # of those, how many were right
    lengths: BlockLengths | None = None  # what it goes by; None: its own configuration


@dataclass(frozen=True, slots=True)
class BlockLengths:
    """How many drafts a round gets where its request does not say: by_batch[b - 1] with b sequences running.

    More than there are entries for get the last one. 0: none. Of probe_every[b - 1] rounds (0: of none) some do what is
    not done otherwise, drafting or not drafting, to see whether that would be better by now. Without entries: each
    primary goes by its own configuration.
    """

    by_batch: tuple[int, ...]
    probe_every: tuple[int, ...]

    def at(self, num_requests_running: int) -> tuple[int, int]:
        """The length, and the rounds between two probes."""
        index = min(max(num_requests_running, 1), len(self.by_batch)) - 1
        return self.by_batch[index], self.probe_every[index]

    def __str__(self) -> str:
        """By sequences running, such as '1-3: 4, 4-128: 0'."""
        begins = [i for i, length in enumerate(self.by_batch) if i == 0 or length != self.by_batch[i - 1]]
        ends = [*begins[1:], len(self.by_batch)]
        return ", ".join(f"{i + 1}-{end}: {self.by_batch[i]}" for i, end in zip(begins, ends, strict=True))


@dataclass(frozen=True, slots=True)
class DrafterLoad:
    """What a primary asks of one drafter, and how long that takes."""

    address: str
    num_sequences: int  # of this primary's
    wait_s: float | None  # from asking for a block to having it, of late; None: it has not answered of late


@dataclass(frozen=True, slots=True)
class PrimaryStatus:
    """A primary's load, for pairing and for `tandem-serve status`."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float  # share of the KV budget reserved, 0..1
    drafters: tuple[tuple[str, str], ...] = ()  # (address, link state)
    loads: tuple[DrafterLoad, ...] = ()


# ------------------------------------------------------------------ primary -> drafter


@dataclass(frozen=True, slots=True)
class OpenSequence:
    """Starts a sequence, or starts it over under a higher incarnation."""

    sequence_id: str
    incarnation: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When a drafter ends a block before it has block_length drafts.

    Each draft gets a score, 0 to 1: an estimate that it is right (entropy, router), or that the block is right as far
    as it goes (optimal). Drafting goes on while the score is at least `threshold`; the draft that ends the block is
    kept if its score is at least keep_threshold.

    A step_cost is what a further step of the drafter costs this block, whichever blocks it drafts for: blocks that name
    one share their steps, which are made while what the scores exceed their thresholds by is as much as all of it, or
    while another block goes on in any case.
    """

    policy: PolicyName  # any but fixed
    threshold: float | None = None  # None: what the drafter holds best
    keep_threshold: float = 0.0
    step_cost: float = 0.0


@dataclass(frozen=True, slots=True)
class ExtendSequence:
    """Verified positions start_position .. start_position + n - 1, and the token that opens the next block.

    Positions arrive in order and without gaps. next_token_id is the token at position start_position + n, which the
    primary has chosen but not yet run; None while chunks of the prompt are still to come. n may be 0.
    """

    sequence_id: str
    incarnation: int
    round: int  # answered by the DraftBlock with the same round
    start_position: int
    token_ids: tuple[int, ...]  # [n]
    representations: Tensor | None  # [n, num_taps, hidden_size of the primary], CPU; None for a drafter without taps
    next_token_id: int | None
    block_length: int  # drafts wanted; 0: none
    traceparent: str | None = None  # of the primary's span of this round; None: not traced
    stopping: StoppingRule | None = None  # None: exactly block_length drafts
    # In standalone decoding, which goes on behind unverified drafts: how many of the drafter's own tokens lie between
    # the verified ones and next_token_id, which is the last of them. None: drafts are verified.
    num_unverified: int | None = None

    @property
    def is_of_fixed_length(self) -> bool:
        """Whether it asks for block_length drafts that are then verified: what a drafter can foresee."""
        return self.block_length > 0 and self.stopping is None and self.num_unverified is None


@dataclass(frozen=True, slots=True)
class CloseSequence:
    """Forgets a sequence. Unknown ones are ignored: the drafter may have dropped them itself."""

    sequence_id: str
    incarnation: int


DrafterCommand = OpenSequence | ExtendSequence | CloseSequence

# ------------------------------------------------------------------ drafter -> primary


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """The drafts of one round; possibly fewer than asked for."""

    sequence_id: str
    incarnation: int
    round: int
    draft_token_ids: tuple[int, ...]
    draft_time_s: float = 0.0  # how long the drafter worked on the batch that held this block


@dataclass(frozen=True, slots=True)
class SequenceRejected:
    """The drafter will not draft this sequence on (malformed, out of space, idle too long, unknown).

    Costs this one sequence its drafts; retryable ones may be opened again under a higher incarnation.
    """

    sequence_id: str
    incarnation: int
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class CreditGranted:
    """The drafter has taken in commands worth num_bytes (see credit_cost_bytes): that much more may be sent."""

    num_bytes: int


DraftEvent = DraftBlock | SequenceRejected | CreditGranted


def credit_cost_bytes(command: DrafterCommand) -> int:
    """What a command counts against the link's credit, the same at both ends whatever the wire's dtype. In bytes."""
    if not isinstance(command, ExtendSequence):
        return 64
    values = 0 if command.representations is None else command.representations.numel()
    return 64 + 4 * len(command.token_ids) + 2 * values
