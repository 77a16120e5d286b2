"""Which modules are sharded together: the blocks that a network repeats, where its own steps allow it.

A unit's weights are gathered at once, used, and let go. Large units need more memory at a time, many small ones more
messages; the blocks of a network, as its author cut it, are the size that others use as well (torchtitan, accelerate).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from lightning_accel.arguments import one_of
from lightning_accel.errors import explain
from lightning_accel.parallel.uses import Uses

_LARGE = 2**20
"""A layer with more numbers than that is gathered by itself, as embeddings and heads of language models are."""
_LISTS = (nn.ModuleList, nn.ModuleDict)


class Units(NamedTuple):
    """The modules that are gathered by themselves, and why others are not.

    All that is in no unit is gathered at the start of a step, and stays to its end.
    """

    names: tuple[str, ...]
    refused: dict[str, str]
    by_data: tuple[str, ...] = ()
    """Of those, modules in a list of which not every one may run in every step."""

    def told(self, count: int) -> list[str]:
        """Return lines for people: what is gathered by itself, and why the rest is not."""
        names = self.names
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        first = f"Sharded over {count} processes, gathered by {listed or 'all'}."
        refused = self.refused.items()
        return [first, *(f"`{name}` is gathered with the rest: {why}." for name, why in refused)]


def find_units(model: nn.Module, uses: Uses | None = None) -> Units:
    """Return the units of a network.

    Args:
        model: With whole weights.
        uses: What steps of all processes did with the weights; without it structure alone decides.

    >>> blocks = [nn.TransformerEncoderLayer(4, 2, 8) for _ in range(3)]
    >>> find_units(nn.Sequential(nn.Linear(4, 4), *blocks)).names
    ('1', '2', '3')
    """
    search = _Search(model, uses)
    names = tuple(search.inside("", model))
    return Units(names, search.refused, tuple(search.by_data))


def check_units(units: Any) -> str | tuple[str, ...]:
    """Return "auto", or names of modules.

    Raises:
        TypeError: It is neither a word nor names.
        ValueError: It is another word.

    >>> check_units("auto"), check_units(["blocks.0"])
    ('auto', ('blocks.0',))
    """
    if isinstance(units, str):
        return one_of("units", units, ("auto",))
    if not isinstance(units, (list, tuple)) or not all(isinstance(name, str) for name in units):
        do = "pass 'auto', ('blocks.0', 'blocks.1'), or () for everything at once"
        raise TypeError(explain("`units` are names of modules", repr(units), do))
    return tuple(units)


def given(model: nn.Module, names: Sequence[str]) -> Units:
    """Return the units that the user named.

    Raises:
        ValueError: A name is that of no module with weights, or of one within another.
    """
    known = {name for name, module in model.named_modules() if name and _weights(module)}
    wrong = [name for name in names if name not in known]
    wrong += [n for n in names if any(n.startswith(f"{other}.") for other in names)]
    if wrong or len(set(names)) < len(names):
        raise ValueError(
            explain(
                "`units` are modules with weights, each once and none within another",
                ", ".join(map(repr, wrong)) or repr(tuple(names)),
                f"pass some of {', '.join(sorted(known)[:6])}, ...",
            )
        )
    return Units(tuple(names), {})


class _Search:
    def __init__(self, model: nn.Module, uses: Uses | None) -> None:
        self.uses, self.refused, self.by_data = uses, dict[str, str](), list[str]()
        blocks = [m for m in model.modules() if m is not model and _is_block(m)]
        self.counts = Counter(map(_kind, blocks))
        self.tied = _tied(model)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.unsteady = [n for n in (uses.unsteady() if uses else ()) if n in trainable]

    def inside(self, name: str, module: nn.Module, *, doubted: bool = False) -> Iterator[str]:
        """Yield the units below a module; in one that was refused, not what stands in a list."""
        children = [
            (f"{name}.{n}" if name else n, m) for n, m in module.named_children() if _weights(m)
        ]
        if isinstance(module, _LISTS) and len(children) > 1 and not self._follow_up(children):
            why = "its neighbours in the list do not get what it computes: which of them run may hang on data"
            self.by_data += [n for n, _ in children]
            self.refused |= {n: why for n, m in children if self._is_candidate(m)}
            return
        if isinstance(module, _LISTS) and doubted:
            return
        for n, m in children:
            yield from self._of(n, m, doubted)

    def _of(self, name: str, module: nn.Module, doubted: bool) -> Iterator[str]:
        if not self._is_candidate(module):
            yield from self.inside(name, module, doubted=doubted)
            return
        inner = list(self.inside(name, module)) if _is_tower(module) else []
        if inner and self._share(module, name, inner) > 0.8:
            yield from inner
            return
        why = self._unsound(name, module)
        if not why:
            yield name
            return
        self.refused[name] = why
        yield from self.inside(name, module, doubted=True)

    def _is_candidate(self, module: nn.Module) -> bool:
        if isinstance(module, _LISTS):
            return False
        if _is_block(module):
            return self.counts[_kind(module)] > 1
        return _weights(module) >= _LARGE and not any(True for _ in module.children())

    def _unsound(self, name: str, module: nn.Module) -> str:
        if name in self.tied:
            return f"`{self.tied[name]}` is also a weight of another part"
        if self.uses is None:
            return ""
        if self.uses.differentiates:
            return "the step takes gradients itself, at which a unit would let go of its weights"
        if name in self.uses.outside:
            return f"`{self.uses.outside[name]}` is read outside of its forward"
        if not self.uses.calls.get(name) or not any(self.uses.calls[name]):
            return "no step called it"
        if not self.uses.is_steady(name):
            return "not every step of every process called it as often"
        written = next((n for n in sorted(self.uses.written) if n.startswith(f"{name}.")), None)
        if written:
            return f"`{written}` is written in the step, which a gathered copy would forget"
        idle = next((n for n in self.unsteady if n.startswith(f"{name}.")), None)
        return f"not every step of every process read `{idle}`" if idle else ""

    def _follow_up(self, children: list[tuple[str, nn.Module]]) -> bool:
        """Whether each module of a list gets what the one before computed, as blocks of a network do."""
        if self.uses is None:
            return True
        called = [n for n, _ in children if any(self.uses.calls.get(n, ()))]
        pairs = pairwise(called)
        # A list that only its entries' parts are called of says nothing about its entries.
        return not called or all(pair in self.uses.follows for pair in pairs)

    def _share(self, module: nn.Module, name: str, inner: list[str]) -> float:
        parts = [module.get_submodule(n.removeprefix(f"{name}.")) for n in inner]
        return sum(map(_weights, parts)) / _weights(module)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _is_block(module: nn.Module) -> bool:
    """Whether a module has layers of its own, and is called."""
    return not isinstance(module, _LISTS) and any(_weights(m) for m in module.children())


def _is_tower(module: nn.Module) -> bool:
    """Whether a repeated module is itself a row of blocks: an encoder beside a decoder of its class."""
    rows = [m for m in module.children() if isinstance(m, (*_LISTS, nn.Sequential))]
    return any(sum(map(_is_block, row.children())) > 1 for row in rows)


def _kind(module: nn.Module) -> object:
    """What counts as the same: the class; of `nn.Sequential`, that says little, also the shapes of the weights."""
    if type(module) is nn.Sequential:
        return type(module), tuple(tuple(p.shape) for p in module.parameters())
    return type(module)


def _tied(model: nn.Module) -> dict[str, str]:
    """Return by module a weight of it that has a name outside of it as well."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for several in names.values():
        if len(several) > 1:
            for name, _ in model.named_modules(remove_duplicate=False):
                within = [n for n in several if name and n.startswith(f"{name}.")]
                if within and len(within) < len(several):
                    found.setdefault(name, within[0])
    return found


def perhaps_unused(model: nn.Module, uses: Uses | None, units: Units) -> list[str]:
    """Return the weights of which some process may have no gradient in some step."""
    idle = set(uses.unsteady()) if uses else set()
    below = tuple(f"{name}." for name in units.by_data)
    return [
        name
        for name, p in model.named_parameters()
        if p.dim() and p.is_floating_point() and (name in idle or name.startswith(below))
    ]
