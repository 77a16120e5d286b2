"""Which values of a configuration came from the environment: `${oc.env:TOKEN}`, however it got where it is.

A configuration is resolved a second time with every variable of the environment replaced by one odd word. Where
that word turns up, in a chain of interpolations, in the middle of a text or in what a resolver of the user's own
returned, a variable was read. What a resolver refuses to make of the odd word was read as well.
"""

from __future__ import annotations

import copy
import os
import re
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from lightning_accel.redact import HIDDEN, below_secrets

_WORD = "lightningaccelwithheld"
_RESOLVER = re.compile(r"\$\{\s*(?!oc\.select:|oc\.dict\.|hydra:|now:)[\w.]+\s*:")


class Withheld(NamedTuple):
    """What must not be said of a configuration, and how it reads without what came from the environment."""

    secrets: set[str]
    shadow: Any

    def of(self, tree: Any) -> Any:
        """Return the configuration, as it was resolved elsewhere, with `***` for what came from the environment."""
        return _merged(tree, self.shadow, set())


def withheld(cfg: Any) -> Withheld:
    """Find out what came from the environment; resolvers of the user's own run twice, and may draw numbers.

    >>> found = withheld({"user": "${oc.env:HOME}/x", "password": "hunter2"})
    >>> found.of({"user": "/home/me/x", "lr": 0.1}), "hunter2" in found.secrets
    ({'user': '***/x', 'lr': 0.1}, True)
    """
    from omegaconf import OmegaConf

    cfg = cfg if OmegaConf.is_config(cfg) else OmegaConf.create(dict(cfg))
    real = _resolved(copy.deepcopy(cfg))
    said = below_secrets(real)
    if not any(
        _RESOLVER.search(text) for text in _texts(OmegaConf.to_container(cfg, resolve=False))
    ):
        return Withheld(said, real)
    other = copy.deepcopy(cfg)
    OmegaConf.clear_cache(other)
    with _masked():
        shadow = _resolved(other)
    _merged(real, shadow, said)
    return Withheld(said, shadow)


def _resolved(node: Any) -> Any:
    from omegaconf import DictConfig, ListConfig

    if not isinstance(node, (DictConfig, ListConfig)):
        return node
    if node._is_none() or node._is_missing():
        return None
    if isinstance(node, ListConfig):
        return [_item(node, index) for index in range(len(node))]
    return {key: _item(node, key) for key in node}


def _item(node: Any, key: Any) -> Any:
    try:
        return _resolved(node[key])
    except Exception:  # of any resolver; a missing value is told when the configuration is used
        return _WORD


def _merged(real: Any, shadow: Any, said: set[str]) -> Any:
    if isinstance(real, dict) and isinstance(shadow, dict):
        return {k: _merged(v, shadow.get(k, v), said) for k, v in real.items()}
    if isinstance(real, list) and isinstance(shadow, list) and len(real) == len(shadow):
        return [_merged(a, b, said) for a, b in zip(real, shadow, strict=True)]
    if isinstance(shadow, str) and _WORD in shadow and real != shadow:
        said.update(_texts(real))
        return shadow.replace(_WORD, HIDDEN)
    return real


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)
    elif tree is not None and not isinstance(tree, bool):
        yield str(tree)


class _Masked(MutableMapping[str, str]):
    """The environment as it is, but this thread reads one word everywhere."""

    def __init__(self, real: MutableMapping[str, str]) -> None:
        self.real, self.thread = real, threading.get_ident()

    def __getitem__(self, key: str) -> str:
        value = self.real[key]
        return _WORD if threading.get_ident() == self.thread else value

    def __setitem__(self, key: str, value: str) -> None:
        self.real[key] = value

    def __delitem__(self, key: str) -> None:
        del self.real[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.real)

    def __len__(self) -> int:
        return len(self.real)

    def copy(self) -> dict[str, str]:
        return dict(self)

    def __or__(self, other: Mapping[str, str]) -> dict[str, str]:
        return {**self, **other}


@contextmanager
def _masked() -> Iterator[None]:
    real = os.environ
    os.environ = _Masked(real)  # type: ignore[assignment]  # noqa: B003  and put back below
    try:
        yield
    finally:
        os.environ = real  # noqa: B003
