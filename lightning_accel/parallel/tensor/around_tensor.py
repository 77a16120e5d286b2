"""What stands around the steps of a split module: parts of gradients are added, and processes are kept alike."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_accel.errors import AccelError
from lightning_accel.parallel.around_steps import AroundSteps
from lightning_accel.parallel.tensor.split import SplitModel
from lightning_accel.surgery.rng import random_state, set_random_state

_PATIENCE, _SOME = 16, 1024
_APART_ON_CPU = 1e-6
_APART = 1e-2
"""By how much of its size a gradient may differ between processes that compute it alike."""


class AroundTensor:
    """Stands around the work of a split module until `leave`.

    Args:
        root: The user's module, split, and perhaps sharded.
        split: How it is split.
        group: The processes among which it is split.
        shards: What stands around its shards, if there are any.
    """

    def __init__(
        self, root: LightningModule, split: SplitModel, group: Any, shards: AroundSteps | None
    ) -> None:
        self._root, self._split, self._group, self._shards = root, split, group, shards
        named = dict(root.named_parameters())
        self._partial = [named[name] for name in split.partial]
        self._alike = {n: p for n, p in named.items() if n not in split.kept}
        self._before: list[Tensor | None] = []
        self._seen = 0
        self._losses = 0
        self._apart = torch.zeros((), dtype=torch.float64, device="cpu")
        """By how much of its size a loss has differed between processes so far."""
        self._evaluates = False
        self._batch = torch.zeros((), dtype=torch.float64)
        """A number that is another for another batch."""
        self._kinds = self._kinds_now()
        self._first = True
        """Whether the next optimizer step is the first of an epoch."""

    @property
    def toggles(self) -> bool:
        """Whether toggles of manual optimization are looked after."""
        return self._shards is not None and self._shards.toggles

    def begin(self) -> None:
        """Get ready for training: processes that see the same batches draw the same random numbers."""
        share_random_state(self._root.device, self._group)
        if self._shards is not None:
            self._shards.begin()

    def begin_epoch(self, *, align: bool) -> None:
        """Compare the processes again after the next step.

        Args:
            align: Give all processes the first one's weights of those that each has whole: rounding on GPUs adds up.
        """
        self._first = True
        kinds = self._kinds_now()
        if changed := [
            n for n in kinds.keys() | self._kinds.keys() if kinds.get(n) is not self._kinds.get(n)
        ]:
            raise AccelError(
                "a network was changed after it was split, and the split was proved for the other one",
                f"`{min(changed)}`",
                "change it before the fit, or use `accel_fsdp`",
            )
        if align:
            with torch.no_grad():
                for parameter in self._alike.values():
                    dist.broadcast(_local(parameter.data), group=self._group, group_src=0)

    def _kinds_now(self) -> dict[str, type]:
        """Return what the modules are that make, read or pass on split units."""
        names = self._split.plan.layers | self._split.inside
        return {n: type(m) for n, m in self._root.named_modules() if n in names}

    def begin_step(self, batch: Any) -> None:
        """Begin a training step.

        Raises:
            AccelError: Processes that share a network got different batches.
        """
        self._split.begin_step()
        self._batch = _sample(batch, self._root.device)
        if self._first:
            same_batch(batch, self._group)

    def begin_evaluation(self, batch: Any) -> None:
        """Begin a step of evaluation; the first batch of each loop is compared.

        Raises:
            AccelError: Processes that share a network got different batches.
        """
        if self._evaluates:
            self._evaluates = False
            same_batch(batch, self._group)

    def _same_loss(self, loss: Tensor) -> None:
        """Compare the loss of all processes; on a GPU the answer is read now and then, so that nothing waits for it."""
        value = torch.stack([loss.detach().sum().double(), self._batch.to(loss.device)])
        both = torch.stack([value, -value])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        apart = both.sum(0) / value.abs().clamp_min(1e-12)
        self._apart = torch.maximum(self._apart.to(apart.device), apart.max())
        self._losses += 1
        here = loss.device.type == "cpu"  # where the same operations give the same bits
        limit = _APART_ON_CPU if here else _APART
        if (here or self._losses % _PATIENCE == 0) and self._apart > limit:
            raise AccelError(
                "the processes that share a network got different losses or batches",
                f"they differ by {float(self._apart):.1e} of their size",
                "let a step read no weights that are split, and give all processes the same batches",
            )

    def before_backward(self, loss: Tensor) -> Tensor:
        """Return the loss to go back from.

        Raises:
            AccelError: It differs between processes.
        """
        self._seen += 1
        self._same_loss(loss)
        self._before = [p.grad for p in self._partial]
        for parameter in self._partial:
            parameter.grad = None
        return loss if self._shards is None else self._shards.before_backward(loss)

    def after_backward(self, *, sends: bool) -> None:
        """Add the parts of gradients that each process found."""
        if self._shards is not None:
            self._shards.after_backward(sends=sends)
        for parameter, before in zip(self._partial, self._before, strict=True):
            if parameter.grad is not None:
                dist.all_reduce(_local(parameter.grad), group=self._group)
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        self._before = []

    def refresh(self) -> None:
        """Begin a loop of steps."""
        self._evaluates = True
        self._split.begin_step()
        if self._shards is not None:
            self._shards.refresh()

    def before_step(self, *, closes: bool) -> None:
        """Get ready for an optimizer step.

        Raises:
            AccelError: Gradients are known in parts, and no backward went through the strategy.
        """
        if self._partial and not self._seen and not closes:
            raise AccelError(
                "parts of gradients are added in `manual_backward`",
                "an optimizer step after none",
                "call `self.manual_backward(loss)` in place of `loss.backward()`",
            )
        if self._shards is not None:
            self._shards.before_step(closes=closes)

    def after_step(self) -> None:
        """Compare what processes compute alike, after the first step of an epoch.

        Raises:
            AccelError: It differs.
        """
        if self._first:
            self._first = False
            self._compare({n: p.grad for n, p in self._alike.items() if p.grad is not None})
        if self._shards is not None:
            self._shards.after_step()

    @torch.no_grad()
    def _compare(self, gradients: Mapping[str, Tensor]) -> None:
        apart = {}
        for name, gradient in gradients.items():
            mine = _local(gradient).detach()
            theirs = mine.clone()
            dist.broadcast(theirs, group=self._group, group_src=0)
            if mine.numel():
                size = torch.maximum(theirs.abs().max(), mine.abs().max())
                apart[name] = float((mine - theirs).abs().max()) > _APART * float(size) + 1e-12
        worst = next((name for name, is_apart in apart.items() if is_apart), "")
        every: list[Any] = [""] * dist.get_world_size(self._group)
        dist.all_gather_object(every, worst, group=self._group)
        if found := next(filter(None, every), ""):
            raise AccelError(
                "the processes that share a network compute different gradients of a weight that each has whole",
                f"`{found}`",
                "clip by `gradient_clip_val`, and let nothing hang on the process: seeds, batches, random choices",
            )

    def leave(self) -> None:
        """Give the module its own methods back."""
        if self._shards is not None:
            self._shards.leave()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share_random_state(device: torch.device, group: Any) -> None:
    """Give all processes of a group the random states of the first."""
    state = {**random_state(), "cuda": []}
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    given: list[Any] = [(state, own)]
    dist.broadcast_object_list(given, group=group, group_src=0)
    set_random_state(given[0][0])
    if own is not None:
        torch.cuda.set_rng_state(given[0][1], device)


def same_batch(batch: Any, group: Any) -> None:
    """Raise where processes of a group have different batches.

    Raises:
        AccelError: They have.
    """
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, _checksum(batch), group=group)
    if len(set(every)) > 1:
        raise AccelError(
            "processes that share a network need the same batch",
            "batches that differ",
            "let Lightning make the sampler, or shard your data by "
            "`trainer.distributed_sampler_kwargs['rank']` in place of `trainer.global_rank`",
        )


def _sample(batch: Any, device: torch.device) -> Tensor:
    """Return a number from some elements of all tensors of a batch, without waiting for a GPU."""
    found = torch.zeros((), dtype=torch.float64, device=device)
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_complex():
            some = leaf.detach().reshape(-1)[:: max(leaf.numel() // _SOME, 1)][:_SOME].double()
            weights = torch.arange(
                1, some.numel() + 1, device=some.device, dtype=torch.float64
            ).sqrt()
            found = found + (some * weights).sum().to(device)
    return found


def _checksum(batch: Any) -> int:
    found = 0
    for leaf in tree_leaves(batch):
        data = leaf
        if isinstance(leaf, Tensor):
            strided = leaf.detach().cpu()
            strided = strided if strided.layout == torch.strided else strided.to_dense()
            data = strided.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        elif not isinstance(leaf, (int, float, str, bytes, bool, type(None))):
            continue
        found = zlib.crc32(data if isinstance(data, bytes) else repr(data).encode(), found)
    return found


def set_group(module: nn.Module, group: Any) -> list[Any]:
    """Let the metrics of a module be gathered over a group, and return them: others would count rows twice."""
    from torchmetrics import Metric

    metrics = [m for m in module.modules() if isinstance(m, Metric) and m.process_group is None]
    for metric in metrics:
        metric.process_group = group
    return metrics
