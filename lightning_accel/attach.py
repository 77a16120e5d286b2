"""Callbacks that a configuration asks for, beside a Trainer that the app has built without them.

A preset writes nodes below `callbacks`. An app that gives its Trainer other callbacks, or none, would
train as if nothing had been asked, and nobody would say so. Lightning asks every installed package for
callbacks when a Trainer is built (entry points `lightning.pytorch.callbacks_factory`), and so we get to
look at each Trainer: one that starts a fit without what its configuration asks for is refused. With
`accel.attach=true` it is given the callbacks instead; `accel.attach=false` says that another Trainer
gets them.

Which configuration a Trainer belongs to is read from the stack: `hydra.utils.instantiate(cfg.trainer)`,
`Trainer(**cfg.trainer)` in a function that holds `cfg`, or the task of `@hydra.main` around both.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_accel.bridge.guards import refuse_mirror
from lightning_accel.errors import AccelError, explain
from lightning_accel.surgery.preserve import preserve_rng

_OURS = "lightning_accel."

_served: list[weakref.ref[Any]] = []  # configurations whose callbacks some Trainer has got


def factory() -> list[Callback]:
    """Return what Lightning adds to a Trainer that is being built: nothing, unless callbacks are asked for.

    >>> factory()
    []
    """
    config = _config_in_use()
    return [] if config is None or not _asked(config) else [Asked(config)]


class Asked(Callback):
    """See to it that a Trainer has the callbacks which its configuration asks for.

    Args:
        config: The whole configuration, with `callbacks` by name.

    Raises:
        ValueError: At the start of a fit, when `accel.attach` is neither true nor false.
        AccelError: At the start of a fit, when callbacks are missing and no Trainer has had them.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_mirror(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        held = {base.__name__ for callback in callbacks for base in type(callback).__mro__}
        missing = {n: t for n, t in _asked(self.config).items() if t.rpartition(".")[2] not in held}
        attach = _attach(self.config)
        if not missing:
            _served.append(weakref.ref(self.config))
            return
        if attach is False or any(known() is self.config for known in _served):
            return
        if attach is None:
            raise _ignored(missing)
        place = callbacks.index(self) + 1  # Lightning walks along this very list
        callbacks[place:place] = _built(self.config, missing)
        _served.append(weakref.ref(self.config))
        rank_zero_info(f"Given to the Trainer, as asked by `accel.attach`: {', '.join(missing)}.")


def _config_in_use() -> Any:
    """Return the innermost configuration on the stack, or `None`; ours build Trainers that are complete."""
    if "omegaconf" not in sys.modules:
        return None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(_OURS):
            return None
        found = [
            root for root in _roots(frame.f_locals) if "callbacks" in root or "trainer" in root
        ]
        if found:
            return next((root for root in found if _asked(root)), found[0])
        frame = frame.f_back
    return None


def _roots(names: Mapping[str, Any]) -> Iterator[Any]:
    from omegaconf import DictConfig

    for value in list(names.values()):
        if isinstance(value, DictConfig):
            root = value._get_root()
            if isinstance(root, DictConfig) and not (root._is_none() or root._is_missing()):
                yield root


def _asked(config: Any) -> dict[str, str]:
    """Return the classes of ours that stand below `callbacks`, by name."""
    from omegaconf import DictConfig

    nodes = config._get_node("callbacks", validate_access=False)
    if not isinstance(nodes, DictConfig) or nodes._is_none() or nodes._is_interpolation():
        return {}
    found = {}
    for name, node in nodes.items_ex(resolve=False):
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_interpolation()):
            target = node._get_node("_target_", validate_access=False)
            if target is not None and str(target._value()).startswith(_OURS):
                found[str(name)] = str(target._value())
    return found


def _attach(config: Any) -> bool | None:
    marks = config.get("accel")
    found = marks.get("attach") if isinstance(marks, Mapping) else None
    if found is not None and not isinstance(found, bool):
        raise ValueError(
            explain(
                "`accel.attach` is true or false",
                repr(found),
                "say `+accel.attach=true`, or leave it out",
            )
        )
    return found


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


def _ignored(missing: Mapping[str, str]) -> AccelError:
    classes = ", ".join(target.rpartition(".")[2] for target in missing.values())
    return AccelError(
        "this app's Trainer was built without callbacks that its configuration asks for, "
        "so the training would not be what was asked",
        f"`callbacks.{'`, `callbacks.'.join(missing)}` ({classes}) in no Trainer",
        "say `+accel.attach=true`, and this Trainer gets them; or pass "
        "`callbacks=list(hydra.utils.instantiate(cfg.callbacks).values())` to it; or say "
        "`+accel.attach=false` when a later Trainer gets them, and `~callbacks.NAME` for one not wanted",
    )
