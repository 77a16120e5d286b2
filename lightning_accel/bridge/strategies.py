"""How a strategy holds the parameters: asked here, and nowhere else.

Classes say little: Lightning's DeepSpeed and XLA strategies are children of `DDPStrategy`, and those of other packages
cannot be imported to be compared with. So the names in their lineage count first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from lightning_accel.surgery import Structure

P = ParamSpec("P")
T = TypeVar("T")
Holding = Literal["whole", "replicated", "sharded", "traced"]

_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")


def is_of(strategy: Strategy, *names: str) -> bool:
    """Whether a strategy, or one that it is a child of, has one of these in its name."""
    return any(name in base.__name__ for base in type(strategy).__mro__ for name in names)


def holding(strategy: Strategy) -> Holding:
    """Return whether each process holds parameters that are whole, copies of whole ones, parts, or graphs of them.

    Of what is not known it says "sharded": nothing that needs whole parameters is then done. A strategy that is chosen
    later, as `AutoStrategy` is, stays what it was told here: who asks counts on the answer.

    >>> from lightning.pytorch.strategies import FSDPStrategy
    >>> [holding(kind()) for kind in (SingleDeviceStrategy, DDPStrategy, FSDPStrategy)]
    ['whole', 'replicated', 'sharded']
    """
    if (undecided := getattr(strategy, "stay_whole", None)) is not None:
        undecided()
    if is_of(strategy, *_SHARDED):
        return "sharded"
    if is_of(strategy, "XLA") and not isinstance(strategy, SingleDeviceStrategy):
        return "traced"
    if isinstance(strategy, SingleDeviceStrategy):
        return "whole"
    return "replicated" if isinstance(strategy, DDPStrategy) else "sharded"


def gathers(strategy: Strategy) -> bool:
    """Whether a strategy that shards can make the module whole for a while: ours can."""
    return hasattr(strategy, "gathered")


def sizes_now(structure: Structure, pl_module: LightningModule) -> Structure:
    """Return what the whole module has at present in the places that a structure names, however it is split."""
    strategy: Any = getattr(vars(pl_module).get("_trainer"), "strategy", None)
    found = structure.now(pl_module)
    return strategy.whole_structure(found) if hasattr(strategy, "whole_structure") else found


@contextmanager
def whole(trainer: Trainer) -> Iterator[None]:
    """Let every process hold whole weights and optimizer states within, where the strategy can see to it."""
    strategy: Any = trainer.strategy
    with strategy.gathered() if gathers(strategy) else nullcontext():
        yield


class WholeWeights:
    """Reads as a module whose weights are whole, for who sums over them in mid-step: names, and the layers they are of.

    Args:
        pl_module: The module, whose weights may be in parts; all processes make one at the same time.
        names: Of the weights that are wanted.
    """

    def __init__(self, pl_module: LightningModule, names: Iterable[str]) -> None:
        strategy: Any = pl_module.trainer.strategy
        named = dict(pl_module.named_parameters(remove_duplicate=False))
        found: dict[int, nn.Parameter] = {}
        for name in (wanted := [name for name in names if name in named]):
            if id(named[name]) not in found:
                full = strategy.whole_tensor(name, named[name].detach())
                found[id(named[name])] = nn.Parameter(full, named[name].requires_grad)
        self._named = {name: found[id(named[name])] for name in wanted}
        self.get_submodule = pl_module.get_submodule

    def named_parameters(
        self, *, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights that were wanted, whole."""
        yield from self._named.items()


def layout(trainer: Trainer) -> object:
    """Return another object whenever weights were put in other parts."""
    return getattr(trainer.strategy, "layout", None)


def in_parts(trainer: Trainer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return of whole tensors, by names of weights, what this process holds of those weights."""
    strategy: Any = trainer.strategy
    return strategy.in_parts(tensors) if hasattr(strategy, "in_parts") else dict(tensors)


@contextmanager
def plain(trainer: Trainer) -> Iterator[None]:
    """Let layers that callbacks changed be plain ones within: `plainly(trainer, pl_module)` of those that have it."""
    callbacks = [c for c in trainer.callbacks if hasattr(c, "plainly")]  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for callback in callbacks:
            stack.enter_context(callback.plainly(trainer, trainer.lightning_module))
        yield


def on_whole(method: Callable[P, T]) -> Callable[P, T]:
    """Run a method of a callback, whose first argument is the Trainer, on whole weights in plain layers."""

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        trainer = next(arg for arg in args if isinstance(arg, Trainer))
        with whole(trainer), plain(trainer):
            return method(*args, **kwargs)

    return run
