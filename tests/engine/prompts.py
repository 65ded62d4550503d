"""The prompts of the parity tests: one text, cut at odd lengths around page, chunk and buffer edges."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHORT_LENGTHS = (1, 2, 3, 7, 11, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 100, 127, 129)
LENGTHS = (*SHORT_LENGTHS, 255, 256, 257, 511, 1500)

TEXT = """\
The night train left the valley a little after ten. Snow had closed the upper road since Monday, and so the
carriages were full: two nurses on their way home, a man with a cello between his knees, three children who
had been promised the window and were asleep before the first tunnel. Nobody spoke much. The guard came
through twice, once for tickets and once with tea.

To make bread you need four things: flour, water, salt and time. Mix 500 grams of flour with 350 grams of
water and leave the bowl alone for half an hour. Then add 10 grams of salt and a spoonful of starter, fold
the dough over itself every thirty minutes, and stop as soon as it holds its shape. Bake it hot, at 240
degrees, for 20 minutes with the lid on and 20 without.

def running_mean(values, width):
    total = 0.0
    for i, value in enumerate(values):
        total += value
        if i >= width:
            total -= values[i - width]
        yield total / min(i + 1, width)

Dear Ms. Okafor, thank you for your letter of 14 March. We have looked into the matter and found that the
parcel was delivered to number 17 instead of number 71; the sender has been told. If you would like us to
send a second copy, please write to the address below or call between 9 and 5 on weekdays.

Tides are long waves that the moon and the sun pull around the earth. In a wide ocean they are hardly a metre
high, but where the water runs into a narrow bay they pile up; at the head of one such bay the difference
between low and high water is sixteen metres. Fishermen there tie their boats with very long ropes.

Q: How many bones are there in an adult human body? A: 206. Q: What is the boiling point of water at sea
level, in kelvin? A: About 373. Q: Which planet has the shortest year? A: Mercury, 88 days. Q: Who wrote
the first program meant for a machine? A: That is still argued about, but Ada Lovelace is the usual answer.

Il pleut depuis trois jours, and the river has come up to the second step. Grandmother says it will stop at
the fourth, as it did in 1953; grandfather carries the wine upstairs all the same.
"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and how many tokens to add to them."""

    ids: tuple[int, ...]
    max_tokens: int


Pool = Mapping[int, Prompt]


def text_of(num_copies: int) -> str:
    """The paragraphs, in another order in each copy."""
    paragraphs = TEXT.split("\n\n")
    orders = [random.Random(i).sample(paragraphs, len(paragraphs)) for i in range(num_copies)]
    return "\n\n".join(p for order in orders for p in order)


def pool_of(ids: Sequence[int]) -> dict[int, Prompt]:
    """By length, a prompt of each of LENGTHS cut from `ids`, no two from the same place."""
    pool = {}
    for i, length in enumerate(LENGTHS):
        first = (37 * i + 11 * length) % (len(ids) - length)
        max_tokens = 12 + 5 * i % 9 if length <= 129 else 8
        pool[length] = Prompt(tuple(ids[first : first + length]), max_tokens)
    return pool
