"""Callbacks that a configuration asks for, beside a Trainer that the app has built without them.

A preset writes nodes below `callbacks`. An app that gives its Trainer other callbacks, or none, would
train as if nothing had been asked, and nobody would say so. Lightning asks every installed package for
callbacks when a Trainer is built (entry points `lightning.pytorch.callbacks_factory`), and so we get to
look at each Trainer: one that starts a fit without what its configuration asks for is refused. With
`accel.attach=true` it is given the callbacks instead; `accel.attach=false` says that another Trainer
gets them.

Which configuration a Trainer belongs to is read from the stack: `hydra.utils.instantiate(cfg.trainer)`,
`Trainer(**cfg.trainer)` in a function that holds `cfg`, or the task of `@hydra.main` around both; the
nearest counts, as a name in Python does. Nothing else knows: Lightning passes a factory no argument, resolved
values have lost their configuration, and the job's own (`HydraConfig`) is not that of a Trainer which the app
makes from another. A Trainer from a node of its own (`cfg.teacher.trainer`, beside `cfg.trainer`) is another
one, and trains without. One made by hand before the real one cannot be told from the only one there will be.
It is refused at its start, which costs a word; an error at the end of the app would cost the training.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_accel.bridge.checks import refuse_mirror
from lightning_accel.devices.settle import settle, trainer_being_built
from lightning_accel.errors import AccelError
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.unread import attach_of

_OURS = "lightning_accel."
_OWN = "trainer"

_served: list[weakref.ref[Any]] = []  # configurations whose callbacks some Trainer has got


def factory() -> list[Callback]:
    """Return what Lightning adds to a Trainer that is being built: nothing, unless callbacks are asked for.

    What the Trainer computes on is looked at by the way: nobody else asks us while it can be changed.

    >>> factory()
    []
    """
    trainer = trainer_being_built()
    if trainer is not None:
        settle(trainer)
    nodes = _nodes_in_use() if "omegaconf" in sys.modules else []
    asking = [node for node in nodes if _asked(node._get_root())]
    if not asking:
        return []
    places = {_place_of_trainer(node) for node in asking}
    return [ConfiguredCallbacks(asking[0]._get_root(), _OWN if _OWN in places else min(places))]


class ConfiguredCallbacks(Callback):
    """See to it that a Trainer has the callbacks which its configuration asks for.

    Args:
        config: The whole configuration, with `callbacks` by name.
        place: The node that describes this Trainer; the callbacks are meant for that of `trainer`.

    Raises:
        ValueError: At the start of a fit, when `accel.attach` is neither true nor false.
        AccelError: At the start of a fit, when callbacks are missing and no Trainer has had them.
    """

    def __init__(self, config: Any, place: str = _OWN) -> None:
        self.config = config
        self.place = place

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_mirror(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        held = {base.__name__ for callback in callbacks for base in type(callback).__mro__}
        missing = {n: t for n, t in _asked(self.config).items() if t.rpartition(".")[2] not in held}
        attach = attach_of(self.config.get("accel"))
        if not missing:
            _served.append(weakref.ref(self.config))
            return
        if any(known() is self.config for known in _served):
            return
        if attach is False or self.place != _OWN:
            why = "as `accel.attach=false` says" if attach is False else f"made from `{self.place}`"
            rank_zero_info(
                f"A Trainer without {_listed(missing)}, {why}: a later one is to have them."
            )
            return
        if attach is None:
            raise _ignored(missing)
        place = callbacks.index(self) + 1  # Lightning walks along this very list
        callbacks[place:place] = _built(self.config, missing)
        _served.append(weakref.ref(self.config))
        rank_zero_info(f"Given to the Trainer, as asked by `accel.attach`: {', '.join(missing)}.")


def _nodes_in_use() -> list[Any]:
    """Return what the innermost function with a configuration holds of it; ours build complete Trainers."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(_OURS):
            return []
        names = frame.f_locals
        held = [*names.values(), *getattr(names.get("self"), "__dict__", {}).values()]
        found = [value for value in held if _is_of_an_app(value)]
        if found:
            return found
        frame = frame.f_back
    return []


def _is_of_an_app(value: Any) -> bool:
    from omegaconf import DictConfig

    root = value._get_root() if isinstance(value, DictConfig) else None
    if not isinstance(root, DictConfig) or root._is_none() or root._is_missing():
        return False
    return "callbacks" in root or _OWN in root


def _place_of_trainer(node: Any) -> str:
    """Return the key of the Trainer that is described nearest to a node: in it, beside it or further out."""
    own = _child(node._get_root(), _OWN) is not None
    while own and node._get_parent() is not None:
        key = node._get_full_key(None)
        if _target(node).endswith("Trainer"):
            return str(key)
        if _child(node, _OWN) is not None:
            return f"{key}.{_OWN}"
        node = node._get_parent()
    return _OWN


def _child(node: Any, key: str) -> Any:
    """Return what a configuration holds under a key, unresolved: resolving may fail, and is not ours to do."""
    from omegaconf import DictConfig

    plain = isinstance(node, DictConfig) and not (node._is_none() or node._is_interpolation())
    return node._get_node(key, validate_access=False) if plain else None


def _target(node: Any) -> str:
    found = _child(node, "_target_")
    return "" if found is None else str(found._value())


def _asked(config: Any) -> dict[str, str]:
    """Return the classes of ours that stand below `callbacks`, by name."""
    from omegaconf import DictConfig

    nodes = _child(config, "callbacks")
    if not isinstance(nodes, DictConfig) or nodes._is_none() or nodes._is_interpolation():
        return {}
    targets = {str(name): _target(node) for name, node in nodes.items_ex(resolve=False)}
    return {name: target for name, target in targets.items() if target.startswith(_OURS)}


def _built(config: Any, names: Mapping[str, str]) -> list[Callback]:
    from omegaconf import OmegaConf

    from lightning_accel.provenance import withheld
    from lightning_accel.recipe import build_callbacks
    from lightning_accel.redact import unsaid

    with preserve_rng():
        found = withheld(config)
    with unsaid(found.secrets):
        nodes = {n: OmegaConf.to_container(config.callbacks[n], resolve=True) for n in names}
        return build_callbacks(nodes)


def _listed(missing: Mapping[str, str]) -> str:
    classes = ", ".join(target.rpartition(".")[2] for target in missing.values())
    return f"`callbacks.{'`, `callbacks.'.join(missing)}` ({classes})"


def _ignored(missing: Mapping[str, str]) -> AccelError:
    return AccelError(
        "this app's Trainer was built without callbacks that its configuration asks for, "
        "so the training would not be what was asked",
        f"{_listed(missing)} in no Trainer",
        "say `+accel.attach=true`, and this Trainer gets them; or pass "
        "`callbacks=list(hydra.utils.instantiate(cfg.callbacks).values())` to it; or say "
        "`+accel.attach=false` when a later Trainer gets them, and `~callbacks.NAME` for one not wanted",
    )
