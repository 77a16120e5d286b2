"""What the networks inside a LightningModule really receive, with nothing asked of the user.

A LightningModule has no fixed input: only its own `training_step` knows how a batch becomes the
arguments of a network. So the step is run once, on a twin whose logging and optimizers do nothing,
with a batch of the user's own training data, and the outermost calls of trainable modules are noted:
positional and keyword arguments, any structure. Neither weights, metrics, optimizers, random state
nor the order of the data are touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from lightning_accel.errors import AccelError
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call, as_call

_SEED = 0


class StepFailed(AccelError):
    """The user's `training_step` raised on a copy of the module; the error itself is the cause."""


def find_example(
    trainer: Trainer, pl_module: LightningModule, example: Any = None
) -> tuple[Call, ...]:
    """Return example calls: the explicit ones, else `example_input_array`, else a real batch's.

    Args:
        trainer: A Trainer within a fit.
        pl_module: The user's module.
        example: Arguments of its `forward`: a tensor, a tuple of arguments, or a dict of keywords.

    Raises:
        AccelError: No trainable module is called in `training_step`, or the step failed on the twin.
    """
    if example is None and is_overridden("forward", pl_module):
        example = pl_module.example_input_array
    if example is None:
        return list(calls_of(trainer, pl_module, batches(trainer, 1)))[0]  # noqa: RUF015 to its end: it puts the random state back
    device = pl_module.device
    example = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, example)
    return (as_call(example, _entry(pl_module)),)


def batches_of(trainer: Trainer, pl_module: LightningModule, count: int) -> list[tuple[Call, ...]]:
    """Return the calls that `count` training batches lead to; always the same ones for one dataset."""
    return list(calls_of(trainer, pl_module, batches(trainer, count)))


def calls_of(
    trainer: Trainer, pl_module: LightningModule, data: list[Any]
) -> Iterator[tuple[Call, ...]]:
    """Yield the outermost calls of trainable modules for each batch."""
    with isolate_rng(), inert_copy(trainer, pl_module) as copy:
        for index, batch in enumerate(data):
            calls = outermost_calls(trainer, copy, placed(trainer, copy, batch), index)
            if not calls:
                raise AccelError(
                    "no trainable module is called in `training_step`",
                    f"{type(copy).__name__} calls none of its own modules",
                    "pass `example=` with the arguments of the LightningModule's forward",
                )
            yield calls


def outermost_calls(
    trainer: Trainer, copy: LightningModule, batch: Any, index: int
) -> tuple[Call, ...]:
    """Return the outermost calls of trainable modules in one step of an inert copy."""
    calls: dict[str, Call] = {}
    with _noting(copy, calls):
        run_placed(trainer, copy, batch, index)
    return tuple(calls.values())


@contextmanager
def inert_copy(trainer: Trainer, pl_module: LightningModule) -> Iterator[LightningModule]:
    """Give a twin on which `training_step` can run without any effect outside it."""
    copy = twin(pl_module)
    copy.trainer = trainer
    if vars(copy).get("training_step", copy) is vars(pl_module).get("training_step"):
        del vars(copy)["training_step"]  # a function that is bound to the original
    inert = _Inert()
    for name in ("log", "log_dict", "manual_backward", "toggle_optimizer", "untoggle_optimizer"):
        for module in copy.modules():
            if isinstance(module, LightningModule):
                vars(module)[name] = inert
    vars(copy)["clip_gradients"] = inert
    count = max(len(trainer.optimizers), 1)
    vars(copy)["optimizers"] = lambda *_, **__: inert if count == 1 else [inert] * count
    vars(copy)["lr_schedulers"] = lambda *_, **__: inert
    yield copy


def run_step(trainer: Trainer, copy: LightningModule, batch: Any, index: int) -> Any:
    """Run `training_step` of an inert copy on a batch, moved and cast as the Trainer would."""
    return run_placed(trainer, copy, placed(trainer, copy, batch), index)


def placed(trainer: Trainer, copy: LightningModule, batch: Any) -> Any:
    """Return a batch as `training_step` gets it: cast, moved, and through the batch transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = copy._on_before_batch_transfer(batch, dataloader_idx=0)
    return copy._apply_batch_transfer_handler(batch, trainer.strategy.root_device, 0)


def run_placed(trainer: Trainer, copy: LightningModule, batch: Any, index: int) -> Any:
    """Run `training_step` of an inert copy on a batch that is in place already."""
    try:
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            return copy.training_step(*step_arguments(copy, batch, index))
    except Exception as error:
        raise StepFailed(
            "`training_step` failed on a copy of the module",
            f"{type(error).__name__}: {error}",
            "pass `example=` with the arguments of the LightningModule's forward",
        ) from error


def batches(trainer: Trainer, count: int) -> list[Any]:
    """Return up to `count` batches of training data, at least one, without moving the data's order.

    Items are drawn evenly from the dataset by index, so the same dataset always gives the same
    batches: a resumed run then decides as the uninterrupted one. What has no index is iterated.
    """
    loaders = trainer.train_dataloader
    if loaders is None:
        raise AccelError("there is no training data yet", "", "call this within `trainer.fit`")
    with isolate_rng():
        torch.manual_seed(_SEED)
        drawn = tree_map(lambda loader: _draw(loader, count), loaders)
    columns = min(len(v) for v in _lists(drawn))
    return [
        tree_map(lambda v, i=i: v[i], drawn, is_leaf=lambda v: isinstance(v, _Drawn))
        for i in range(columns)
    ]


def step_arguments(copy: LightningModule, batch: Any, index: int) -> tuple[Any, ...]:
    """Return what `training_step` takes: the batch, perhaps its index, perhaps that of the loader."""
    names = list(inspect.signature(copy.training_step).parameters)
    return (batch, index, 0)[: max(1, min(len(names), 3))] if names else ()


class _Drawn(list[Any]):
    """Batches of one loader, a leaf to tree functions."""


def _lists(drawn: Any) -> list[_Drawn]:
    return tree_leaves(drawn, is_leaf=lambda v: isinstance(v, _Drawn))


def _draw(loader: Any, count: int) -> _Drawn:
    if _is_indexable(loader):
        size = loader.batch_size or 1
        order = torch.randperm(len(loader.dataset)).tolist()
        chunks = [order[i : i + size] for i in range(0, size * count, size)]
        chunks = [c for c in chunks if len(c) == size] or chunks[:1]
        collate = loader.collate_fn
        if loader.batch_size is None:
            return _Drawn(collate(loader.dataset[c[0]]) for c in chunks)
        return _Drawn(collate([loader.dataset[i] for i in c]) for c in chunks)
    with _kept_generators(loader):
        iterator = iter(loader)
        drawn = _Drawn(batch for _, batch in zip(range(count), iterator, strict=False))
    if not drawn:
        raise AccelError("the training data is empty", repr(loader), "pass data to `trainer.fit`")
    return drawn


def _is_indexable(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader.dataset, "__getitem__")
        and hasattr(loader.dataset, "__len__")
        and len(loader.dataset) > 0
        and (loader.batch_size is not None or loader.batch_sampler is None)
    )


@contextmanager
def _kept_generators(loader: Any) -> Iterator[None]:
    holders = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    generators = [
        g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)
    ]
    states = [g.get_state() for g in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def _noting(copy: LightningModule, calls: dict[str, Call]) -> Iterator[None]:
    depth = 0

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal depth
            if depth == 0 and name not in calls:
                calls[name] = Call(name, *tree_map(_frozen, (args, kwargs)))
            depth += 1

        return hook

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = []
    for name, module in copy.named_modules():
        if not isinstance(module, Metric) and any(p.requires_grad for p in module.parameters()):
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _entry(pl_module: LightningModule) -> str:
    if is_overridden("forward", pl_module):
        return ""
    trainable = [
        n for n, m in pl_module.named_children() if any(p.requires_grad for p in m.parameters())
    ]
    if len(trainable) == 1:
        return trainable[0]
    raise AccelError(
        "an example needs a forward to go into",
        f"{type(pl_module).__name__} has no `forward` and {len(trainable)} trainable children",
        "leave `example` out, so that it is taken from a real batch, or define `forward`",
    )


def _frozen(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class _Inert:
    """Stands for optimizers, schedulers and logging: every use is accepted and does nothing."""

    param_groups: list[dict[str, Any]] = [{"lr": 0.0, "params": []}]

    def __call__(self, *_: Any, **__: Any) -> None:
        return None

    def __getattr__(self, name: str) -> _Inert:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *_: object) -> None:
        return None
