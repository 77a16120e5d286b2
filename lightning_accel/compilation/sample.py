"""Whether a compiled block still computes what it would compute uncompiled: asked at some of its calls.

A graph is a capture: right only while all that the forward reads is guarded or an input. Where a guard is missing
(a constant that stays in an operator, a class attribute, a helper's memory) the block goes on with an old value, and
no error tells. So at the first calls, after each change of what it reads, when a new dataloader or epoch begins,
and now and then, the block runs twice: once as it is, on copies of its inputs and without gradients, after which all
it wrote and drew is put back; and once compiled. Where the two differ it runs as it is from then on.

Rounding is no difference: what exceeds it for the dtype is compared with what inputs that differ by rounding give.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_accel.compilation.difference import difference
from lightning_accel.errors import explain
from lightning_accel.seldom import is_due
from lightning_accel.surgery.moment import Moment, Moments

_ROUNDING = {
    torch.float64: 1e-12,
    torch.complex128: 1e-12,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
_OF_FLOAT32 = 1e-5
"""By how much of its norm a result may differ, by its shortest dtype."""
_TIMES = 8
"""So many times what rounding of the inputs makes is rounding still."""
_MANY = 400
"""So many containers behind a module cost 20 us to compare; of more the comparison is left to some calls."""
_SAME_DRAWS = ("eager", "aot_eager", "aot_eager_decomp_partition")


class Samples:
    """Compares a compiled block with itself uncompiled at some calls.

    Args:
        module: The block.
        backend: What compiled it: whether its random numbers are those of eager code.
        check_every_n_calls: At how many calls, besides those named above.

    Attributes:
        reason: Why the block runs as it is, or "" while it is compiled.
        left_out: Why it is not compared, or "".
        error: The largest difference so far that was rounding.
        num_checked: Comparisons so far.
    """

    def __init__(self, module: nn.Module, backend: Any, check_every_n_calls: int) -> None:
        self.module = module
        self.check_every_n_calls = check_every_n_calls
        self.reason = ""
        self.left_out = _not_comparable(module)
        self.error = 0.0
        self.num_checked = 0
        self._same_draws = backend in _SAME_DRAWS
        self._asked = False
        self._count = {True: 0, False: 0}
        self._changes = 0
        self._moments: Moments | None = None

    def ask(self) -> None:
        """Compare the next call."""
        self._asked = True

    def is_due(self) -> bool:
        """Tell whether this call is one to compare, and count it."""
        if self.left_out or self.reason:
            return False
        mode = self.module.training
        number = self._count[mode] = self._count[mode] + 1
        due = self._asked or is_due(number, self.check_every_n_calls) or self._has_changed(number)
        return due and _is_plain_world()

    def compare(self, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        """Run both, and return the compiled result, or the block's own where they differ."""
        self._asked = False
        inputs = tree_map(_clone, (args, kwargs))
        moment, states = self._take(args, kwargs), _torch_states()
        try:
            with _beside():
                wanted = self.module._call_impl(*inputs[0], **inputs[1])
        except Exception as error:  # whatever a forward does when it runs twice
            self._put_back(moment, states)
            self.left_out = f"it cannot run twice: {' '.join(str(error).split())[:200]}"
            return call()
        drew = not _same_states(states)
        foreign = moment.drew()
        unknown = moment.written()
        if (
            self.num_checked == 0 and self._moments is not None
        ):  # all is copied, so `.data` tells as well
            moment.note_written()
            written = [ref() for ref in self._moments.written]
            unknown += [t for t in written if isinstance(t, nn.Parameter)]
        self._put_back(moment, states)
        if unknown:
            self.left_out = "its forward writes into weights"
            return call()
        if foreign:
            self._stop(f"its forward draws from {foreign}, and compiled code draws others")
            return self.module._call_impl(*args, **kwargs)
        if drew and not self._same_draws:
            self.left_out = "its forward draws random numbers, and its backend draws others"
            return call()
        found = call()
        self.num_checked += 1
        off = difference(found, wanted)
        if off <= _limit(wanted) or off <= self._noise(wanted, args, kwargs):
            self.error = max(self.error, off)
            return found
        moment.put_back()
        _set_torch_states(states)
        self._stop(
            f"compiled, its result is off by {off:.2g} of its norm at call {self._count[self.module.training]}"
        )
        tree_map(_restore, (args, kwargs), inputs)
        return self.module._call_impl(*args, **kwargs)

    def _take(self, args: Any, kwargs: Any) -> Moment:
        if self._moments is None:
            self._moments = Moments(self.module, few=2**62, norms=False)
        return self._moments.take(*args, *kwargs.values(), whole=self.num_checked == 0)

    def _put_back(self, moment: Moment, states: list[Tensor]) -> None:
        moment.put_back()
        _set_torch_states(states)

    def _has_changed(self, number: int) -> bool:
        """Tell whether something that the forward reads is another, which is looked into ever more rarely."""
        if self._moments is None or (len(self._moments.live) > _MANY and number % 16):
            return False
        if not self._moments.changed():
            return False
        self._changes += 1
        return self._changes & (self._changes - 1) == 0

    def _noise(self, wanted: Any, args: Any, kwargs: Any) -> float:
        """Return how far apart results are for inputs that differ by rounding."""
        moment, states = self._take(args, kwargs), _torch_states()
        rounded = tree_map(_rounded, tree_map(_clone, (args, kwargs)))
        try:
            with _beside():
                again = self.module._call_impl(*rounded[0], **rounded[1])
        finally:
            self._put_back(moment, states)
        return _TIMES * difference(again, wanted)

    def _stop(self, reason: str) -> None:
        self.reason = reason
        # Not of rank zero alone: a difference may be of one process.
        warnings.warn(
            explain(
                f"a compiled {type(self.module).__name__} runs as it is from now on",
                reason,
                "exclude it by `select=Select(exclude=...)`, or report what it reads",
            ),
            stacklevel=2,
        )


def _not_comparable(module: nn.Module) -> str:
    for inner in module.modules():
        if isinstance(inner, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            return "it exchanges statistics between processes"
    if any(type(p) not in (nn.Parameter, Tensor) for p in module.parameters()):
        return "its weights are sharded or of a kind of their own"
    return ""


def _is_plain_world() -> bool:
    """Tell whether operations run as usual: no mode records them, no transform or compiler traces them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


@contextmanager
def _beside() -> Iterator[None]:
    """Compute without gradients, and without leaving casts of weights that have none in autocast's cache.

    (Torch 2.13 keeps none; that can go with the last one that does, pytorch #48049.)
    """
    caches = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)


def _clone(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(value.is_inference()):
        return value.detach().clone()


def _rounded(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    generator = torch.Generator(value.device).manual_seed(0)
    sign = torch.rand(value.shape, generator=generator, device=value.device) - 0.5
    with torch.inference_mode(value.is_inference()):
        return value * (1 + 2 * torch.finfo(value.dtype).eps * sign).to(value.dtype)


def _restore(value: Any, before: Any) -> Any:
    if isinstance(value, Tensor) and not torch.equal(value, before):
        with torch.no_grad():
            value.copy_(before)
    return value


def _limit(wanted: Any) -> float:
    tensors = [t for t in tree_leaves(wanted) if isinstance(t, Tensor)]
    limits = [_ROUNDING.get(t.dtype, _OF_FLOAT32) for t in tensors]
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        limits.append(_ROUNDING[torch.bfloat16])
    return max(limits, default=_OF_FLOAT32)


def _torch_states() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _same_states(states: list[Tensor]) -> bool:
    return all(map(torch.equal, states, _torch_states()))


def _set_torch_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)
