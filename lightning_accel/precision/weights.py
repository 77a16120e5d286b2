"""Weights in bfloat16 that still learn: what the optimizer sees, and how its result is rounded.

Eight significant bits cannot hold most updates: w + d = w whenever |d| is below half an ulp of w, a 512th of
|w|, so training with bfloat16 weights stalls once lr * update is small. Two ways out, both with the optimizer
computing and keeping its state in float32:

- "master": a float32 copy of each weight beside it; the bfloat16 one is its rounding (Micikevicius et al. 2018,
  arXiv 1710.03740).
- "stochastic": no copy. The new weight is rounded up or down by chance, in proportion to its distance, so that
  its mean is exact (Zamirian et al. 2020, arXiv 2010.06192): small updates then count on average.

Around a step the optimizer's groups hold float32 stand-ins of the parameters, with float32 gradients, and its
state goes along; between steps it holds the model's own. No optimizer, user's or torch's, has to know. (To
exchange `p.data` instead would be shorter, and wrong: a new dtype makes autograd drop the node that DDP's
hooks hang on, and ranks drift apart in silence.) What another writes into a weight between two steps (a mask,
a moving average, a checkpoint) wins over the master, element by element.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from lightning_accel.arguments import one_of, whole
from lightning_accel.precision.exchange import (
    SHORT,
    closure_comes_first,
    exchange,
    lengthen_state,
    may_reach_around,
    reached_around,
)
from lightning_accel.surgery.optimizers import parameters_of, within

KINDS = ("master", "stochastic")
_EXPONENT = 0x7F800000  # all ones in infinities and NaN


class _Open(NamedTuple):
    parameter: nn.Parameter
    full: nn.Parameter
    version: int  # of the stand-in's gradient; -1 without one
    short: (
        Tensor | None
    )  # what the weight was, where the optimizer may write into it past its groups


class _Opened(NamedTuple):
    """An optimizer that holds stand-ins, some of which one around it has opened already.

    `lists` is what this one put into its groups, `keys` what it put into its state; the groups and the
    state may be those of the optimizer around it, which then sees to them.
    """

    optimizer: Optimizer
    entries: list[_Open]
    lists: dict[nn.Parameter, nn.Parameter]
    keys: dict[nn.Parameter, nn.Parameter]


class ShortWeights:
    """Lets optimizers step in float32 on parameters that are stored in bfloat16.

    Args:
        kind: "master" or "stochastic".
        seed: Of the random rounding; the same on all ranks.

    >>> p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    >>> weights, sgd = ShortWeights("master"), torch.optim.SGD([p], lr=1.0)
    >>> weights.watch([sgd])
    >>> for _ in range(4):
    ...     p.grad = torch.full_like(p, 2.0**-9)  # less than half an ulp: alone it would be lost
    ...     sgd.step()
    >>> p.dtype, p.item(), weights.masters[p].item()
    (torch.bfloat16, 0.9921875, 0.9921875)
    """

    def __init__(self, kind: str = "master", seed: int = 0) -> None:
        self.kind = one_of("weights", kind, KINDS)
        self.seed = whole("seed", seed, least=0, most=2**31 - 1)
        self.count = 0  # of random roundings
        self._full: dict[
            nn.Parameter, nn.Parameter
        ] = {}  # stand-ins; without "master" empty between steps
        self._open: dict[int, _Opened] = {}
        self._mine: Callable[[], Iterable[nn.Parameter]] = tuple
        self._foreign: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._met: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.steps = 0  # that were seen
        self.rounded: dict[nn.Parameter, Tensor] | None = None
        """What steps left, without masters and while somebody wants to compare."""
        self._depth: dict[int, int] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def masters(self) -> dict[nn.Parameter, Tensor]:
        """The float32 copy of each parameter that has one; live, so clone what you keep."""
        return {p: f.detach() for p, f in self._full.items() if self.kind == "master"}

    def remember(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the masters of parameters that are about to be shortened, before their last bits are lost."""
        before, self._full = self._full, {}
        if self.kind != "master":
            return
        for p in parameters:
            if p.dtype == SHORT and p in before:  # a second run with the same module
                self._full[p] = before[p]
                before[p].data = before[p].data.to(p.device)
            elif p.dtype != SHORT and p.is_floating_point() and p.requires_grad:
                self._stand_in(p).data = p.detach().to(torch.float32, copy=True)

    def watch(
        self,
        optimizers: Iterable[Any],
        parameters: Callable[[], Iterable[nn.Parameter]] | None = None,
    ) -> None:
        """Work around the steps of these optimizers, and around the loading of their states.

        Args:
            optimizers: With those inside of them.
            parameters: Returns the model's, at any time: other optimizers that step them are met at work.
        """
        self.release()
        found = [o for o in within(list(optimizers)) if isinstance(o, Optimizer)]
        self._mine = parameters or (lambda: (p for o in found for p in parameters_of(o)))
        self._handles = [
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        for optimizer in found:
            lengthen_state(optimizer)
            self._handles += [
                # Loading casts the state to the dtype of its parameter, which must not be the short one.
                optimizer.register_load_state_dict_pre_hook(lambda o, _: self.open(o)),
                optimizer.register_load_state_dict_post_hook(lambda o: self.close(o)),
            ]

    def release(self) -> None:
        """Stop, with every optimizer holding the model's parameters."""
        self.abandon()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def opened(self, optimizer: Optimizer) -> Iterator[None]:
        """Let an optimizer hold float32 stand-ins inside the block."""
        was_open = id(optimizer) in self._open
        self.open(optimizer)
        try:
            yield
        finally:
            if not was_open:
                self.close(optimizer)

    def lengthen(self, kept: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Make what optimizers keep beside parameters float32: slow weights, copies of the start."""
        for p, tensor in kept:
            if tensor.dtype == SHORT:
                full = self.masters.get(p)
                same = full is not None and torch.equal(tensor, p) and full.shape == p.shape
                source = full if same and full is not None else tensor
                tensor.data = source.detach().to(tensor.device, torch.float32, copy=True)

    def step(self, optimizer: Any, closure: Callable[[], Any]) -> Any:
        """Let an optimizer step that is none of torch's class, and so calls none of torch's hooks."""
        wrapped = self._before_step(optimizer, (optimizer,), {"closure": closure})
        result = optimizer.step(closure=closure if wrapped is None else wrapped[1]["closure"])
        self._after_step(optimizer)
        return result

    @property
    def is_stepping(self) -> bool:
        """Whether an optimizer is at work."""
        return bool(self._open or self._depth)

    @torch.no_grad()
    def take_over(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Make what others wrote since the last step the weights, and return where it was many values."""
        found: list[nn.Parameter] = []
        for p in parameters:
            full = self._full.get(p)
            short = self.rounded.get(p) if self.rounded is not None else None
            before = full.detach().to(SHORT) if short is None and full is not None else short
            if before is not None and before.shape == p.shape and before.device == p.device:
                differs, in_many = changed(p.detach(), before)
                found += [p] if in_many else []
                if differs and short is None:
                    self._current(p)
            if self.rounded is not None and p.dtype == SHORT and p.requires_grad:
                self.rounded[p] = p.detach().clone()
        return found

    def open(self, optimizer: Optimizer) -> None:
        """Let an optimizer hold float32 stand-ins; twice is once."""
        if id(optimizer) in self._open:
            return
        doubtful = may_reach_around(optimizer) and (self.steps <= 128 or self.steps % 16 == 0)
        held = {e.parameter: e.full for opened in self._open.values() for e in opened.entries}
        owners = {full: p for p, full in held.items()}
        entries, lists, keys = [], {}, {}
        for p in parameters_of(optimizer):
            if p in owners:  # in groups that the optimizer around this one shares
                keys[owners[p]] = p
            elif p in held:
                keys[p] = lists[p] = held[p]
            elif p.dtype == SHORT and p.requires_grad and p not in lists:
                full = self._stand_in(p)
                full.data = self._current(p)
                full.grad = None if p.grad is None else p.grad.to(torch.float32)
                version = -1 if full.grad is None else full.grad._version
                short = p.detach().clone() if doubtful else None
                entries.append(_Open(p, full, version, short))
                keys[p] = lists[p] = full
        if any(opened.optimizer.state is optimizer.state for opened in self._open.values()):
            keys = {}
        self._open[id(optimizer)] = _Opened(optimizer, entries, lists, keys)
        exchange(optimizer, lists, keys)

    def close(self, optimizer: Optimizer, *, final: bool = False) -> None:
        """Give the parameters back, with the new weights; `final` rounds for good, at the end of a step."""
        opened = self._open.pop(id(optimizer), None)
        if opened is None:
            return
        entries = opened.entries
        by_chance = final and self.kind == "stochastic" and bool(entries)
        generators = self._generators(entries) if by_chance else {}
        _give_back(opened)
        for p, full, version, short in entries:
            values = full.detach()
            if short is not None and not torch.equal(p, short):
                raise reached_around(optimizer)
            with torch.no_grad():
                p.copy_(round_stochastically(values, generators[p.device]) if by_chance else values)
                _hand_back(full.grad, p, version)
            full.grad = None
            if self.rounded is not None and final:
                self.rounded[p] = p.detach().clone()
            if by_chance:
                full.data = values.new_empty(0)
        self.count += by_chance

    def abandon(self) -> None:
        """Give the parameters back after a failed step, with the weights they had before it."""
        for opened in reversed(self._open.values()):
            _give_back(opened)
            for _, full, *_ in opened.entries:
                full.grad = None
        self._open = {}

    def to(self, device: torch.device) -> None:
        """Move the masters; anew, since `data` of one device does not fit a parameter of every other."""
        before, self._full = self._full, {}
        for p, full in before.items():
            self._full[p] = nn.Parameter(full.detach().to(device))
            vars(self._full[p]).update(vars(full))

    def state(self, names: dict[nn.Parameter, str]) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values and tensors by name."""
        masters = {names[p]: full for p, full in self.masters.items() if p in names}
        return {"weights": self.kind, "count": self.count, "masters": masters}

    def load(self, state: dict[str, Any], names: dict[nn.Parameter, str]) -> None:
        """Take a state back; a weight without a fitting master starts from what it is."""
        self.count = int(state.get("count", 0))
        stored = state.get("masters", {}) if self.kind == "master" else {}
        for p, name in names.items():
            full = stored.get(name)
            if isinstance(full, Tensor) and full.shape == p.shape:
                self._stand_in(p).data = full.detach().to(p.device, torch.float32, copy=True)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        key = id(optimizer)
        if not self._is_mine(optimizer):
            return None
        if optimizer not in self._met:
            self._met.add(optimizer)
            lengthen_state(optimizer)  # made in mid-training, and loaded perhaps
        self.steps += 1
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        # A step within a step is a subclass that calls its parent's.
        self._depth[key] = self._depth.get(key, 0) + 1 if key in self._open else 1
        if closure is None or not closure_comes_first(optimizer):
            self.open(optimizer)
        if closure is None:
            return None
        wrapped = self._around(optimizer, closure)
        if len(args) > 1:
            return (args[0], wrapped, *args[2:]), kwargs
        return args, {**kwargs, "closure": wrapped}

    def _is_mine(self, optimizer: Optimizer) -> bool:
        if id(optimizer) in self._open:
            return True
        if optimizer in self._foreign:
            return False
        held = {id(p) for p in self._mine()}
        held |= {id(e.full) for opened in self._open.values() for e in opened.entries}
        if any(id(p) in held for p in parameters_of(optimizer)):
            return True
        self._foreign.add(optimizer)
        return False

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) not in self._depth:
            return
        self._depth[id(optimizer)] -= 1
        if self._depth[id(optimizer)] == 0:
            del self._depth[id(optimizer)]
            self.close(optimizer, final=True)

    def _around(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            # The model computes with its own weights, so those around this one give theirs back as well.
            around = [o.optimizer for o in self._open.values() if o.optimizer is not optimizer]
            for one in (optimizer, *reversed(around)):
                self.close(one)
            result = closure()
            for one in (*around, optimizer):
                self.open(one)
            return result

        return run

    def _stand_in(self, p: nn.Parameter) -> nn.Parameter:
        if p not in self._full:
            self._full[p] = nn.Parameter(torch.empty(0, device=p.device))
            vars(self._full[p]).update(vars(p))  # marks that optimizers may read
        return self._full[p]

    def _current(self, p: nn.Parameter) -> Tensor:
        """Return the float32 value of a parameter: its master, except where another wrote into it."""
        full, short = self._full[p].data, p.detach()
        if full.shape != p.shape or full.device != p.device:
            return short.to(torch.float32, copy=True)
        return full.copy_(torch.where(full.to(SHORT) == short, full, short.to(torch.float32)))

    def _generators(self, entries: list[_Open]) -> dict[torch.device, torch.Generator]:
        """Make a stream of each device, which depends on the seed and the number of steps only."""
        # A CPU's generator reads 32 bits of a seed; the odd factor keeps the streams of two seeds apart.
        start = (self.seed * 0x9E3779B1 + self.count) % (1 << 32)
        return {
            device: torch.Generator(device).manual_seed(start)
            for device in {entry.parameter.device for entry in entries}
        }


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to bfloat16, up or down by chance, so that the expected result is the value itself.

    Numbers that bfloat16 can hold stay exact; infinities and NaN stay what they are.

    Args:
        values: Of float32.
        generator: Where the chance comes from; on the device of `values`.

    >>> generator = torch.Generator().manual_seed(0)
    >>> mean = round_stochastically(torch.full((40000,), 1.001), generator).double().mean()
    >>> abs(float(mean) - 1.001) < 1e-4  # rounded to the nearest it would be 1.0
    True
    """
    count = values.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=values.device)
    words.random_(-(1 << 63), None, generator=generator)  # four numbers of 16 bits each
    noise = words.view(torch.int16)[:count].view(values.shape).to(torch.int32).bitwise_and_(0xFFFF)
    bits = values.contiguous().view(torch.int32)
    finite = bits.bitwise_and(_EXPONENT) != _EXPONENT
    # The upper half of the bits is the bfloat16 below in magnitude, the lower half the distance to the next.
    rounded = noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(SHORT)
    return torch.where(finite, rounded, values.to(SHORT))


def _give_back(opened: _Opened) -> None:
    lists = {full: p for p, full in opened.lists.items()}
    exchange(opened.optimizer, lists, {full: p for p, full in opened.keys.items()})


def _hand_back(grad: Tensor | None, p: nn.Parameter, version: int) -> None:
    """Let a parameter's gradient follow what the step did to that of its stand-in, if anything."""
    if grad is None or p.grad is None:
        p.grad = None if grad is None else grad.to(SHORT)
    elif grad._version != version:
        if grad.is_sparse:
            p.grad = grad.to(SHORT)
        else:
            p.grad.copy_(grad)  # the same tensor, which may be part of a bucket of DDP


def changed(now: Tensor, before: Tensor) -> tuple[bool, bool]:
    """Tell whether a weight differs, and whether in more values than a mask or a clamp writes.

    >>> changed(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0]))
    (True, False)
    """
    if torch.equal(now, before):
        return False, False
    differs = (now != before) & ~(now.isnan() & before.isnan())
    return True, now[differs].unique().numel() > 2
