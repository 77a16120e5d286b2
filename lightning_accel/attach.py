"""Callbacks that a configuration asks for, beside a Trainer that the app has built without them.

A preset writes nodes below `callbacks`. An app that gives its Trainer other callbacks, or none, would
train as if nothing had been asked, and nobody would say so. Lightning asks every installed package for
callbacks when a Trainer is built (`lightning_accel/entry.py`), and so we get to look at each Trainer: one that starts a fit without what its configuration asks for is refused. With
`accel.attach=true` it is given the callbacks instead; `accel.attach=false` says that another Trainer
gets them.

A script without any configuration is given callbacks by a variable of its environment: `LIGHTNING_ACCEL=amp,prune`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_accel.bridge.checks import refuse_mirror
from lightning_accel.entry import OWN, VARIABLE, asked
from lightning_accel.errors import AccelError, Unsupported, explain
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.unread import attach_of

_COMPOSING = threading.Lock()

_served: list[weakref.ref[Any]] = []  # configurations whose callbacks some Trainer has got


class ConfiguredCallbacks(Callback):
    """See to it that a Trainer has the callbacks which its configuration asks for.

    Args:
        config: The whole configuration, with `callbacks` by name.
        place: The node that describes this Trainer; the callbacks are meant for that of `trainer`.

    Raises:
        ValueError: At the start of a fit, when `accel.attach` is neither true nor false.
        AccelError: At the start of a fit, when callbacks are missing and no Trainer has had them.
    """

    def __init__(self, config: Any, place: str = OWN) -> None:
        self.config = config
        self.place = place

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        refuse_mirror(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        held = {base.__name__ for callback in callbacks for base in type(callback).__mro__}
        missing = {n: t for n, t in asked(self.config).items() if t.rpartition(".")[2] not in held}
        attach = attach_of(self.config.get("accel"))
        if not missing:
            _served.append(weakref.ref(self.config))
            return
        if any(known() is self.config for known in _served):
            return
        if attach is False or self.place != OWN:
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


class RequestedCallbacks(Callback):
    """Give a Trainer the callbacks that a variable of the environment asks for, and it does not have.

    Args:
        words: What the variable says.
        callbacks: Who is asked for, by name.
    """

    def __init__(self, words: str, callbacks: Mapping[str, Callback]) -> None:
        self.words = words
        self.callbacks = dict(callbacks)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        held: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        kinds = {type(callback) for callback in held}
        wanted, self.callbacks = self.callbacks, {}  # a second fit has them already
        given = {name: c for name, c in wanted.items() if type(c) not in kinds}
        place = held.index(self) + 1  # Lightning walks along this very list
        held[place:place] = given.values()
        there = [name for name in wanted if name not in given]
        if wanted:
            said = f"{VARIABLE}={self.words!r} gives this Trainer: {', '.join(given) or 'nothing'}"
            rank_zero_info(said + (f" (of its own: {', '.join(there)})" if there else ""))


def requested(words: Sequence[str]) -> list[Callback]:
    """Return what sees to it that a Trainer has the callbacks of some presets.

    Args:
        words: Names of presets, joined by commas, and then settings as on the command line of a Hydra app: `amp,prune`,
            `callbacks.pruning.when=8`. None at all is nothing.

    Raises:
        ValueError: Hydra knows no such preset, or no such setting.
        Unsupported: A preset is about arguments of the Trainer, which is built already.

    >>> [callback] = requested(["none"])
    >>> list(callback.callbacks)
    ['report']
    """
    if not words:
        return []
    from lightning_accel.bridge.technique import place_of
    from lightning_accel.recipe import build_callbacks

    tree = _composed(words)
    settings = tree.get("trainer") or {}
    if settings:
        said = ", ".join(f"trainer.{name}={value!r}" for name, value in settings.items())
        do = "pass them to the Trainer in the script, and leave this preset out of the variable"
        what = f"{VARIABLE} cannot change arguments of a Trainer that is being built"
        raise Unsupported(what, said, do)
    nodes = tree.get("callbacks") or {}
    made = {name: build_callbacks({name: node})[0] for name, node in nodes.items() if node}
    ordered = sorted(made.items(), key=lambda item: place_of(item[1]) or -1)
    return [RequestedCallbacks(" ".join(words), dict(ordered))]


def _composed(words: Sequence[str]) -> dict[str, Any]:
    """Compose presets alone, in whatever app this is.

    Raises:
        ValueError: Hydra refuses.
    """
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lightning_accel._hydra_plugins import register

    while len(words) > 1 and words[0].endswith(","):  # `amp, prune`
        words = [words[0] + words[1], *words[2:]]
    names = [name for name in words[0].split(",") if name]
    if not names or any(name.isdecimal() for name in names):  # `=1`
        do = "say presets and then settings, such as 'amp,prune callbacks.pruning.when=8'"
        raise ValueError(explain(f"{VARIABLE} names no presets", repr(" ".join(words)), do))
    overrides = [
        *([f"+accel=[{','.join(names)}]"] if "=" not in words[0] else words[:1]),
        *words[1:],
    ]
    try:
        with _COMPOSING, preserve_rng(), _hydra():  # of which a process has one
            register()
            tree: Any = OmegaConf.to_container(compose(None, overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        do = "say presets and then settings, such as 'amp,prune callbacks.pruning.when=8'"
        said = " ".join(str(error).split())
        raise ValueError(explain(f"{VARIABLE} names no presets", said, do)) from error
    return {str(key): value for key, value in tree.items()}


def _hydra() -> AbstractContextManager[Any]:
    """Compose within as the app that is running would, or as none."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return initialize_config_dir(version_base="1.3", config_dir=str(Path(__file__).parent))


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
