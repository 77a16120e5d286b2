"""Arguments: what is let through, what is refused, and what the three parts say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_accel import arguments as a

REFUSED: list[tuple[str, Any, type[Exception], Any]] = [
    ("one_of", lambda v: a.one_of("x", v, ("b", "c")), ValueError, "d"),
    ("one_of", lambda v: a.one_of("x", v, ("b", "c")), TypeError, 3),
    ("one_of", lambda v: a.one_of("x", v, ("b",)), TypeError, None),
    ("flag", lambda v: a.flag("x", v), TypeError, 1),
    ("flag", lambda v: a.flag("x", v), TypeError, None),
    ("flag", lambda v: a.flag("x", v, none=True), TypeError, "yes"),
    ("flags", lambda v: a.flags(y=True, x=v), TypeError, 0),
    ("whole", lambda v: a.whole("x", v), TypeError, True),
    ("whole", lambda v: a.whole("x", v), TypeError, 2.0),
    ("whole", lambda v: a.whole("x", v), TypeError, None),
    ("whole", lambda v: a.whole("x", v), ValueError, 0),
    ("whole", lambda v: a.whole("x", v, least=0, most=3), ValueError, 4),
    ("number", lambda v: a.number("x", v), TypeError, "1"),
    ("number", lambda v: a.number("x", v), TypeError, True),
    ("number", lambda v: a.number("x", v), ValueError, math.nan),
    ("number", lambda v: a.number("x", v, least=1), ValueError, 0.5),
    ("number", lambda v: a.number("x", v, most=1), ValueError, 1.5),
    ("number", lambda v: a.number("x", v, above=1), ValueError, 1),
    ("number", lambda v: a.number("x", v, below=1), ValueError, 1),
    ("number", lambda v: a.number("x", v, below=1), ValueError, math.inf),
    ("finite", lambda v: a.finite("x", v), ValueError, math.inf),
    ("finite", lambda v: a.finite("x", v), ValueError, -math.inf),
    ("positive", lambda v: a.positive("x", v), ValueError, 0),
    ("positive", lambda v: a.positive("x", v), ValueError, math.nan),
    ("share", lambda v: a.share("x", v), ValueError, 1.01),
    ("share", lambda v: a.share("x", v), ValueError, -0.01),
    ("open_share", lambda v: a.open_share("x", v), ValueError, 1.0),
    ("open_share", lambda v: a.open_share("x", v), ValueError, 0),
    ("text", lambda v: a.text("x", v), TypeError, 3),
    ("text", lambda v: a.text("x", v), ValueError, " "),
    ("path", lambda v: a.path("x", v), TypeError, 3),
    ("path", lambda v: a.path("x", v), TypeError, ""),
    ("path", lambda v: a.path("x", v), ValueError, "https://a.b/c?key=1"),
    ("instance", lambda v: a.instance("x", v, int, "a count", "pass 1"), TypeError, "1"),
]


@pytest.mark.parametrize(("name", "check", "kind", "value"), REFUSED)
def test_what_is_refused_is_told_in_three_parts(
    name: str, check: Any, kind: type[Exception], value: Any
) -> None:
    with pytest.raises(kind, match="`x`.* Found: .* Do: ") as error:
        check(value)
    assert "key=1" not in str(error.value)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (a.one_of("x", None, ("b",), none=True), None),
        (a.flag("x", None, none=True), None),
        (a.whole("x", -3, least=None), -3),
        (a.whole("x", 0, least=0), 0),
        (a.whole("x", None, none=True), None),
        (a.number("x", math.inf), math.inf),
        (a.number("x", 1, least=1, most=1), 1),
        (a.positive("x", math.inf), math.inf),
        (a.positive("x", np.float32(0.5)), np.float32(0.5)),
        (a.share("x", 0), 0),
        (a.share("x", 1.0), 1.0),
        (a.share("x", None, none=True), None),
        (a.text("x", None, none=True), None),
        (a.path("x", None, none=True), None),
        (a.path("x", "c:/a"), Path("c:/a")),
        (a.instance("x", None, int, "a count", "pass 1", none=True), None),
    ],
)
def test_what_is_allowed_comes_back(found: Any, wanted: Any) -> None:
    assert found == wanted and type(found) is type(wanted)


def test_an_example_is_itself_allowed() -> None:
    with pytest.raises(ValueError, match="such as 4"):
        a.whole("x", 0)
    with pytest.raises(ValueError, match=r"such as 0\.5"):
        a.share("x", 2)
    with pytest.raises(ValueError, match="such as 1"):
        a.positive("x", 0)
    with pytest.raises(ValueError, match="from 2 to 3.*such as 3"):
        a.whole("x", 0, least=2, most=3)
