"""The engines' books: KV budget, attention over buffers, representation log."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_serve.engine.attention import RaggedAttention, Span
from tandem_serve.engine.kv_cache import KvBudget, KvBuffer
from tandem_serve.engine.representation_log import RepresentationMemory
from tandem_serve.models.decoder import DecoderConfig
from tests.checkpoints import CONFIG
from tests.dense_cache import DenseCache


def test_a_budget_counts_whole_blocks() -> None:
    budget = KvBudget(100, 16)
    assert budget.capacity_tokens == 96
    assert [budget.round_up(n) for n in (0, 1, 16, 17)] == [0, 16, 16, 32]
    assert budget.try_reserve(64) and not budget.try_reserve(48) and budget.try_reserve(32)
    assert budget.usage == 1.0
    budget.release(64)
    assert budget.usage == pytest.approx(1 / 3)


def test_a_buffer_keeps_its_contents_when_it_grows() -> None:
    buffer = KvBuffer(CONFIG, 8, torch.float32, "cpu")
    k, v = (torch.randn(5, CONFIG.num_kv_heads, CONFIG.head_dim) for _ in range(2))
    buffer.write(2, [(k, v)] * CONFIG.num_layers, slice(1, 4))
    buffer.grow(64, 5)
    assert buffer.capacity == 64
    views = buffer.views(2, 5)
    assert len(views) == 2 * CONFIG.num_layers
    assert torch.equal(views[0], k[1:4].transpose(0, 1)) and torch.equal(views[5], v[1:4].transpose(0, 1))


@settings(max_examples=60)
@given(data=st.data())
def test_ragged_attention_equals_the_plainest_cache(data: st.DataObject) -> None:
    """Any mix of chunks and blocks, grouped heads or not, sliding layers beside full ones."""
    windows = data.draw(st.tuples(*[st.one_of(st.none(), st.integers(1, 9))] * 2), "windows")
    config = replace(
        CONFIG, num_layers=2, sliding_windows=windows, num_kv_heads=data.draw(st.sampled_from([1, 2, 4]), "kv heads")
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
    shapes = data.draw(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=3), "spans")
    spans, caches = [], []
    for start, num_tokens in shapes:
        buffer, cache = KvBuffer(config, 32, torch.float32, "cpu"), DenseCache(config, 32)
        layers = [_random_kv(config, start, generator) for _ in range(2)]
        buffer.write(0, layers, slice(0, start))
        cache.write(torch.arange(start), layers)
        spans.append(Span(buffer, start, num_tokens))
        caches.append(cache)
    attend = RaggedAttention(config, spans, torch.float32)
    total = sum(num_tokens for _, num_tokens in shapes)
    for layer in range(2):
        q = torch.randn(total, config.num_heads, config.head_dim, generator=generator)
        k, v = _random_kv(config, total, generator)
        found = attend(layer, q, k, v)
        row = 0
        for (start, num_tokens), cache in zip(shapes, caches, strict=True):
            rows = slice(row, row + num_tokens)
            expected = cache.attend(torch.arange(start, start + num_tokens))(layer, q[rows], k[rows], v[rows])
            torch.testing.assert_close(found[rows], expected)
            row += num_tokens


def _random_kv(config: DecoderConfig, num_tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (num_tokens, config.num_kv_heads, config.head_dim)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


# ------------------------------------------------------------------ representation log

TAPS = (1, 3)
POSITION_BYTES = len(TAPS) * 2 * 4


def _states(start: int, end: int) -> torch.Tensor:
    """[end - start, 2 taps, 2]: every number says whose it is."""
    positions = torch.arange(start, end, dtype=torch.float32)[:, None, None]
    return positions + torch.tensor([[[0.1, 0.2], [0.3, 0.4]]])


@given(
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    bounds=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_a_log_gives_back_any_range(cuts: list[int], bounds: tuple[int, int]) -> None:
    memory = RepresentationMemory(1 << 20)
    log = memory.new_log(TAPS)
    for size in cuts:
        memory.append(log, size, _states(log.end, log.end + size))
    start, end = sorted(min(bound, log.end) for bound in bounds)
    found = log.read(start, end, TAPS)
    if start == end:
        assert found is None
    else:
        assert found is not None and torch.equal(found, _states(start, end))
        assert torch.equal(log.read(start, end, (3,)), _states(start, end)[:, 1:])  # type: ignore[arg-type]
    assert memory.num_bytes == log.num_bytes == log.end * POSITION_BYTES


def test_over_the_limit_the_largest_log_gives_up_what_it_has_sent() -> None:
    memory = RepresentationMemory(10 * POSITION_BYTES)
    large, small = memory.new_log(TAPS), memory.new_log(TAPS)
    memory.append(large, 4, _states(0, 4))
    memory.append(large, 3, _states(4, 7))
    memory.mark_sent(large, 5)
    memory.append(small, 3, _states(0, 3))
    assert large.start == 0 and large.covers((3,))
    memory.append(small, 1, _states(3, 4))
    assert large.start == 4 and not large.covers((3,))  # the chunk of 4..6 has not gone out yet
    assert torch.equal(large.read(5, 7, TAPS), _states(5, 7))  # type: ignore[arg-type]
    assert small.start == 0
    assert memory.num_bytes == 7 * POSITION_BYTES
    memory.mark_sent(large, 7)  # of no further use: it cannot start over
    assert memory.num_bytes == small.num_bytes == 4 * POSITION_BYTES


def test_a_log_that_has_sent_nothing_is_dropped_whole() -> None:
    memory = RepresentationMemory(5 * POSITION_BYTES)
    log = memory.new_log(TAPS)
    memory.append(log, 4, _states(0, 4))
    memory.append(log, 2, _states(4, 6))
    assert (log.start, log.end, log.num_sent, memory.num_bytes) == (6, 6, 0, 0)


def test_a_log_without_taps_costs_nothing() -> None:
    memory = RepresentationMemory(0)
    log = memory.new_log(())
    memory.append(log, 100, None)
    assert (log.start, log.end, memory.num_bytes) == (0, 100, 0)
    assert log.covers(()) and log.read(0, 100, ()) is None


def test_released_logs_give_their_memory_back() -> None:
    memory = RepresentationMemory(1 << 20)
    log = memory.new_log(TAPS)
    memory.append(log, 4, _states(0, 4))
    memory.release(log)
    assert memory.num_bytes == 0
