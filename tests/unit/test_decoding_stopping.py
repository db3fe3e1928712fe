"""Stop strings: for any cutting of the text into pieces, what a search of the whole text would give."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem_serve.decoding.stopping import StopStrings


def _naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grows the text one character at a time until some stop string ends it; the longest of several wins."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab", max_size=5), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=500)
def test_equals_a_naive_search_for_any_chunking(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = [matcher.feed(piece) for piece in pieces]
    expected, matched = _naive("".join(pieces), stops)
    for count in range(len(pieces) + 1):  # never ahead of what may be shown, whatever comes next
        assert expected.startswith("".join(shown[:count]))
    assert "".join(shown) + matcher.flush() == expected
    assert matcher.matched == matched


@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(max_examples=200)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = "".join(matcher.feed(character) for character in text)
    if matcher.matched is None:
        held = text[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_stop_string_across_pieces_and_silence_after_it() -> None:
    matcher = StopStrings(["\n\n", "END"])
    assert [matcher.feed(piece) for piece in ("x = 1\n", "y\nE", "N", "D more", "still")] == [
        "x = 1",
        "\ny\n",
        "",
        "",
        "",
    ]
    assert matcher.matched == "END"
    assert matcher.flush() == ""


def test_held_text_comes_out_at_the_end() -> None:
    matcher = StopStrings(["</s>"])
    assert matcher.feed("a </") == "a "
    assert matcher.flush() == "</"


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])
