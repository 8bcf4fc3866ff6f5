"""How a case chooses: every value comes round equally often, and a failing case shrinks towards the first values."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")
WIDE = 1 << 16  # numbers beyond the values themselves stand for "the value whose turn it is"


class Choices:
    """The choices of one case, by name.

    A plain run takes the value whose turn it is: the values of a name are dealt like cards, a new shuffled deck after
    each, the case's number saying which card. Under Hypothesis (`draw`) a small number takes the value at that place
    instead, so that what shrinks ends at the first value, which is the simplest.

    Attributes:
        met: (name, value) of every choice that was made, in order.
        invalid: what about the case one side or both must refuse; nothing else is, or one refusal would hide another.
    """

    def __init__(self, number: int, draw: Callable[[st.SearchStrategy[int]], int] | None = None) -> None:
        self.number, self.met, self.invalid = number, list[tuple[str, str]](), ""
        self._draw, self._asked = draw, dict[str, int]()

    def pick(self, name: str, values: Sequence[T], often: int = 0, *, counted: bool = True) -> T:
        """One of `values`.

        Args:
            name: of the choice; asked again in the same case it is a choice of its own.
            values: the simplest first.
            often: how many more cards of the deck the first value has than each other.
            counted: whether the report counts it, as it does what has to be met 20 times in 2,000.
        """
        again = self._asked[name] = self._asked.get(name, -1) + 1
        index = self._turn(f"{name}/{again}", len(values), often)
        if self._draw is not None and (wanted := self._draw(st.integers(0, WIDE))) < len(values):
            index = wanted
        if counted:
            self.met.append((name, label(values[index])))
        return values[index]

    def flag(self, name: str, often: int = 0) -> bool:
        """False, or now and then true."""
        return self.pick(name, (False, True), often)

    def _turn(self, key: str, count: int, often: int) -> int:
        deck = [0] * often + list(range(count))
        round_number, card = divmod(self.number, len(deck))
        random.Random(f"{key} {round_number}").shuffle(deck)
        return deck[card]


def label(value: Any) -> str:
    """A value in a report: short and on one line."""
    text = value if isinstance(value, str) else repr(value)
    text = ascii(text)[1:-1]
    return text if len(text) <= 48 else f"{text[:40]}... ({len(text)})"
