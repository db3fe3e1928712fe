"""Stop strings on streamed text. (Stop token ids are the engine's business: it sees tokens, this sees text.)"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds stop strings in text that arrives in pieces, and never lets out a part of one.

    The stop string that is *complete* first ends the text (of several complete at the same character, the longest);
    the text ends before it. What comes out depends on the whole text only, not on how it was cut into pieces. Text that
    may be the start of a stop string is held back until it proves not to be, or until flush().
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""  # the longest suffix of the text so far that starts some stop string
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text; None while none has."""
        return self._matched

    def feed(self, text: str) -> str:
        """Takes the next piece and returns what may be shown now. After a match: always ""."""
        if self._matched is not None:
            return ""
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self._matched = min(found)
            self._held = ""
            return text[:start]
        visible = len(text) - self._num_held_back(text)
        self._held = text[visible:]
        return text[:visible]

    def flush(self) -> str:
        """The text has ended by itself: returns what was still held back."""
        held, self._held = self._held, ""
        return held

    def _num_held_back(self, text: str) -> int:
        """Length of the longest suffix of text that is a proper prefix of some stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
