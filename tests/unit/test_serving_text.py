"""Tokens to text: the incremental detokenizer and CompletionText."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tandem_serve.serving.completion_text import CompletionText
from tandem_serve.serving.detokenizer import IncrementalDetokenizer
from tandem_serve.types import FinishReason, GenerationStep, TextDelta
from tests.checkpoints import END_OF_TEXT_ID, make_tokenizer

TOKENIZER = make_tokenizer()
UNICODE = st.text(st.characters(codec="utf-8", exclude_characters="�"), max_size=40)


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: words with ▁ for the space, bytes for what is no word."""
    words = ["<unk>", "▁", "▁Hello", "lo", "▁world", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


def deltas_of(
    token_ids: Sequence[int], cuts: Sequence[int], stop: Sequence[str] = (), prompt: Sequence[int] = (1,)
) -> list[TextDelta]:
    """The deltas of a sequence whose steps end at `cuts`."""
    text = CompletionText(0, prompt, TOKENIZER, stop)
    bounds = [0, *cuts, len(token_ids)]
    deltas = []
    for start, end in itertools.pairwise(bounds):
        last = FinishReason.LENGTH if end == len(token_ids) else None
        deltas.append(text.add(GenerationStep("r", tuple(token_ids[start:end]), max(end - start - 1, 0), 3, (), last)))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


@given(UNICODE)
def test_the_pieces_are_the_text(text: str) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    pieces = [detokenizer.push(token_id) for token_id in TOKENIZER.encode(text).ids]
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)


@given(st.lists(st.integers(0, 287), max_size=40), st.text("ab é€", max_size=5))
def test_any_ids_become_some_text_of_bounded_delay(token_ids: list[int], prompt: str) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, TOKENIZER.encode(prompt).ids)
    shown = "".join(detokenizer.push(token_id) for token_id in token_ids)
    whole = TOKENIZER.decode(token_ids, skip_special_tokens=True)
    assert len(shown) >= len(whole) - 16 * 8
    assert len(detokenizer._window) <= 2 * 16 + 8  # the work a token costs does not grow with the text


def test_a_character_cut_short_by_the_end_is_not_shown() -> None:
    token_ids = TOKENIZER.encode("a€").ids
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert "".join(detokenizer.push(token_id) for token_id in token_ids[:-1]) == "a"


def test_special_tokens_have_no_text() -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    a, b = TOKENIZER.encode("a").ids[0], TOKENIZER.encode("b").ids[0]
    assert [detokenizer.push(i) for i in (a, END_OF_TEXT_ID, b)] == ["a", "", "b"]


def test_the_first_word_keeps_its_space_after_a_prompt() -> None:
    tokenizer = byte_fallback_tokenizer()
    hello, world = tokenizer.token_to_id("▁Hello"), tokenizer.token_to_id("▁world")
    assert IncrementalDetokenizer(tokenizer, [hello]).push(world) == " world"
    assert IncrementalDetokenizer(tokenizer).push(world) == "world"


def test_bytes_that_fall_back_join_into_characters() -> None:
    tokenizer = byte_fallback_tokenizer()
    emoji = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "😀é".encode()]
    detokenizer = IncrementalDetokenizer(tokenizer, [tokenizer.token_to_id("▁Hello")])
    assert [detokenizer.push(token_id) for token_id in emoji] == ["", "", "", "😀", "", "é"]


@given(UNICODE, st.data())
@settings(max_examples=50)
def test_what_is_shown_does_not_depend_on_the_steps(text: str, data: st.DataObject) -> None:
    token_ids = TOKENIZER.encode(text).ids or [1]
    stops = data.draw(
        st.lists(st.sampled_from([text[i : i + n] for i in range(len(text)) for n in (1, 2, 3)] or ["x"]), max_size=2)
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(token_ids) - 1), max_size=5))) if len(token_ids) > 1 else []
    one_by_one = deltas_of(token_ids, range(1, len(token_ids)), stops)
    stepwise = deltas_of(token_ids, cuts, stops)
    for deltas in (one_by_one, stepwise):
        assert deltas[-1].finish_reason is not None
        assert deltas[-1].usage is not None
    assert "".join(d.text for d in stepwise) == "".join(d.text for d in one_by_one)
    assert sum((d.token_ids for d in stepwise), ()) == sum((d.token_ids for d in one_by_one), ())
    assert stepwise[-1].finish_reason is one_by_one[-1].finish_reason
    assert stepwise[-1].usage.completion_tokens == one_by_one[-1].usage.completion_tokens


def test_a_stop_string_across_steps_ends_the_text_before_it() -> None:
    deltas = deltas_of(TOKENIZER.encode("one END two").ids, [2, 5], ["END"])
    assert "".join(delta.text for delta in deltas) == "one "
    assert deltas[-1].finish_reason is FinishReason.STOP


def test_what_might_have_been_a_stop_string_is_shown_at_the_end() -> None:
    deltas = deltas_of(TOKENIZER.encode("one EN").ids, [4], ["END"])
    assert "".join(delta.text for delta in deltas) == "one EN"
    assert deltas[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("stop", "accepted_chars", "accepted_tokens"), [((), 3, 3), (("c",), 2, 3), (("b",), 1, 2)])
def test_text_is_told_apart_by_origin(stop: tuple[str, ...], accepted_chars: int, accepted_tokens: int) -> None:
    ids = [TOKENIZER.token_to_id(letter) for letter in "abcd"]
    text = CompletionText(0, (1,), TOKENIZER, stop)
    delta = text.add(GenerationStep("r", tuple(ids), 3, 4, (), FinishReason.LENGTH))
    assert (delta.num_accepted_chars, delta.num_accepted_tokens) == (accepted_chars, accepted_tokens)
    assert delta.text == "abcd" if not stop else delta.text == "abcd"[:accepted_chars]
    assert delta.usage.num_accepted_tokens == accepted_tokens
    assert delta.usage.num_drafts == 1
