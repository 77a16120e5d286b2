"""What was drawn from the global generators is drawn again, whatever kind of number it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lightning_accel.surgery import chance
from lightning_accel.surgery.chance import Chance

DRAWS: dict[str, tuple[Callable[[], Any], str]] = {
    "a number": (random.random, "`random`"),
    "a normal number, and the second of its pair": (lambda: random.gauss(0, 1), "`random`"),
    "an order": (lambda: random.sample(range(9), 9), "`random`"),
    "a seed": (lambda: [random.seed(4), random.random()][1], "`random`"),
    "numpy's": (lambda: float(np.random.rand()), "`numpy.random`"),
    "a thousand of numpy's": (lambda: np.random.rand(1000).tolist(), "`numpy.random`"),
}


@pytest.fixture(params=["as words", "as Python gives it"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "as words":
        assert chance._PYTHON is not None  # or this machine would only try the slow way
    else:
        monkeypatch.setattr(chance, "_python", random.getstate)
        monkeypatch.setattr(chance, "_set_python", random.setstate)
    return str(request.param)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("before", [0, 1])  # of a pair of normal numbers
def test_what_was_drawn_is_drawn_again(way: str, draw: str, before: int) -> None:
    number, whose = DRAWS[draw]
    for _ in range(before):
        random.gauss(0, 1)
    state = random.getstate()
    noted = Chance([], whole=False)
    assert noted.drew() == "" and noted.now() is None
    first = [number() for _ in range(3)]
    assert noted.drew() == whose
    after = noted.now()
    assert after is not None
    later = number()
    noted.come_back()
    assert noted.drew() == "" and random.getstate() == state
    assert [number() for _ in range(3)] == first
    after.come_back()
    assert number() == later


def test_the_words_are_those_that_python_gives() -> None:
    random.seed(11)
    words = chance._python()
    drawn = [random.random() for _ in range(700)]  # beyond one turn of the twister
    state = random.getstate()
    chance._set_python(words)
    assert [random.random() for _ in range(700)] == drawn
    assert random.getstate() == state
