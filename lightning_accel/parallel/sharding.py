"""FSDP2 of a whole module, with what `fully_shard` leaves to its caller; and whole tensors again.

`fully_shard` (Zhao et al. 2023, arXiv:2304.11277; PyTorch's second design of it) takes no scalars and no integers as
parameters. Those stay whole on every process, and `average_gradients` does for them what the shards do by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_accel.errors import Unsupported
from lightning_accel.exact import widest
from lightning_accel.parallel.meta import materialize, on_meta
from lightning_accel.surgery.structure import named_tensors

_MESSAGE = 250 * 2**20  # bytes, as in DDP


class Sharded(NamedTuple):
    """How a module was sharded: its units, and the parameters that every process holds whole."""

    units: tuple[str, ...]
    whole: tuple[str, ...]


def shard(
    model: nn.Module,
    units: Sequence[str],
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool | int = True,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    before: Callable[[nn.Module], None] | None = None,
) -> Sharded:
    """Shard a module in place over a mesh: each unit by itself, and all the rest as one more.

    Args:
        model: With whole weights, the same on all processes; afterwards its parameters are `DTensor`s.
        units: Names of modules inside, none within another.
        mesh: One dimension to shard over, or two: copies by shards (HSDP).
        reshard_after_forward: Of the units, as in `fully_shard`; the rest stays gathered to the end of a step.
        mp_policy: As in `fully_shard`.
        offload_policy: As in `fully_shard`.
        before: Is called for each unit before it is sharded, and for the whole at last; it may make weights.

    Raises:
        Unsupported: A part is sharded already.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise Unsupported(
                "only whole weights can be sharded",
                f"`{name}` is a DTensor already",
                "leave `fully_shard` and `parallelize_module` to the strategy, or shard everything yourself under "
                "Lightning's `ModelParallelStrategy`",
            )
    named = dict(model.named_parameters())
    whole = [n for n, p in named.items() if not p.dim() or not p.is_floating_point()]
    given: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": mp_policy or MixedPrecisionPolicy(),
        "offload_policy": offload_policy or OffloadPolicy(),
    }
    for name in (*units, ""):
        part = model.get_submodule(name)
        if before is not None:
            before(part)
        kept = {model.get_parameter(n) for n in whole}
        reshards = reshard_after_forward if name else False
        fully_shard(part, reshard_after_forward=reshards, ignored_params=kept, **given)
    for name, parameter in model.named_parameters():
        for attribute, value in vars(named[name]).items():  # `weight.no_decay = True`
            if attribute not in vars(parameter):
                setattr(parameter, attribute, value)
    return Sharded(tuple(units), tuple(whole))


def place_rest(model: nn.Module, device: torch.device, *, parameters: bool) -> None:
    """Move buffers, and whole parameters if asked, to a device; shards are there.

    `Module.to` would do so too, and make other objects of the shards, without what their owner wrote on them.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if parameters else ():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.device != device:
                setattr(module, name, buffer.to(device))


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard`, or `fully_shard` of the whole module, was here."""
    return isinstance(model, FSDPModule)


def unshard(
    model: nn.Module, *, host: bool = False
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Make a sharded module whole again, for good: as if nobody had sharded it; all processes take part.

    torch has no way back: classes, hooks and state stay. What `fully_shard` of torch 2.10 to 2.13 leaves is taken off
    here, by private names, and `shard` can follow again.

    Args:
        model: That `shard` was called for.
        host: Put the whole weights into host memory, one after another.

    Returns:
        By name each sharded parameter, and the whole one in its place, with a whole gradient if it had one.
    """
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.reshard()
    named = dict(model.named_parameters(remove_duplicate=False))
    moved: dict[int, nn.Parameter] = {}
    for parameter in named.values():
        if isinstance(parameter, DTensor) and id(parameter) not in moved:
            full = nn.Parameter(whole(parameter.detach(), host=host), parameter.requires_grad)
            if parameter.grad is not None:
                full.grad = whole(parameter.grad, host=host)
            moved[id(parameter)] = full
    for unit in units:
        _take_off(unit)
    for module in model.modules():
        for flag in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(module).pop(flag, None)
        for name, own in module._parameters.items():
            if own is not None and id(own) in moved:
                module._parameters[name] = moved[id(own)]
    return {n: (p, moved[id(p)]) for n, p in named.items() if id(p) in moved}


def _take_off(unit: Any) -> None:
    """Take the class, the hooks and the state off a module that `fully_shard` was called for."""
    state = unit._get_fsdp_state()
    handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
    for group in state._fsdp_param_groups:
        handles += group._module_to_pre_save_state_dict_hook_handle.values()
        handles += group._module_to_pre_load_state_dict_hook_handle.values()
        handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
    for handle in handles:
        handle.remove()
    unit.__class__ = type(unit).__mro__[type(unit)._orig_cls_mro_index]
    for key in (STATE_KEY, REGISTRY_KEY):
        vars(unit)[key].pop(_entry_of(vars(unit)[key]))
        if not vars(unit)[key]:
            del vars(unit)[key]
    _module_state_mapping.pop(unit, None)


def _entry_of(entries: dict[Any, Any]) -> Any:
    """Return the key under which `fully_shard` is noted, by its function or by its name."""
    return next(key for key in entries if getattr(key, "__name__", key) == "fully_shard")


def move_optimizer(
    optimizer: Optimizer, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]
) -> None:
    """Let an optimizer go on with other parameters, sharded ones for whole ones or the other way round.

    Args:
        optimizer: Whose groups keep their order and settings.
        pairs: The old and the new parameters; new ones have their gradients already.
    """
    new = {id(old): into for old, into in pairs}
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(p), p) for p in group["params"]]
    for old in [p for p in optimizer.state if id(p) in new]:
        into, entry = new[id(old)], optimizer.state.pop(old)
        optimizer.state[into] = tree_map(lambda value, into=into: _like(value, into), entry)


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """Return a tensor of the size of a parameter in its layout; anything else as it is, but whole."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(parameter, DTensor):
        return whole(value, host=False)
    if isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)


def parts_like(tensors: Mapping[str, Tensor], model: nn.Module | None) -> dict[str, Tensor]:
    """Return of whole tensors, by names of weights, what this process holds of those weights; no message is sent."""
    assert model is not None
    named = dict(model.named_parameters(remove_duplicate=False))
    like = {name: _like(value, named[name]) for name, value in tensors.items()}
    return {n: v.to_local() if isinstance(v, DTensor) else v for n, v in like.items()}


def spread_gradient(old: nn.Parameter, new: nn.Parameter) -> None:
    """Give a sharded parameter its part of the gradient of the whole one."""
    if old.grad is not None:
        new.grad = _like(old.grad, new)


def average_gradients(parameters: Iterable[nn.Parameter], group: Any = None) -> None:
    """Average the gradients of whole parameters over processes, as shards are averaged; one message for all.

    A parameter that has a gradient on some processes only counts as zero on the others, as in DDP. Gradients that
    are equal already stay as they are, so that it may follow every backward of an accumulation.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    has = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    wide = widest(has.device)
    flat = torch.cat([*(_real(g).reshape(-1).to(wide) for g in grads), has.to(wide)])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    pieces = flat.split([*(_real(g).numel() for g in grads), len(parameters)])
    for parameter, grad, piece, anywhere in zip(
        parameters, grads, pieces, pieces[-1], strict=False
    ):
        if anywhere > 0:
            _real(grad).copy_(piece.view_as(_real(grad)))
            parameter.grad = grad


def _real(gradient: Tensor) -> Tensor:
    return torch.view_as_real(gradient.detach()) if gradient.is_complex() else gradient.detach()


def broadcast_buffers(buffers: Sequence[Tensor], group: Any) -> None:
    """Give all processes the buffers of the first, in place and few messages, as DDP does before a forward."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for buffer in buffers:
        by_device.setdefault(buffer.device, []).append(buffer)
    with torch.no_grad():
        for together in by_device.values():
            dist._broadcast_coalesced(group, together, _MESSAGE, 0)


def send(root: FSDPModule, sends: bool) -> bool:
    """Let the next backward sum gradients over processes, or not; return which."""
    root.set_requires_gradient_sync(sends)
    root.set_is_last_backward(sends)
    return sends


def refuse_hooks(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise where a weight has hooks on its gradient: shards get theirs past them.

    Raises:
        Unsupported: There is one.
    """
    for name, parameter in parameters.items():
        hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        if any(hooks):
            raise Unsupported(
                "hooks on the gradients of single weights are not called when weights are sharded",
                f"`{name}` has one",
                "change `weight.grad` in `on_before_optimizer_step`, or mask the weight in the forward",
            )


def require_alike(model: nn.Module) -> None:
    """Raise, on all processes, where they have made other networks, or hold weights of other parts of it.

    Raises:
        Unsupported: They have; a broadcast would wait for ever, or mix weights up.
    """
    mine = {n: (tuple(t.shape), t.is_meta) for n, t in named_tensors(model)}
    made: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(made, mine)
    for rank, theirs in enumerate(made):
        if theirs != made[0]:
            names = [n for n in (*made[0], *theirs) if made[0].get(n) != theirs.get(n)]
            first, other = made[0].get(names[0]), theirs.get(names[0])
            raise Unsupported(
                "all processes have to make the same network",
                f"`{names[0]}` is {_said(first)} on rank 0 and {_said(other)} on rank {rank}",
                "make it alike; to hold few weights, make it on the meta device everywhere, and go on from a checkpoint",
            )


def _said(made: tuple[tuple[int, ...], bool] | None) -> str:
    if made is None:
        return "not there"
    return f"on the meta device {made[0]}" if made[1] else f"a tensor {made[0]}"


def equalise(model: nn.Module, device: torch.device) -> None:
    """Give all processes the weights and buffers of the first, as DDP does at its start, one after another."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if isinstance(tensor, DTensor) or tensor.is_meta:
                continue
            there = tensor.detach().to(device).contiguous()
            dist.broadcast(there, 0)
            if there.data_ptr() != tensor.data_ptr():
                tensor.copy_(there)


def make(part: nn.Module, device: torch.device, *, fills: bool) -> None:
    """Give a part that is on the meta device its weights, those of the first process; or room for those of a file."""
    if on_meta(part) and materialize(part, fills=fills):
        equalise(part, device)


def whole(tree: Any, *, keep: bool = True, host: bool = True) -> Any:
    """Return a structure with whole tensors in place of sharded ones; all processes take part.

    Args:
        tree: Any nesting of containers.
        keep: Whether this process wants them; the others help, and get `None` for each.
        host: Move them to host memory, one after another.
    """

    def gathered(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return (full.cpu() if host else full) if keep else None

    with torch.no_grad():
        return tree_map(gathered, tree)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, given whole, into one of shards; no message is sent.

    Raises:
        ValueError: The state is that of other groups of parameters.
    """
    ids = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    by_number = dict(zip(ids, parameters, strict=False))

    entries = {
        number: tree_map(partial(_loaded, by_number.get(number)), entry)
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})


def _loaded(parameter: nn.Parameter | None, value: Any) -> Any:
    return value if parameter is None else _like(value, parameter)


def norm(
    parameters: Iterable[nn.Parameter], parts: Collection[int] = (), group: Any = None
) -> Tensor:
    """Return the 2-norm of all gradients together, shards and whole ones, the same on all processes.

    One message per kind of sharding, in place of one per parameter as `clip_grad_norm_` sends them.

    Args:
        parameters: Sharded or not.
        parts: The `id` of those of which this process has a part of its own, as in tensor parallelism.
        group: The processes that have the other parts.

    Raises:
        Unsupported: A gradient is still to be summed over processes.
    """
    sums: dict[tuple[bool, Any, tuple[Any, ...]], Tensor] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        kind: tuple[bool, Any, tuple[Any, ...]]
        local, kind = grad, (id(parameter) in parts, None, ())
        if isinstance(grad, DTensor):
            local, kind = grad.to_local(), (kind[0], grad.device_mesh, grad.placements)
        square = torch.linalg.vector_norm(local, dtype=_wide(local.dtype)) ** 2
        sums[kind] = sums[kind] + square if kind in sums else square
    for (is_part, mesh, placements), total in sums.items():
        if is_part:
            dist.all_reduce(total, group=group)
        for dim, placement in enumerate(placements):
            if placement.is_partial():
                raise Unsupported(
                    "the norm of gradients needs their sums",
                    f"gradients are {placement}",
                    "clip after backward",
                )
            if placement.is_shard():
                dist.all_reduce(total, group=mesh.get_group(dim))
    return torch.stack(list(sums.values())).sum().sqrt() if sums else torch.tensor(0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def clip_by_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    parts: Collection[int] = (),
    group: Any = None,
) -> Tensor:
    """Scale all gradients so that their `norm` is at most `max_norm`, as `clip_grad_norm_`; return the norm before."""
    parameters = list(parameters)
    total = norm(parameters, parts, group)
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            local = parameter.grad
            (local.to_local() if isinstance(local, DTensor) else local).mul_(scale)
    return total
