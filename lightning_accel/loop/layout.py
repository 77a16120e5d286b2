"""What a fused kernel finds in memory when it steps: gradients and state laid out like their parameters.

Fused kernels on a CPU read memory in order and do not look at strides: a gradient assigned by hand, or state from
a checkpoint of another memory format, would silently go to the wrong weights, and on a GPU is an error (pytorch
#106951). Whoever rewrites gradients may do so until the last moment: clipping, a module's `on_before_optimizer_step`,
the closure itself. So the last moment is where they are laid out: in the optimizer's own hook before a step,
after the closure where there is one.

Some steps no kernel can do: sparse gradients, and SGD's momentum for parameters that get their first
gradient after others. Those groups take that one step in the loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _foreach_utils
from torch.utils.hooks import RemovableHandle

_LOOP = {"fused": False, "foreach": False}


class Layout:
    """Keeps gradients and state laid out like their parameters, before each step of some optimizers.

    What autograd accumulates fits already, and is only looked at.

    >>> weight = torch.nn.Parameter(torch.ones(2, 3))
    >>> optimizer, layout = torch.optim.SGD([weight], 1.0, fused=True), Layout()
    >>> layout.watch(optimizer)
    >>> weight.grad = torch.ones(1).expand(2, 3)
    >>> optimizer.step()
    >>> weight.tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    def __init__(self) -> None:
        self._strides: dict[Tensor, tuple[int, ...]] = {}
        self._in_loop: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._hooks: dict[Optimizer, RemovableHandle] = {}
        self._handles: list[RemovableHandle] = []

    def watch(self, optimizer: Optimizer) -> None:
        """Work before each step of an optimizer from now on, and after it."""
        self._hooks[optimizer] = optimizer.register_step_pre_hook(self._before)
        self._handles += [
            self._hooks[optimizer],
            optimizer.register_step_post_hook(lambda *_: self._out_of_loop()),
        ]

    def come_last(self) -> None:
        """Let hooks that others registered since run before this one."""
        for optimizer, handle in self._hooks.items():
            hooks: Any = optimizer._optimizer_step_pre_hooks  # an OrderedDict
            hooks.move_to_end(handle.id)

    def renew(self) -> None:
        """Look at all parameters and their state again."""
        self._strides = {}

    def release(self) -> None:
        """Leave the optimizers alone."""
        self._out_of_loop()
        for handle in self._handles:
            handle.remove()
        self._hooks, self._handles, self._strides = {}, [], {}

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._align(optimizer)
            return None

        def then_aligned() -> Any:
            result = closure()
            self._align(optimizer)
            return result

        if len(args) > 1:
            return (args[0], then_aligned, *args[2:]), kwargs
        return args, {**kwargs, "closure": then_aligned}

    def _align(self, optimizer: Optimizer) -> None:
        """Lay out anew what differs, and let groups that no kernel can step use the loop for once."""
        self._out_of_loop()  # of a step that failed
        for group in optimizer.param_groups:
            if not group.get("fused"):
                continue
            with_grad = [p for p in group["params"] if p.grad is not None]
            fits = [self._fits(optimizer, parameter, group) for parameter in with_grad]
            # Built fused and under a scaler, gradients are scaled still, which the loop cannot undo.
            scaled = getattr(optimizer, "grad_scale", None) is not None
            if not scaled and not (all(fits) and _has_momentum_throughout(optimizer, group)):
                self._in_loop.append((group, {name: group[name] for name in _LOOP}))
                group.update(_LOOP)
                for parameter in with_grad:
                    self._strides.pop(parameter, None)

    def _fits(self, optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Tell whether the kernel can step a parameter, after having laid out its gradient and state."""
        grad, stride = parameter.grad, parameter.stride()
        assert grad is not None
        if grad.layout != torch.strided or grad.dtype != parameter.dtype:
            return False
        if grad.stride() != stride:
            parameter.grad = _placed(grad, parameter)
        if self._strides.get(parameter) != stride:
            if unfit(parameter, "fused") or not place_state(optimizer, parameter, group):
                return False
            self._strides[parameter] = stride
        return True

    def _out_of_loop(self) -> None:
        while self._in_loop:
            group, flags = self._in_loop.pop()
            group.update(flags)


def place_state(optimizer: Optimizer, parameter: Tensor, group: dict[str, Any]) -> bool:
    """Put the state of a parameter where the implementation of its group reads it; false where it cannot be."""
    state = optimizer.state.get(parameter)
    if not state:
        return True
    if "step" in state:
        state["step"] = _placed_step(state["step"], parameter, group)
    if not group.get("fused"):
        return True
    alike = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape}
    if any(value.layout != torch.strided for value in alike.values()):
        return False  # the momentum of a sparse gradient
    state.update({key: _placed(value, parameter) for key, value in alike.items()})
    return True


def on_device(group: dict[str, Any]) -> bool:
    """Tell whether a group wants its step counters on the device."""
    return bool(group.get("fused") or group.get("capturable"))


def unfit(parameter: Tensor, implementation: str) -> str | None:
    """Say why no kernel of an implementation can step a parameter, or return `None`."""
    device, dtype = parameter.device.type, parameter.dtype
    if implementation == "fused":
        if device not in _foreach_utils._get_fused_kernels_supported_devices():
            return f"there is no fused kernel on {device}"
        if not dtype.is_floating_point or torch.finfo(dtype).bits < 16:
            return f"a parameter is {str(dtype).removeprefix('torch.')}"
        if not _alike(parameter, torch.empty_like(parameter, device="meta")):
            return "a parameter lies in memory with gaps"
    elif device not in (*_foreach_utils._get_foreach_kernels_supported_devices(), "cpu"):
        return f"there are no foreach kernels on {device}"
    if parameter.grad is not None and parameter.grad.is_sparse:
        return "a gradient is sparse"
    return None


def _has_momentum_throughout(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Tell whether SGD's momenta are there for all gradients or for none, without which it has no kernel."""
    if not (group.get("momentum") and "dampening" in group):
        return True
    states = [optimizer.state.get(p) or {} for p in group["params"] if p.grad is not None]
    return len({state.get("momentum_buffer") is None for state in states}) < 2


def _placed_step(step: Any, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    step = step if isinstance(step, Tensor) else torch.tensor(float(step))
    if on_device(group):
        return step.to(device=parameter.device, dtype=torch.float32)
    wide = torch.get_default_dtype() == torch.float64
    return step.to(device="cpu", dtype=torch.float64 if wide else torch.float32)


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor with the strides of its parameter: itself, where dimensions of one element differ alone."""
    if value.stride() == parameter.stride():
        return value
    if _alike(value, parameter):
        if value.device.type == "cpu":  # whose kernels do not ask
            return value
        return value.detach().as_strided(parameter.shape, parameter.stride())
    laid_out = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    return laid_out.copy_(value.detach())


def _alike(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of one shape lie in memory alike; dimensions of one element do not matter."""
    pairs = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(size < 2 or first == second for size, first, second in pairs)
