"""One process's part of a network: its units in place, sums around them, and the whole tensors again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.parallel.tensor.draws import OwnDraws
from lightning_accel.parallel.tensor.narrow import narrow, widened
from lightning_accel.parallel.tensor.plan import SplitGroup, TensorPlan
from lightning_accel.surgery import Cut, Kept, Structure
from lightning_accel.surgery.structure import named_tensors, replace_data


class _Copied(torch.autograd.Function):
    """Every process goes on with the same tensor; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Summed.apply(gradient, None, ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum over processes of a layer's outputs, the bias once; the gradient goes to all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, group: Any) -> Tensor:
        ctx.group = group
        part = x.clone() if bias is None else x - bias
        part = part.contiguous()
        dist.all_reduce(part, group=group)
        return part if bias is None else part.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Copied.apply(gradient, ctx.group), None, None


class SplitModel:
    """A model in place of which this process has its part, until `join`.

    Parameters stay the same objects, with their data cut, so that optimizers go on with them.

    Args:
        model: The whole network, the same on all processes of the group.
        plan: What each process keeps.
        group: The processes.
        hooks: Whether sums are put around layers: not of averages, which nobody calls while they are split.
    """

    def __init__(
        self, model: nn.Module, plan: TensorPlan, group: Any, *, hooks: bool = True
    ) -> None:
        self.model, self.plan, self._group = model, plan, group
        self._cut: Cut = plan.cuts[dist.get_rank(group)]
        self._cut.apply(model, raw=True)
        self.draws = OwnDraws(dist.get_rank(group))
        self.partial: tuple[str, ...] = ()
        """Weights that every process has whole, of whose gradients each finds a part."""
        self.inside: set[str] = set()
        """Modules that ran between a layer that makes split units and one that reads them."""
        self._open: set[int] = set()
        self._handles: list[Any] = []
        self._ends: list[Any] = []
        self._shared: tuple[Tensor, Tensor] | None = None
        if hooks:
            self._put_hooks(plan.groups)

    @property
    def kept(self) -> Mapping[str, Kept]:
        """What this process has of the tensors that are split."""
        return self._cut.kept

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor that is split."""
        return tuple(self._cut.before.tensors[name])

    def whole_structure(self, found: Structure) -> Structure:
        """Return what the whole model would have where this one has its part."""
        before, mine = self._cut.before, self._cut.before.now(self.model)
        sizes = {
            name: {
                key: before.attributes[name][key]
                if size == mine.attributes.get(name, {}).get(key)
                else size
                for key, size in held.items()
            }
            for name, held in found.attributes.items()
        }
        shapes = {
            name: before.tensors[name] if shape == mine.tensors.get(name) else shape
            for name, shape in found.tensors.items()
        }
        return Structure(shapes, sizes, found.bypassed)

    # ---- sums

    def _put_hooks(self, groups: Sequence[SplitGroup]) -> None:
        regions = _regions(groups)
        for name in dict.fromkeys(n for g in groups for n in g.makers):
            enter = self._enter(regions[name])
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        for name in dict.fromkeys(n for g in groups for n in g.readers):
            leave = self._leave(regions[name])
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_hook(leave, always_call=True))

        self._ends = [narrow(self.model, one) for one in self.plan.narrowed]

    def watch(self) -> None:
        """Note from now on which modules run between makers and readers, and where random numbers are drawn."""
        self.draws.watches = True

        def note(name: str) -> Any:
            return lambda *_: self.inside.add(name) if self._open else None

        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(note(name)))

    def _enter(self, region: int) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self._open.add(region)
            if module.training:
                self.draws.begin(region, module)
            return tree_map(self._copied, (args, kwargs))

        return enter

    def _copied(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad or not torch.is_grad_enabled():
            return widened(value)
        if (
            self._shared is None or self._shared[0] is not value
        ):  # queries, keys and values read one tensor
            self._shared = value, _Copied.apply(widened(value), self._group)
        return self._shared[1]

    def _leave(self, region: int) -> Any:
        def leave(module: Any, args: Any, output: Any) -> Any:
            self._shared = None
            self._open.discard(region)
            self.draws.end(region)
            if not isinstance(output, Tensor):  # an error, or a recomputation that has all it needs
                return output
            bias = getattr(module, "bias", None)
            if isinstance(bias, Tensor):
                is_conv = isinstance(module, nn.modules.conv._ConvNd)
                spatial = len(module.kernel_size) if is_conv else 0
                bias = bias.detach().to(output.dtype).view(-1, *[1] * spatial)
            return _Summed.apply(output, bias, self._group)

        return leave

    def begin_step(self) -> None:
        """Forget what a step that ended early has left."""
        self._shared = None
        self._open.clear()
        self.draws.reset()

    # ---- whole tensors

    def part(self, name: str, value: Tensor) -> Tensor:
        """Return this process's part of a whole tensor."""
        return self.kept[name].take(value) if name in self.kept else value

    def whole(self, name: str, value: Tensor, *, host: bool = False) -> Tensor:
        """Return a whole tensor from the parts of all processes, which all take part.

        Args:
            name: Of the tensor that it belongs to; a momentum is cut as its weight is.
            value: This process's part.
            host: Put it together in host memory.
        """
        if name not in self.kept:
            return value.cpu() if host else value
        keeps = [cut.kept[name] for cut in self.plan.cuts]
        shape = self.shape(name)
        shapes = [k.take(torch.empty(shape, device="meta")).shape for k in keeps]
        buffer = value.new_zeros(max(s.numel() for s in shapes))
        buffer[: value.numel()] = value.detach().reshape(-1)
        parts = [torch.empty_like(buffer) for _ in keeps]
        dist.all_gather(parts, buffer, group=self._group)
        full = torch.empty(shape, dtype=value.dtype, device="cpu" if host else value.device)
        for keep, size, part in zip(keeps, shapes, parts, strict=True):
            _put(full, keep, part[: size.numel()].view(size).to(full.device))
        return full

    @torch.no_grad()
    def join(self, *, host: bool = False) -> None:
        """Make the model whole again, as if nobody had split it; all processes take part.

        Args:
            host: Put whole weights into host memory.
        """
        self.leave()
        done: set[int] = set()
        for name, tensor in list(named_tensors(self.model)):
            if name not in self.kept or id(tensor) in done:
                continue
            full = self.whole(name, tensor, host=host)
            gradient = None if tensor.grad is None else self.whole(name, tensor.grad, host=host)
            new = replace_data(self.model, tensor, full)
            new.grad = gradient
            done |= {id(tensor), id(new)}
        Structure({}, self._cut.before.attributes).apply(self.model)

    def leave(self) -> None:
        """Take the sums off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for end in self._ends:
            end()
        self._ends.clear()
        self.begin_step()


def _put(full: Tensor, keep: Kept, part: Tensor) -> None:
    """Write a part into its places."""
    dims = [] if keep.flat is not None else [d for d, p in enumerate(keep.dims) if p is not None]
    if len(dims) == 1:
        positions: Any = keep.dims[dims[0]]
        full.index_copy_(dims[0], positions.to(full.device), part)
        return
    places = keep.take(torch.arange(full.numel()).view(full.shape)).reshape(-1)
    full.view(-1)[places.to(full.device)] = part.reshape(-1)


def _regions(groups: Sequence[SplitGroup]) -> dict[str, int]:
    """Number the layers by what they split or sum: those of one group, and of groups that share a layer."""
    numbers: dict[str, int] = {}
    for index, group in enumerate(groups):
        layers = (*group.makers, *group.readers)
        known = {numbers[n] for n in layers if n in numbers}
        number = min(known, default=index)
        numbers = {n: number if k in known else k for n, k in numbers.items()}
        numbers.update(dict.fromkeys(layers, number))
    return numbers
