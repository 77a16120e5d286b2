"""Settings that a checkpoint was made under, beside those that are given now.

Lightning gives a callback its state back, while the settings are those of the callback that the user has now. Where
the state holds what a setting decided (channels that are gone, masks, units that were picked), another value decides
nothing any more, and the fit would go on as if nobody had said it. So a state keeps its settings, as text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lightning_accel.errors import explain


def written(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as text that is the same in every process, for a checkpoint.

    >>> written({"ratio": 0.5, "when": (1, 4), "importance": abs})
    {'ratio': '0.5', 'when': '(1, 4)', 'importance': 'builtins.abs'}
    """
    return {name: _text(value) for name, value in settings.items()}


def changed(
    before: Mapping[str, str] | None, now: Mapping[str, str], *, but: Collection[str] = ()
) -> str:
    """Write which settings of a checkpoint are others now, `but` some; "" for none, and for a checkpoint that has none.

    >>> changed({"ratio": "0.5", "when": "(1,)"}, {"ratio": "0.75", "when": "(1,)"})
    'ratio=0.5 in the checkpoint, 0.75 now'
    """
    known = before or {}
    return "; ".join(
        f"{name}={known[name]} in the checkpoint, {value} now"
        for name, value in now.items()
        if known.get(name, value) != value and name not in but
    )


def in_vain(who: str, difference: str, happens: str) -> str:
    """Write that settings were changed which no longer decide anything."""
    return explain(
        f"{who} is asked for something else than in the fit that the checkpoint comes from",
        f"{difference}; {happens}",
        "give the former values, or begin a new fit from the weights of the checkpoint",
    )


def _text(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return f"{getattr(value, '__module__', '')}.{name}"
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
