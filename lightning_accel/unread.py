"""Keys of a configuration that nothing would read: told before anything is built, with the nearest right name.

A key that is misspelt does nothing, and nobody would say so. What lies in a group of ours (`accel`, `teacher`) or
among the arguments of a class is known entirely, so all else in it is refused. At the top an app has keys of its own,
and a name alone tells little (`train`, `mode`, `date`): a key is refused there when its name is nearly one that
`build` reads, it *holds* what stands under that one (nodes by name, a `_target_`, arguments of the Trainer), and no
interpolation reads it. To refuse costs a word at the start; a warning among many would cost the training.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import lightning_accel
from lightning_accel.allowed import typed_keys, walk
from lightning_accel.arguments import flag
from lightning_accel.errors import explain
from lightning_accel.targets import is_ours

_GROUPS = ("accel", "accelerator", "callbacks", "data", "experiment", "logger", "model", "trainer")
_READ = ("callbacks", "ckpt_path", "data", "logger", "model", "teacher", "trainer")
_TEACHER = ("ckpt_path", "data", "folder", "model", "seed", "temperature", "trainer")
_WORD = re.compile(r"[A-Za-z_]\w*")
_OPEN = re.compile(r"\$\{[^$]*")


def check_keys(tree: Mapping[str, Any], unresolved: Any = None) -> None:
    """Refuse keys of a configuration that were meant to be read and would not be.

    Args:
        tree: Plain containers, resolved.
        unresolved: The same with its interpolations: what they name is read.

    Raises:
        ValueError: A group was not found, or a key is misspelt.

    >>> check_keys({"lr": 0.1, "train": {"batch_size": 8}, "tags": ["dev"]})
    >>> check_keys({"loggers": {"csv": {"_target_": "x.Logger"}}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: nothing reads `loggers`, so what it says would do nothing. Found: csv. Do: say `logger`; or ...
    """
    read = set(_read(unresolved))
    _refuse_lost_groups(tree)
    _check_accel(tree.get("accel"), tree.get("callbacks"), read)
    for key, value in tree.items():
        meant = nearest(key, _READ)
        if key in (*_GROUPS, *_READ, *read) or meant is None or not _looks_like(value, meant):
            continue
        raise ValueError(
            explain(
                f"nothing reads `{key}`, so what it says would do nothing",
                ", ".join(map(str, value)) if isinstance(value, dict) else repr(value),
                f"say `{meant}`; or give it another name, where code of your own reads it",
            )
        )


def attach_of(marks: Any) -> bool | None:
    """Return what `accel.attach` says.

    Raises:
        ValueError: It is neither true nor false, or misspelt.

    >>> attach_of({"amp": True, "attach": False})
    False
    """
    for key in marks if isinstance(marks, Mapping) else ():
        if key != "attach" and nearest(key, ("attach",)):
            raise ValueError(
                explain(
                    f"`accel.{key}` is read by nothing", f"{key}: {marks[key]}", _instead(key, True)
                )
            )
    found = marks.get("attach") if isinstance(marks, Mapping) else None
    return flag("accel.attach", found, none=True)


def check_teacher(teacher: Mapping[str, Any], unresolved: Any) -> None:
    """Refuse keys of the group `teacher` that neither we read nor an interpolation does.

    Raises:
        ValueError: There is one.
    """
    known = (*_TEACHER, *_read(unresolved))
    for key in teacher:
        if key not in known:
            near = nearest(key, _TEACHER, 0.5)
            raise ValueError(
                explain(
                    f"nothing reads `teacher.{key}`",
                    f"{key}: {teacher[key]!r}" if isinstance(teacher[key], str) else key,
                    f"say `teacher.{near}`" if near else f"it holds {', '.join(_TEACHER)}",
                )
            )


def check_arguments(tree: Any) -> None:
    """Refuse arguments that a class of ours, of Lightning or of torch does not have; the classes are imported.

    Raises:
        ValueError: There is one.
    """
    from hydra.utils import get_object

    for where, node in walk(tree):
        target = node.get("_target_")
        if not (is_ours(target) or str(target).startswith(("lightning.", "torch."))):
            continue
        known = _arguments(get_object(str(target)))
        for key in node:
            if known is not None and key not in known and not re.fullmatch(r"_\w+_", str(key)):
                near = nearest(key, known, 0.6)
                name = str(target).rpartition(".")[2]
                raise ValueError(
                    explain(
                        f"`{where}.{key}` is no argument of {name}",
                        key,
                        f"say `{where}.{near}`" if near else f"it has {', '.join(known)}",
                    )
                )


def nearest(key: Any, known: Iterable[str], cutoff: float = 0.8) -> str | None:
    """Return the name that a key is, or nearly is.

    >>> nearest("Trainr", ("trainer", "model")), nearest("paths", ("trainer", "model"))
    ('trainer', None)
    """
    words = list(known)
    if key in words:
        return str(key)
    return next(iter(get_close_matches(str(key).lower(), words, 1, cutoff)), None)


def _refuse_lost_groups(tree: Mapping[str, Any]) -> None:
    """Refuse the plain value that Hydra leaves where a group is not on its search path."""
    techniques = _techniques()
    marks = tree.get("accel")
    below = {f"accel/{key}": v for key, v in marks.items()} if isinstance(marks, dict) else {}
    own = {f"accel/{name}" for name in techniques} & set(below)
    known = (*_GROUPS, *techniques, *own)
    for key, value in {**tree, **{key: below[key] for key in own}}.items():
        meant = nearest(key, known)
        words = value if isinstance(value, list) else [value]
        if meant is None or not all(isinstance(word, str) for word in words):
            continue
        if meant in techniques:
            if key == meant and not all(_is_variant(key, word) for word in words):
                continue  # a setting of the user's own, such as `precision: 16-mixed`
            meant = f"accel/{meant}"
        raise ValueError(
            explain(
                f"the config group `{key}` was not found, so `{key}={value}` would do nothing",
                f"the plain value {value!r} where a group sets a mapping",
                f"say `{meant}`"
                if meant != key
                else "install lightning-accel, or add `hydra.searchpath: [pkg://lightning_accel.conf]`",
            )
        )


def _check_accel(marks: Any, callbacks: Any, read: Collection[str]) -> None:
    """Refuse what nothing reads below `accel`, which holds `attach` and the marks of presets."""
    if not isinstance(marks, Mapping):
        return
    for key, value in marks.items():
        if key == "attach":
            flag("accel.attach", value, none=True)
        elif key not in read and (value is not True or nearest(key, ("attach",))):
            raise ValueError(
                explain(
                    f"`accel.{key}` is read by nothing", f"{key}: {value!r}", _instead(key, value)
                )
            )
    # A preset of the user's own may leave a mark that is nearly one of ours; on the command line nobody does.
    typed, presets = typed_keys(), set(_presets()) - {"none"}
    near = (m for m in marks if m in presets or (f"accel.{m}" in typed and nearest(m, presets)))
    meant = next(near, None)
    if meant is not None and not any(is_ours(node.get("_target_")) for _, node in walk(callbacks)):
        raise ValueError(
            explain(
                f"`accel.{meant}` is the mark that a preset leaves, and adds nothing by itself",
                "no callback of lightning_accel",
                f"say `+accel={nearest(meant, presets)}`",
            )
        )


def _looks_like(value: Any, meant: str) -> bool:
    """Tell whether a value is what stands under a key that we read, and not a setting of an app's own."""
    if meant == "ckpt_path":
        return isinstance(value, str)
    if not isinstance(value, dict) or not value:
        return False
    if meant in ("callbacks", "logger"):
        return all(isinstance(node, dict) and "_target_" in node for node in value.values())
    if meant == "teacher":
        return "model" in value or "ckpt_path" in value
    return "_target_" in value or (meant == "trainer" and set(value) <= set(_of_trainer()))


def _read(node: Any) -> Iterator[str]:
    """Yield each word of each interpolation: a key that one of them names is read."""
    if isinstance(node, Mapping):
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from _read(value)
    elif isinstance(node, str):
        for text in _OPEN.findall(node):
            yield from _WORD.findall(text)


def _arguments(thing: Any) -> list[str] | None:
    """Return the names that may be given; `None` when any may, or nobody knows."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):  # of a class written in C
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _of_trainer() -> list[str]:
    from lightning.pytorch import Trainer

    return _arguments(Trainer) or []


def _instead(key: str, value: Any) -> str:
    near = nearest(key, ("attach", *_presets(), *_techniques()), 0.6)
    if near == "attach":
        return "say `+accel.attach=true`"
    if near in _techniques():
        name = "NAME.ARGUMENT" if not isinstance(value, dict) else f"NAME.{next(iter(value), '')}"
        return f"say `accel/{near}=VARIANT`; arguments are said as `callbacks.{name}=`"
    return f"say `+accel={near}`, or leave it out" if near else "leave it out"


def _folder() -> Path:
    package = Path(lightning_accel.__path__[0])
    return (
        next(f for f in (package / "conf", package.parent / "conf", package) if f.is_dir())
        / "accel"
    )


def _presets() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _techniques() -> list[str]:
    return [m.name for m in iter_modules(lightning_accel.__path__) if m.ispkg]


def _is_variant(technique: str, name: str) -> bool:
    return (_folder() / technique / f"{name}.yaml").is_file()
