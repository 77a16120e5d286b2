"""Which modules: the only way to say it, in Python, yaml and on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_accel.errors import NoEffect, explain


@dataclass(frozen=True)
class Select:
    """Choose modules by fully qualified name and by class.

    Args:
        include: Glob patterns over names such as `"encoder.*"`; a name alone also takes in all that
            lies below it. `"*"` is everything.
        exclude: Patterns in the same form, taken out again.
        types: Classes, or their names (`"Linear"`, `"Conv*"`); empty means any class.

    Raises:
        TypeError: A pattern is not a string, or a type is neither class nor string.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> list(Select(types=("Linear",), exclude=("2",)).modules(net))
    ['0']
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    types: tuple[type[nn.Module] | str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("include", "exclude", "types"):
            object.__setattr__(self, field, _as_tuple(field, getattr(self, field)))

    @classmethod
    def of(cls, choice: Select | str | Iterable[str] | dict[str, Any] | None) -> Select:
        """Read a choice as yaml, the command line or Python would write it; `None` is everything.

        >>> Select.of("encoder.*") == Select.of(["encoder.*"]) == Select(include=("encoder.*",))
        True
        """
        if choice is None:
            return cls()
        if isinstance(choice, Select):
            return choice
        if isinstance(choice, dict):
            unknown = set(choice) - {"include", "exclude", "types"}
            if unknown:
                raise ValueError(
                    explain(
                        "a selection has the keys include, exclude and types",
                        ", ".join(sorted(map(str, unknown))),
                        "remove or rename them",
                    )
                )
            return cls(**choice)
        if not isinstance(choice, Iterable):
            raise TypeError(
                explain(
                    "a selection is a name pattern, several, or a `Select`",
                    repr(choice),
                    "pass 'encoder.*', say",
                )
            )
        return cls(include=choice)  # type: ignore[arg-type]

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the chosen modules of `model` by name, in the model's order; may be empty."""
        return {
            name: module for name, module in model.named_modules() if self.matches(name, module)
        }

    def require(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the chosen modules, and raise `NoEffect` when there are none."""
        found = self.modules(model)
        if not found:
            names = [name for name, _ in model.named_modules() if name]
            listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise NoEffect(
                f"{self} matches no module of {type(model).__name__}",
                f"the modules {listed}" if names else "a model without sub-modules",
                "choose names or types that exist; patterns are globs such as 'encoder.*'",
            )
        return found

    def matches(self, name: str, module: nn.Module) -> bool:
        """Tell whether the module with this name is chosen."""
        return (
            any(_covers(pattern, name) for pattern in self.include)
            and not any(_covers(pattern, name) for pattern in self.exclude)
            and (not self.types or any(_is_type(module, kind) for kind in self.types))
        )


def _as_tuple(field: str, value: Any) -> tuple[Any, ...]:
    is_one = isinstance(value, (str, type)) or not isinstance(value, Iterable)
    items = (value,) if is_one else tuple(value)
    for item in items:
        named = isinstance(item, str) and item != ""
        if not named and not (field == "types" and isinstance(item, type)):
            raise TypeError(
                explain(
                    f"`{field}` of a selection takes {'classes or class names' if field == 'types' else 'name patterns'}",
                    repr(item),
                    "pass strings such as 'encoder.*' or 'Linear'",
                )
            )
    return items


def _covers(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def _is_type(module: nn.Module, kind: type[nn.Module] | str) -> bool:
    if isinstance(kind, str):
        return any(fnmatchcase(base.__name__, kind) for base in type(module).__mro__[:-1])
    return isinstance(module, kind)
