"""What Lightning asks each installed package for when a Trainer is built (entry points `lightning.pytorch.callbacks_factory`).

A Trainer gets something of ours in two cases: a configuration around it has callbacks of ours, or the variable
LIGHTNING_ACCEL names presets. In all others nothing is imported, so that whoever has this package and does not use it pays
nothing for it; but a Trainer that would train on another device, or in another precision, than it was asked to is put right
(`devices/settle.py`), for later nobody asks us.

Which configuration a Trainer belongs to is read from the stack: `hydra.utils.instantiate(cfg.trainer)`,
`Trainer(**cfg.trainer)` in a function that holds `cfg`, or the task of `@hydra.main` around both; the
nearest counts, as a name in Python does. Nothing else knows: Lightning passes a factory no argument, resolved
values have lost their configuration, and the job's own (`HydraConfig`) is not that of a Trainer which the app
makes from another. A Trainer from a node of its own (`cfg.teacher.trainer`, beside `cfg.trainer`) is another
one, and trains without. One made by hand before the real one cannot be told from the only one there will be.
It is refused at its start, which costs a word; an error at the end of the app would cost the training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback

VARIABLE = "LIGHTNING_ACCEL"
_OFF = (["0"], ["false"], ["off"], ["no"])
OWN = "trainer"
_OURS = "lightning_accel."


def factory() -> list[Callback]:
    """Return what Lightning adds to a Trainer that is being built: nothing, unless somebody asks for callbacks.

    >>> factory()
    []
    """
    trainer = _trainer_being_built()
    _refuse_others(trainer)
    if trainer is not None and _is_in_doubt(trainer):
        from lightning_accel.devices.settle import settle

        settle(trainer)
    words = os.environ.get(VARIABLE, "").split()
    words = [] if [word.lower() for word in words] in _OFF else words
    if not words and "omegaconf" not in sys.modules:
        return []
    found = _who_builds()
    if found is None:
        return []
    asking = [node for node in found if asked(node._get_root())]
    if not (words or asking):
        return []
    from lightning_accel.attach import ConfiguredCallbacks, requested

    callbacks: list[Callback] = [*requested(words)]
    if asking:
        places = {_place_of_trainer(node) for node in asking}
        place = OWN if OWN in places else min(places)
        callbacks.append(ConfiguredCallbacks(asking[0]._get_root(), place))
    return callbacks


def _trainer_being_built() -> Any:
    """Return the Trainer whose constructor asks for callbacks."""
    pytorch: Any = sys.modules.get("lightning.pytorch")
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and pytorch is not None:
        if frame.f_code.co_name == "on_trainer_init":
            found = getattr(frame.f_locals.get("self"), "trainer", None)
            return found if isinstance(found, pytorch.Trainer) else None
        frame = frame.f_back
    return None


def _refuse_others(trainer: Any) -> None:
    """Raise where a class of ours, or what describes one, stands among the callbacks: Lightning says much later that something is missing.

    Raises:
        TypeError: There is one.
    """
    given = getattr(trainer, "callbacks", None) or ()
    named = [name for name in map(_named, given) if name.startswith(_OURS)]
    if named:
        from lightning_accel.errors import explain

        names = [name.rpartition(".")[2] for name in named]
        what = "`callbacks` takes objects, no classes and no descriptions"
        do = f"write {names[0]}(...), with its arguments in the brackets"
        raise TypeError(explain(what, ", ".join(names), do))


def _named(given: Any) -> str:
    """Return the path of a class, or of the class that a mapping describes; "" of an object."""
    if isinstance(given, type):
        return f"{given.__module__}.{given.__qualname__}"
    if isinstance(given, Mapping):
        return str(given.get("class_path") or given.get("_target_") or "")
    return ""


def _is_in_doubt(trainer: Any) -> bool:
    """Whether its accelerator is not Lightning's, or its autocast may be for another device; a look, and no import."""
    import torch

    if not type(trainer.accelerator).__module__.startswith("lightning."):
        return True
    plugin, root = trainer.precision_plugin, getattr(trainer.strategy, "_root_device", None)
    if type(plugin).__name__ == "XLAPrecision":
        return bool(plugin.precision != "32-true")
    elsewhere = torch.accelerator.current_accelerator()
    unused = elsewhere is not None and elsewhere.type not in ("cuda", "mps")
    if unused or root is None or type(plugin).__name__ != "MixedPrecision":
        return unused
    return bool(plugin.device != root.type)


def _who_builds() -> list[Any] | None:
    """Return what the innermost function with a configuration holds of it, `None` for ours, which build complete Trainers."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(_OURS):
            return None
        names = frame.f_locals
        held = [*names.values(), *getattr(names.get("self"), "__dict__", {}).values()]
        found = [v for v in held if _is_of_an_app(v)] if "omegaconf" in sys.modules else []
        if found:
            return found
        frame = frame.f_back
    return []


def _is_of_an_app(value: Any) -> bool:
    from omegaconf import DictConfig

    root = value._get_root() if isinstance(value, DictConfig) else None
    if not isinstance(root, DictConfig) or root._is_none() or root._is_missing():
        return False
    return "callbacks" in root or OWN in root


def _place_of_trainer(node: Any) -> str:
    """Return the key of the Trainer that is described nearest to a node: in it, beside it or further out."""
    own = _child(node._get_root(), OWN) is not None
    while own and node._get_parent() is not None:
        key = node._get_full_key(None)
        if _target(node).endswith("Trainer"):
            return str(key)
        if _child(node, OWN) is not None:
            return f"{key}.{OWN}"
        node = node._get_parent()
    return OWN


def _child(node: Any, key: str) -> Any:
    """Return what a configuration holds under a key, unresolved: resolving may fail, and is not ours to do."""
    from omegaconf import DictConfig

    plain = isinstance(node, DictConfig) and not (node._is_none() or node._is_interpolation())
    return node._get_node(key, validate_access=False) if plain else None


def _target(node: Any) -> str:
    found = _child(node, "_target_")
    return "" if found is None else str(found._value())


def asked(config: Any) -> dict[str, str]:
    """Return the classes of ours that stand below `callbacks`, by name."""
    from omegaconf import DictConfig

    nodes = _child(config, "callbacks")
    if not isinstance(nodes, DictConfig) or nodes._is_none() or nodes._is_interpolation():
        return {}
    targets = {str(name): _target(node) for name, node in nodes.items_ex(resolve=False)}
    return {name: target for name, target in targets.items() if target.startswith(_OURS)}
