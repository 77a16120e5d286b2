"""A network whose weights will not change can be compiled with the weights inside.

Inductor then packs weights for its kernels once, folds batch norms into convolutions and computes what is
constant ahead: its *freezing*. That needs no gradients, and a graph that is thrown away when weights change.
So a copy is frozen and stands in for the network's call for a while; the network itself, with its weights,
hooks and names, is not touched. The copy may hold bfloat16 weights or be channels last as well.

The first call runs both, returns what the network itself gave, and compares; so do some later calls. Where
the copy is off or cannot be compiled, where the network has hooks that a copy would not call, writes anything or
draws random numbers, it goes on as it is, with the reason and the figures kept. Before each call everything that
the network reads is compared with what the copy was taken from: weights, attributes, modes, hooks (`Footprint`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_accel.arguments import finite, flag, one_of
from lightning_accel.compilation.blocks import find_blocks
from lightning_accel.compilation.difference import difference
from lightning_accel.compilation.recompile_policy import CompiledCode
from lightning_accel.compilation.region import Backend, check
from lightning_accel.measure.race import synchronise
from lightning_accel.seldom import check_seldom, is_due
from lightning_accel.surgery import Select
from lightning_accel.surgery.footprint import Footprint, observe
from lightning_accel.surgery.preserve import preserve_rng

TOLERANCES = {None: 1e-4, "bf16-true": 3e-2}
"""How far the copy may be off by default, per kind of weights: norm of the difference by norm."""
_WINDOW = 64
_OUT = "leave it out by `select=Select(exclude=...)`"
_NOT_ROUNDING = 0.1
"""So far off is no copy by its short weights alone."""
_OFTEN = 3
"""Copies of one network, after which it is taken to change all the time."""
_SERIAL = iter(range(2**62))
_FEWEST = 4
"""Calls that ran both, by the shortest of which the two are judged."""
_clock = time.perf_counter
_ABSENT: Any = object()


class Costs:
    """Seconds of the shortest calls, by who was called; on devices that are waited for.

    Args:
        device: Of the network.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_pairs = 0
        self._shortest: dict[str, float] = {}

    def timed(self, who: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a call gives, and note how long that took."""
        synchronise(self.device)
        start = _clock()
        result = call(*args, **kwargs)
        synchronise(self.device)
        self._shortest[who] = min(self._shortest.get(who, math.inf), _clock() - start)
        return result

    def slowdown(self) -> float | None:
        """Return how many times as long the copy takes, with the look at the network before it."""
        if self.num_pairs < _FEWEST:
            return None
        return (self._shortest["look"] + self._shortest["copy"]) / self._shortest["network"]


class Frozen:
    """What a network calls instead of itself while it is frozen.

    Attributes:
        error: Norm of the difference on the first call, relative to the norm of the true output.
        reason: Why the network runs as it is, or "" where the frozen copy does.
        advice: What to do about that.
        num_calls: Calls in evaluation without gradients.
        num_missed: Those that ran on the copy without a graph, being of another size.
        num_checked: Those that ran both and were compared.
        costs: What those took, but the first of each copy.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        precision: str | None,
        channels_last: bool,
        tolerance: float,
        check_every_n_calls: int | None,
        backend: Backend,
    ) -> None:
        self.module = module
        self.name = name
        self.precision = precision
        self.channels_last = channels_last
        self.tolerance = tolerance
        self.check_every_n_calls = check_every_n_calls
        self.backend = backend
        self.before: Callable[..., Any] | None = module._compiled_call_impl
        self.eager: Callable[..., Any] = self.before or module._call_impl
        self.capture = getattr(self.before, "capture", None)  # compiled by us: stays visible
        self.error: float | None = None
        self.reason = self.advice = ""
        self.num_calls = self.num_missed = self.num_checked = 0
        self._unchecked = True
        self.costs = Costs(next((p.device for p in module.parameters()), torch.device("cpu")))
        self._on_host = all(p.device.type == "cpu" for p in module.parameters())
        self._dtypes: list[Any] = []
        self._copies = 0
        self._copy, self._code = module, CompiledCode(name, self._missed, backend=backend)
        self._start()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.module.training or torch.is_grad_enabled():
            return self.eager(*args, **kwargs)
        self.num_calls += 1
        if not self.reason:
            self.renew(content=self._on_host)
        if self.reason:
            return self.eager(*args, **kwargs)
        if self._unchecked or self._is_due():
            return self._compare(args, kwargs)
        if self._code.calls >= _WINDOW:  # what has no graph for most calls of a window gets another
            self._code.settle()
            self._unchecked = not self._code.settled
        return self._run(args, kwargs)

    def renew(self, *, content: bool = True) -> None:
        """Take a new copy if anything that the network reads has changed since the last one was taken.

        Args:
            content: Whether to look at numbers of each tensor, too; on a GPU that waits for the device.
        """
        if not self.reason and not self._footprint.holds(content=content):
            if self._copies > _OFTEN:
                names = ", ".join(f"`{name}`" for name in self._footprint.changed()[:4])
                self._give_up(f"{names} changes again and again", f"leave it as it is, or {_OUT}")
                return
            self._start()

    def check(self) -> None:
        """Compare the next call, as the first one was."""
        self._unchecked = True

    def _start(self) -> None:
        self._footprint = Footprint(self.module)
        if _has_hooks(self.module):
            do = f"remove them for this time, or {_OUT}"
            self._give_up("it has hooks, which a copy would not call", do)
            return
        self._copies += 1
        self._unchecked, self._dtypes = True, []
        try:
            self._copy = copy.deepcopy(self.module).requires_grad_(False)
        except Exception as error:  # whatever modules hold that cannot be copied
            self._give_up(f"it cannot be copied: {' '.join(str(error).split())[:200]}", _OUT)
            return
        if self.precision == "bf16-true":
            self._copy.to(torch.bfloat16)
        if self.channels_last:
            self._copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        label = f"{self.name} frozen #{next(_SERIAL)}"
        self._code = CompiledCode(label, self._missed, backend=self.backend)

    def _is_due(self) -> bool:
        """Tell whether this call is one to compare: the second, fourth, eighth, and then now and then."""
        return is_due(self.num_calls, self.check_every_n_calls)

    def _run(self, args: Any, kwargs: Any) -> Any:
        converts = self.precision is not None or self.channels_last
        if converts:
            args, kwargs = tree_map(self._convert, (args, kwargs))
        freezing = torch._inductor.config.patch(freezing=True)
        with nullcontext() if self._code.settled else freezing:
            result = self._code(self._copy, args, kwargs)
        if not converts:
            return result
        dtypes = iter(self._dtypes)
        return tree_map(lambda value: _cast(value, next(dtypes, None)), result)

    def _compare(self, args: Any, kwargs: Any) -> Any:
        """Run the copy on copies of the inputs, then the network itself, and judge the copy."""
        self.num_checked += 1
        inputs = tree_map(_clone, (args, kwargs))
        clock = Costs(self.costs.device) if self._unchecked else self.costs  # the first compiles
        wanted, wrote, drew = observe(
            self.module, lambda: clock.timed("network", self.eager, *args, **kwargs)
        )
        if drew:
            drawn = f"its forward draws random numbers ({', '.join(drew)}), and a copy draws others"
            self._give_up(drawn, f"{_OUT}, or draw outside of its forward")
        elif wrote and self._copies >= _OFTEN:
            names = ", ".join(f"`{name}`" for name in wrote[:4])
            wrote_names = f"its forward writes {names}, which a copy would write elsewhere"
            self._give_up(wrote_names, f"{_OUT}, or write outside of its forward")
        if self.reason or wrote:  # a cache that is filled once: the next call takes a new copy
            return wanted
        try:
            with preserve_rng():
                clock.timed("look", self._footprint.holds, content=self._on_host)
                found = clock.timed("copy", self._run, *inputs)
                clock.num_pairs += 1
        except Exception as error:
            failed = f"compiling it failed: {' '.join(str(error).split())[:200]}"
            self._give_up(failed, f"{_OUT}, or mend what the compiler names")
            return wanted
        first, self._unchecked = self._unchecked, False
        if first:
            self._dtypes = [v.dtype if isinstance(v, Tensor) else None for v in tree_leaves(wanted)]
            self._code.settle()
        off = difference(found, wanted)
        self.error = off if self.error is None else max(self.error, off)
        if not off <= self.tolerance:
            far = (
                f"the frozen copy is off by {off:.2g} of the norm of its output at call {self.num_calls}, "
                f"where {self.tolerance:.2g} is tolerated"
            )
            self._give_up(far, self._advice(off))
            return wanted
        return wanted if first else found

    def _give_up(self, reason: str, advice: str) -> None:
        self.reason, self.advice = reason, advice

    def _advice(self, off: float) -> str:
        if not off <= _NOT_ROUNDING:
            return f"{_OUT}: its result hangs on something that no copy sees, such as an iterator or a file"
        shorter = "keep weights in float32 (`precision=None`), or " if self.precision else ""
        return f"{shorter}raise `tolerance` if that is near enough"

    def _missed(self, *_: Any) -> None:
        self.num_missed += 1
        self._code.misses += 1  # runs eagerly on the copy, which is as good

    def _convert(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        dtype = torch.bfloat16 if self.precision == "bf16-true" else value.dtype
        if self.channels_last and value.dim() == 4:
            return value.to(dtype, memory_format=torch.channels_last)
        return value.to(dtype)


@contextmanager
def frozen(
    model: nn.Module,
    *,
    select: Select | str | Iterable[str] | None = None,
    precision: str | None = None,
    channels_last: bool = False,
    tolerance: float | None = None,
    check_every_n_calls: int | None = 128,
    itself: bool = True,
    backend: Backend = "inductor",
) -> Iterator[list[Frozen]]:
    """Let frozen copies of the networks in `model` answer its calls without gradients.

    The model is bit-equal afterwards. Compiling happens at the first call, which runs both and compares;
    batches of other sizes run eagerly on the copy. Memory holds the weights twice meanwhile.

    Args:
        model: The network, or a module that holds networks.
        select: Which networks: the outermost chosen modules. All by default.
        precision: "bf16-true" for copies in bfloat16; outputs keep their dtypes.
        channels_last: Whether copies and their inputs of four dimensions are channels last.
        tolerance: Of `Frozen.error`; by default 1e-4, with bfloat16 weights 3e-2.
        check_every_n_calls: At how many calls both run and are compared, besides the first, second, fourth, eighth ...
            None for never but at the first of a new copy, which is part of making it.
        itself: Whether `model` may be frozen as a whole, or only parts of it.
        backend: A name known to `torch.compile`, or a backend function; only inductor freezes.

    Raises:
        NoEffect: There is nothing to compile.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    >>> with frozen(net, backend="eager") as networks, torch.no_grad():
    ...     _ = net(torch.ones(2, 4))
    >>> networks[0].error
    0.0
    """
    check_arguments(precision, channels_last, tolerance, check_every_n_calls)
    check(backend, None)
    limit = TOLERANCES[precision] if tolerance is None else tolerance
    targets = find_blocks(model, select=select, blocks=False, itself=itself)
    networks = [
        Frozen(
            module,
            name,
            precision=precision,
            channels_last=channels_last,
            tolerance=limit,
            check_every_n_calls=check_every_n_calls,
            backend=backend,
        )
        for name, module in targets.items()
    ]
    own = [vars(one.module).get("_compiled_call_impl", _ABSENT) for one in networks]
    for one in networks:
        one.module._compiled_call_impl = one
    try:
        yield networks
    finally:
        for one, before in zip(networks, own, strict=True):
            if before is _ABSENT:
                del one.module._compiled_call_impl
            else:
                one.module._compiled_call_impl = before


def check_arguments(
    precision: Any, channels_last: Any, tolerance: Any, check_every_n_calls: Any
) -> None:
    """Raise unless these can be arguments of `frozen`."""
    one_of("precision", precision, ("bf16-true",), none=True)
    flag("channels_last", channels_last)
    check_seldom(check_every_n_calls)
    finite("tolerance", tolerance, above=0.0, none=True, do="pass 1e-4")


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    return any(getattr(m, kind) for m in module.modules() for kind in kinds)


def _clone(value: Any) -> Any:
    """Copy a tensor to one of the same kind: graphs for inference tensors do not fit others."""
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(value.is_inference()):
        return value.detach().clone()


def _cast(value: Any, dtype: Any) -> Any:
    return value if dtype is None or not isinstance(value, Tensor) else value.to(dtype)
