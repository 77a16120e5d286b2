"""What a training step needs on each device, for every strategy, before anything is allocated.

A step runs on fake tensors, whose sizes are real and which hold nothing, in a fake group of as many processes as asked
for; torch's own trackers (`torch.distributed._tools`, private) add up what lives at each moment. So a network of any
size is planned on a laptop. What no tracker sees: memory of the driver and of the communication library, workspaces of
kernels, fragmentation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.parallel.live_bytes import LiveBytes, TooLarge
from lightning_accel.parallel.sharding import shard
from lightning_accel.parallel.tensor.elementwise import with_weight
from lightning_accel.parallel.tensor.plan import TensorPlan, plan_tensor
from lightning_accel.parallel.tensor.split import SplitModel
from lightning_accel.parallel.units import find_units
from lightning_accel.parallel.uses import Uses
from lightning_accel.surgery.call import Call


class Workload(NamedTuple):
    """What is trained.

    Attributes:
        make: Builds the network; it is called where nothing is allocated.
        batch: Makes what a step takes; it is called there too.
        step: Returns the loss of a network on a batch.
        optimizer: Makes the optimizer of a network.
        precision: The format of computation under autocast, or `None`.
        uses: What steps do with the weights, where that is known: else structure alone decides on units.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    step: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[nn.Module], Optimizer]
    precision: torch.dtype | None = None
    uses: Uses | None = None


class Option(NamedTuple):
    """A way to train: on so many devices, `tensor` of which share a network; "ddp" copies, "fsdp" shards."""

    strategy: str
    devices: int = 1
    tensor: int = 1
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """A name for people, as in `Trainer(strategy=...)`."""
        return self.strategy + (" + checkpointing" if self.checkpointing else "")


class Estimate(NamedTuple):
    """What one device needs in a step.

    Attributes:
        option: The way to train.
        peak: Bytes at the fullest moment; `None` where it is beyond the limit.
        parts: What they are at that moment, in bytes.
        states: Bytes of weights, gradients and optimizer states of one device.
        sent: Bytes that it sends in a step, by whether others wait for them.
        flops: Multiplications and additions of one device in a step.
        why: Why there is no peak.
    """

    option: Option
    peak: int | None
    parts: dict[str, int]
    states: int
    sent: dict[str, int] = {}
    flops: int = 0
    why: str = ""


def estimate(work: Workload, option: Option, *, limit: int | None = None) -> Estimate:
    """Return what a way to train needs on each device.

    Args:
        work: What is trained.
        option: How.
        limit: Bytes of a device: where more is alive, nothing further is run.

    Within a group of processes that runs, the others call `processes(option)` meanwhile.

    Raises:
        Unsupported: A group of other processes is running already.
        AccelError: The step needs real numbers, or the layers cannot be split.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        # Of how a network is written, which its training tells again.
        warnings.simplefilter("ignore")
        mesh = stack.enter_context(processes(option))
        plan = planned_split(work, option.tensor) if option.tensor > 1 else None
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = work.make()
        units = find_units(model, work.uses).names
        states = _states(work, model, option, plan)
        if limit is not None and states > limit:
            return Estimate(option, None, {}, states, why="weights, gradients and states alone")
        try:
            return _run(work, option, model, units, mesh, plan, states, limit)
        except TooLarge:
            return Estimate(option, None, {}, states, why="weights and activations")
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise AccelError(
                "memory is planned on tensors that hold no numbers",
                f"the step asks for some ({error})",
                "plan the network alone, with --example",
            ) from None


def _run(
    work: Workload,
    option: Option,
    model: nn.Module,
    units: Sequence[str],
    mesh: Any,
    plan: TensorPlan | None,
    states: int,
    limit: int | None,
) -> Estimate:
    if plan is not None:
        SplitModel(model, plan, mesh["tensor"].get_group())
    if option.checkpointing:
        for name in units:
            _recomputed(model.get_submodule(name))
    if option.strategy.startswith("fsdp"):
        with _first_piece_only():
            shard(model, units, mesh["data"])
        if hasattr(
            model, "training_step"
        ):  # a LightningModule, whose steps need not call `forward`
            register_fsdp_forward_method(model, "training_step")
    batch, optimizer = work.batch(), work.optimizer(model)
    groups = mesh.get_all_groups() if mesh is not None else []
    traffic, live = _Traffic(groups), LiveBytes(partial(_held, model, optimizer, batch), limit)
    with live:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        live.restart()  # optimizer states are there from now on
        with traffic:
            _step(work, model, optimizer, batch)
    sent = traffic.sent
    if option.strategy == "ddp":
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        sent = {"beside": 2 * size * (option.devices - 1) // option.devices}
    return Estimate(option, live.peak, live.parts, states, sent, traffic.flops)


def _step(work: Workload, model: nn.Module, optimizer: Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    context = (
        nullcontext()
        if work.precision is None
        else torch.autocast("cpu", work.precision, cache_enabled=False)
    )
    with context:
        loss = work.step(model, batch)
    loss.backward()
    optimizer.step()


def planned_split(work: Workload, size: int) -> TensorPlan:
    """Plan how layers are split over so many processes, on a device that holds nothing; a fit proves it.

    Raises:
        NoEffect: No layer can be split.
        AccelError: The step does not call the network's `forward`.
    """
    with torch.device("meta"):
        model, batch = work.make(), work.batch()
    calls: list[Call] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(Call("", args, kwargs))
        raise _Called

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        work.step(model, batch)
    except _Called:
        pass
    finally:
        handle.remove()
    if not calls:
        raise AccelError(
            "the step calls no `forward` of the module, so its layers cannot be planned",
            type(model).__name__,
            "plan `fsdp`",
        )
    return plan_tensor(model, calls, size)


class _Called(Exception):
    """The network was called, which is all there was to know."""


@contextmanager
def processes(option: Option) -> Iterator[Any]:
    """Stand as one of many processes that are not there.

    In a group that runs all of its processes call this, and one of them plans within; messages of a plan go nowhere.

    Raises:
        Unsupported: The group is one of another number of processes.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    alone = not dist.is_initialized()
    if option.devices == 1 or (option.strategy == "ddp" and not alone):
        yield None
        return
    if not alone and dist.get_world_size() != option.devices:
        raise Unsupported(
            "memory is planned in a group of processes that does not exist",
            f"a process group of {dist.get_world_size()} that is running",
            "plan in a process of its own: `lightning-accel plan --devices`",
        )
    if alone:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=option.devices)
    size, names = (option.devices // option.tensor, option.tensor), ("data", "tensor")
    fake: dict[Any, Any] = dict.fromkeys(names, "fake")
    mesh = init_device_mesh("cpu", size, mesh_dim_names=names, backend_override=fake)
    try:
        yield mesh
    finally:
        for group in [None] if alone else mesh.get_all_groups():
            dist.destroy_process_group(group)


def _states(work: Workload, model: nn.Module, option: Option, plan: TensorPlan | None) -> int:
    """Return the bytes of weights, gradients and optimizer states on one device."""
    kept = plan.cuts[0].kept if plan is not None else {}
    over = option.devices // option.tensor if option.strategy.startswith("fsdp") else 1
    extra, total = _bytes_per_number(work.optimizer(model)), 0.0
    for name, p in model.named_parameters():
        count = p.numel()
        if name in kept:
            count = kept[name].take(torch.empty(tuple(p.shape), device="meta")).numel()
        learns = (p.element_size() + extra) if p.requires_grad else 0
        total += count * (p.element_size() + learns) / over
    return int(total)


def _bytes_per_number(optimizer: Optimizer) -> float:
    """Return how many bytes an optimizer keeps of each number, from a step with a small weight."""
    weight = nn.Parameter(torch.zeros(64, 64))
    weight.grad = torch.zeros_like(weight)
    alone, step = with_weight(optimizer, optimizer.param_groups[0], weight)
    step(alone)
    kept = [v for entry in alone.state.values() for v in entry.values() if isinstance(v, Tensor)]
    return sum(v.numel() * v.element_size() for v in kept) / weight.numel()


@contextmanager
def _first_piece_only() -> Iterator[None]:
    """Let `fully_shard` make the one piece of each weight that the first of hundreds of processes keeps, not all."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    cut = _fsdp_param._chunk_with_empty

    def first(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
        return [tensor.narrow(dim, 0, -(-tensor.shape[dim] // count))]

    _fsdp_param._chunk_with_empty = first  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param._chunk_with_empty = cut


def _recomputed(module: nn.Module) -> None:
    forward = module.forward
    vars(module)["forward"] = lambda *args, **kwargs: checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )


def _held(model: nn.Module, optimizer: Optimizer, batch: Any) -> dict[str, list[Tensor]]:
    """Return the tensors that have a name: all others are activations."""
    parameters = list(model.parameters())
    states = [v for entry in optimizer.state.values() for v in entry.values()]
    return {
        "weights": [*parameters, *model.buffers()],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer": [v for v in states if isinstance(v, Tensor)],
        "batch": [v for v in tree_leaves(batch) if isinstance(v, Tensor)],
    }


def _is_fake(group: Any) -> bool:
    return dist.get_backend(group) == "fake"


class _Traffic(TorchDispatchMode):
    """Counts operations, and what collectives send, by whether the step waits for it.

    torch's own `FlopCounterMode` looks at modules too, and keeps alive what a checkpointed block computes anew.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        super().__init__()
        self.flops = 0
        self.sent = {"beside": 0, "between": 0}
        self._own = {group.group_name for group in groups}
        self._alone = not dist.is_initialized() or _is_fake(dist.group.WORLD)

    def _refuse(self, args: Any) -> None:
        """Raise where a step sends something to processes that are there: they would not answer."""
        for value in () if self._alone else tree_leaves(args):
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
                value = dist.ProcessGroup.unbox(value).group_name
            elif not isinstance(value, str):
                continue
            if value not in self._own and value in dist.distributed_c10d._world.pg_names.values():
                raise AccelError(
                    "a step is planned on one process",
                    "it sends something to the others",
                    "name the strategy: strategy='accel_ddp' or 'accel_fsdp'",
                )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._refuse((args, kwargs))
        if func.namespace == "c10d":
            name = func.name().partition("::")[2]
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            size = max((t.numel() * t.element_size() for t in tensors), default=0)
            if name.startswith("allreduce"):
                self.sent["between"] += 2 * size
            elif name.startswith(("_allgather", "_reduce_scatter")):
                self.sent["beside"] += size
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += int(count(*args, **(kwargs or {}), out_val=out))
        return out
