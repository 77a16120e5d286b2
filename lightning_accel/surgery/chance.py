"""The global random states of Python and NumPy, noted and brought back in microseconds.

Both are Mersenne twisters of 625 words. Python's own `getstate` makes an integer of each, in 12 us; the words as they
lie in memory cost 1. Where they are not found at the usual place, the states are asked for in the usual way.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from lightning_accel.surgery.preserve import generator_state, set_generator_state

_BYTES = 2500


class Chance:
    """The random states that torch's `checkpoint` does not see to.

    Args:
        own: Generators to note as well.
        whole: Whether to note what NumPy's state has beside its words.

    >>> chance = Chance([], False)
    >>> first = random.random()
    >>> chance.drew()
    '`random`'
    >>> chance.come_back()
    >>> random.random() == first
    True
    """

    def __init__(self, own: list[Any], whole: bool) -> None:
        self._own, self._whole = own, whole
        self._states = [generator_state(generator) for generator in own]
        self._python = _python()
        self._words = _numpy_words()
        # All of numpy's state costs 50 us, its words 1. They show any draw but that of the second of a
        # pair of normal numbers, and once a block has drawn, all is taken.
        all_of_it = whole or self._words is None
        self._numpy = np.random.get_state(legacy=False) if all_of_it else None

    def drew(self) -> str:
        """Say from whose global state somebody drew since."""
        if self._python != _python():
            return "`random`"
        return "`numpy.random`" if self.numpy_moved() else ""

    def numpy_moved(self) -> bool:
        """Tell whether somebody drew from numpy's since."""
        if self._numpy is None:
            return self._words != _numpy_words()
        return not _is_state(self._numpy)

    def now(self) -> Chance | None:
        """Return what the states are, unless nobody drew, and so neither did the forward."""
        if not self.numpy_moved() and not self._own and self._python == _python():
            return None
        return Chance(self._own, self._whole)

    def come_back(self) -> None:
        """Let the states be what they were."""
        _set_python(self._python)
        if self.numpy_moved():
            self._set_numpy()
        for generator, state in zip(self._own, self._states, strict=True):
            set_generator_state(generator, state)

    def _set_numpy(self) -> None:
        if self._numpy is not None:
            np.random.set_state(self._numpy)
        elif (view := _numpy_view(np.random.mtrand._rand._bit_generator)) is not None:
            view.raw = self._words


def _is_state(state: dict[str, Any]) -> bool:
    now: Any = np.random.get_state(legacy=False)
    same = [now[k] == state[k] for k in ("bit_generator", "has_gauss", "gauss")]
    return all(same) and _plain(now["state"]) == _plain(state["state"])


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in state.items()}


def _numpy_words() -> bytes | None:
    words = _numpy_view(np.random.mtrand._rand._bit_generator)
    return words.raw if words is not None else None


@lru_cache(maxsize=1)
def _numpy_view(generator: Any) -> Any:
    """Return the state of NumPy's global generator as it lies in memory, if that is the usual one."""
    if type(generator) is not np.random.MT19937:
        return None
    return _State.from_address(generator.ctypes.state_address)


def _python_view() -> Any:
    """Return the words of Python's global generator, if they are where CPython keeps them."""
    twister: Any = getattr(random.getstate, "__self__", None)
    size = getattr(random.Random.__base__, "__basicsize__", 0)
    if type(twister) is not random.Random or size < object.__basicsize__ + _BYTES:
        return None
    view = _State.from_address(id(twister) + object.__basicsize__)
    index, *words = struct.unpack("i624I", view.raw)
    return view if twister.getstate()[1] == (*words, index) else None


_State = ctypes.c_char * _BYTES
_PYTHON = _python_view()


def _words() -> Any:
    """Return the words, and the second of a pair of normal numbers."""
    return _PYTHON.raw, random._inst.gauss_next  # type: ignore[attr-defined]


def _set_words(state: Any) -> None:
    _PYTHON.raw, random._inst.gauss_next = state  # type: ignore[attr-defined]


_python: Callable[[], Any] = random.getstate if _PYTHON is None else _words
_set_python: Callable[[Any], None] = random.setstate if _PYTHON is None else _set_words
