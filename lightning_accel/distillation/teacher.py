"""A trained network that another one learns from: hidden from training, always in eval mode.

A teacher is no module of the student and no attribute that Lightning sees, so that it is in no optimizer,
state dict, weight average, DDP or FSDP wrapper. It runs under `no_grad`, in eval mode before every
call (users, Lightning and `module.train()` flip it), in a precision of its own, on the arguments that
the student received, once for each call that teaches; looks beside leave no trace. Batch-norm statistics and all other buffers are proved unchanged.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel import hardware
from lightning_accel.arguments import finite, flag, instance, one_of, path, whole
from lightning_accel.distillation.forward_recorder import ForwardRecord, ForwardRecorder
from lightning_accel.distillation.teacher_errors import misfit
from lightning_accel.errors import AccelError, explain, weights_alone
from lightning_accel.surgery.call import tensors
from lightning_accel.surgery.digest import digest
from lightning_accel.surgery.footprint import Footprint, observe
from lightning_accel.surgery.moment import Moments
from lightning_accel.surgery.preserve import preserve_rng

SELF, EMA = "self", "ema"
TeacherPrecision = Literal["auto", "bf16-true", "32-true", "same"]
PRECISIONS = get_args(TeacherPrecision)
_OF_A_BINDING = ("_run", "_tape", "_footprint", "_as_it_stands")
_CAST_ONCE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Source = nn.Module | str | Path


class Teacher:
    """A teacher and how it runs; each process of a DDP or FSDP fit holds all of it.

    Args:
        source: A module, the path of a checkpoint, "self" (the un-pruned network) or "ema" (a moving
            average of the student).
        checkpoint: With a module, weights to load into it: a Lightning checkpoint or a state dict.
        weight: Its share among several teachers, relative to theirs.
        precision: "auto" is bfloat16 where that is fast and else float32; "bf16-true"; "32-true"; "same" is that
            of the student.
        compile: Whether to run it through `torch.compile`.
        classes: For each class of the student, the teacher's index of it, where the orders differ.

    Raises:
        TypeError: `source` is nothing of these.
        ValueError: An argument is out of range.

    >>> teacher = Teacher(nn.Linear(2, 3), classes=[2, 1, 0], precision="32-true")
    >>> teacher.bind(teacher.network)(((torch.ones(1, 2),), {})).output.shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        source: Source,
        *,
        checkpoint: str | Path | None = None,
        weight: float = 1.0,
        precision: TeacherPrecision = "auto",
        compile: bool = False,
        classes: Sequence[int] | None = None,
    ) -> None:
        what = "a module, a path, 'self' or 'ema'"
        do = "pass the trained network, or the path of its checkpoint"
        instance("teacher", source, (nn.Module, str, Path), what, do)
        one_of("precision", precision, PRECISIONS)
        finite("weight", weight, above=0.0)
        if checkpoint is not None and not isinstance(source, nn.Module):
            raise ValueError(
                explain(
                    "`checkpoint` goes with a module",
                    f"the source {source!r}",
                    "pass the path as the source, or a module with it",
                )
            )
        if isinstance(source, (str, Path)):
            path("teacher", source)
        self.source = source
        self.checkpoint = path("checkpoint", checkpoint, none=True)
        self.weight = weight
        self.precision: str = precision
        self.compile = flag("compile", compile)
        self.classes = None if classes is None else _classes(classes)
        self.network: nn.Module = source if isinstance(source, nn.Module) else _Missing()
        """All of it, as it was given; a part of it may be what is bound."""
        self.bound: nn.Module = self.network
        self.device = torch.device("cpu")
        self._run: Any = None
        self._tape: ForwardRecorder | None = None
        self._versions: dict[str, int] = {}
        self._footprint: Footprint | None = None
        """What it reads in eval mode; and beside it the same in the mode that it is left in between calls."""
        self._as_it_stands: Footprint | None = None
        self._knew: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_run": None,
            "_tape": None,
            "_footprint": None,
        }  # a copy is not bound

    @property
    def has_network(self) -> bool:
        """Whether there is a network yet; "self" has none before the first prune."""
        return type(self.network) is not _Missing

    @property
    def kind(self) -> str:
        """What the source is: "module", "path", "self" or "ema"."""
        if isinstance(self.source, nn.Module):
            return "module"
        return str(self.source) if self.source in (SELF, EMA) else "path"

    def bind(
        self,
        network: nn.Module,
        *,
        taps: Sequence[str] = (),
        device: torch.device | str = "cpu",
        precision: str | None = None,
    ) -> Teacher:
        """Make ready to run: `network` on `device`, with layers tapped; what was bound is let go.

        In bfloat16 the large weights are cast once, in a copy; the user's module keeps its own.
        """
        self.release()
        self.precision = precision or self.precision
        self.device = torch.device(device)
        if self._is_bf16() and self.kind != EMA and _can_cast(network):
            network = _cast(copy.deepcopy(network))
        self.bound = network.to(self.device)
        self._tape = ForwardRecorder(network, taps, role="the teacher")
        self._run = torch.compile(network) if self.compile else network
        self._versions = self._buffer_versions()
        return self

    def __call__(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> ForwardRecord:
        """Run on the arguments of a student's call."""
        assert self._tape is not None, "bind the teacher first"
        args, kwargs = self._as_own(call)
        before = [(t, t._version) for t in tensors(call) if not t.is_inference()]
        with in_eval_mode(self.bound), torch.no_grad(), self._context(), self._tape.recording():
            try:
                self._run(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise _cannot_take(self.bound, call, error) from error
        if any(tensor._version != version for tensor, version in before):
            raise AccelError(
                "the teacher changed its arguments in place, and they are the student's as well",
                f"{type(self.bound).__name__}",
                "give it a forward without operations such as `mul_` or `ReLU(inplace=True)` on its inputs",
            )
        record = self._tape.records()[-1]
        self._tape.clear()
        return record

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave generators, counters and buffers as they were after calls that are no lesson."""
        moment = Moments(self.bound).take()
        try:
            with preserve_rng():
                yield
        finally:
            moment.put_back()

    def load_weights(self) -> None:
        """Load `checkpoint` into the module that was passed: a Lightning checkpoint or a state dict."""
        assert isinstance(self.source, nn.Module) and self.checkpoint is not None
        with weights_alone(self.checkpoint):
            stored = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        pruned = "lightning_accel" in stored  # what `bridge.restore` writes
        stored = stored.get("state_dict", stored)
        try:
            self.source.load_state_dict(stored)
        except RuntimeError as error:
            found, do = misfit(self.source, stored)
            raise AccelError(
                f"the checkpoint does not fit the teacher {type(self.source).__name__}",
                f"{self.checkpoint}: {found or error}",
                "it holds a pruned network: pass what `lightning_accel.load_from_checkpoint` makes of it, "
                "without `checkpoint=`"
                if pruned
                else do,
            ) from error

    def check_buffers(self) -> None:
        """Raise when a call has changed a buffer, such as batch-norm statistics."""
        now = self._buffer_versions()
        changed = [name for name, version in self._versions.items() if now.get(name) != version]
        if changed and self.kind != EMA:
            raise AccelError(
                "the teacher changed while it was teaching",
                f"its buffer `{changed[0]}`, in eval mode",
                "make its forward leave buffers alone in eval mode",
            )

    def forget(self) -> None:
        """Let go of the network, for another to come."""
        self.release()
        self.network = _Missing()

    def release(self) -> None:
        """Take the hooks off, and let go of the bound network."""
        if self._tape is not None:
            self._tape.remove()
        vars(self).update(dict.fromkeys(_OF_A_BINDING))

    def resolved(self, device: torch.device | str) -> str:
        """Return the precision that "auto" is on a device.

        >>> Teacher(nn.Linear(1, 1), precision="32-true").resolved("cpu")
        '32-true'
        """
        if self.precision != "auto":
            return self.precision
        if any(p.dtype == torch.float64 for p in self.network.parameters()):
            return "32-true"  # whose weights stay, as its student's do
        return "bf16-true" if hardware.describe(device).is_fast(torch.bfloat16) else "32-true"

    def fingerprint(self) -> str:
        """Return a digest of everything that its outputs depend on, down to single bits; see `surgery.digest`.

        Raises:
            AccelError: Something that its forward may read has no content that can be told.

        >>> one, two = Teacher(nn.Linear(2, 2)), Teacher(nn.Linear(2, 2))
        >>> one.fingerprint() == two.fingerprint(), one.fingerprint() == one.fingerprint()
        (False, True)
        """
        settings = self.precision, self.classes, self.weight, self.compile, self.device.type
        with in_eval_mode(self.bound):
            self._knew = self._world()
            text = repr((settings, self._knew, digest(self.bound)))
            self._footprint = Footprint(self.bound)
        return hashlib.sha256(text.encode()).hexdigest()

    def has_changed(self) -> bool:
        """Tell whether anything that its outputs depend on is other than at the last `fingerprint`."""
        if self._footprint is None:
            return False
        here = self.device.type == "cpu"  # on a GPU, versions alone are read: no waiting
        same = self._as_it_stands is not None and self._as_it_stands.holds(content=here)
        if not same:  # perhaps somebody only switched its mode
            with in_eval_mode(self.bound):
                same = self._footprint.holds(content=here)
            self._as_it_stands = Footprint(self.bound)
        return not same or self._knew != self._world()

    def moves(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> str | None:
        """Return what a call does besides answering, if anything: such a teacher may answer differently next time."""
        with self.aside(), in_eval_mode(self.bound):
            found = observe(self.bound, lambda: self(call))
        if found.drew:
            return f"draws random numbers in eval mode, from {', '.join(found.drew)}"
        return (
            f"changes itself as it answers: `{'`, `'.join(found.wrote[:3])}`"
            if found.wrote
            else None
        )

    @property
    def is_short(self) -> bool:
        """Whether it computes in 16 bits."""
        short = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.bound.parameters())
        return short or self._is_bf16() or self.precision == "same"

    def _world(self) -> tuple[Any, ...]:
        """Return what its outputs depend on outside of it."""
        autocast: tuple[Any, ...] = ()
        if self.precision == "same" and torch.amp.is_autocast_available(self.device.type):
            kind = self.device.type
            autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return torch.get_float32_matmul_precision(), torch.get_default_dtype(), *autocast

    def _is_bf16(self) -> bool:
        return self.precision == "bf16-true" or (
            self.precision == "auto" and self.resolved(self.device) == "bf16-true"
        )

    def _context(self) -> AbstractContextManager[Any]:
        if self.precision == "same":
            return nullcontext()
        if not torch.amp.is_autocast_available(self.device.type):
            return nullcontext()
        if not self._is_bf16():
            return torch.autocast(self.device.type, enabled=False)
        # Another dtype than the student's may be in the cache that autocast keeps.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def _as_own(self, call: tuple[Any, Any]) -> tuple[Any, Any]:
        """Convert floating point arguments to the format of the teacher."""
        if self.precision == "same" and torch.is_autocast_enabled(self.device.type):
            return call
        floating = (p.dtype for p in self.bound.parameters() if p.is_floating_point())
        # Autocast takes any short format, but leaves 64 bits alone.
        own = torch.float32 if self._is_bf16() else next(floating, None)
        leave = (torch.float16, torch.bfloat16) if self._is_bf16() else ()

        def convert(value: Any) -> Any:
            wanted = isinstance(value, Tensor) and value.is_floating_point() and own is not None
            return value.to(own) if wanted and value.dtype not in leave else value

        args, kwargs = tree_map(convert, call)
        return args, kwargs

    def _buffer_versions(self) -> dict[str, int]:
        return {n: b._version for n, b in self.bound.named_buffers() if not b.is_inference()}


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Switch to eval mode, and give each module its own mode back.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with in_eval_mode(net):
    ...     net[0].training
    False
    >>> net[0].training, net[1].training
    (True, False)
    """
    training = [module for module in network.modules() if module.training]
    if training:
        network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def read_teachers(teacher: Source | Teacher | Sequence[Source | Teacher]) -> list[Teacher]:
    """Read one teacher or a list of them.

    >>> [one.kind for one in read_teachers(["last.ckpt", Teacher("ema")])]
    ['path', 'ema']
    """
    listed: list[Any] = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if any(item is None for item in listed):
        raise ValueError(
            explain(
                "there is no teacher",
                "`teacher=None`; in a configuration, no `teacher.ckpt_path`",
                "pass a trained network or the path of its checkpoint (in an app: "
                "callbacks.distillation.teacher=path.ckpt), 'self' or 'ema'",
            )
        )
    if not listed:
        raise ValueError(
            explain("there is no teacher", repr(teacher), "pass a trained network, or 'self'")
        )
    return [item if isinstance(item, Teacher) else Teacher(item) for item in listed]


def _cannot_take(network: nn.Module, call: Any, error: Exception) -> AccelError:
    got = ", ".join(f"{str(t.dtype)[6:]} {tuple(t.shape)}" for t in tensors(call)[:4])
    told = (str(error).splitlines() or [""])[0]
    return AccelError(
        f"the teacher {type(network).__name__} cannot take what the student was called with",
        f"{type(error).__name__}: {told}, for {got or 'no tensors'}",
        "use a teacher of the same inputs: arguments, sizes, and at least the student's vocabulary; or wrap it in a "
        "module that converts them",
    )


def _classes(classes: Any) -> tuple[int, ...]:
    listed = tuple(classes) if isinstance(classes, (list, tuple, range)) else ()
    if not listed:
        raise TypeError(
            explain("`classes` lists the teacher's indices", repr(classes), "pass [2, 0, 1], say")
        )
    return tuple(whole("classes", index, least=0) for index in listed)


class _Missing(nn.Module):
    """Stands for a network that is not there yet."""


def shares_parameters(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two networks hold a parameter in common.

    >>> net = nn.Linear(1, 1)
    >>> shares_parameters(net, nn.Sequential(net)), shares_parameters(net, nn.Linear(1, 1))
    (True, False)
    """
    held = {id(p) for p in one.parameters()}
    return any(id(p) in held for p in other.parameters())


def _can_cast(network: nn.Module) -> bool:
    return any(
        isinstance(m, _CAST_ONCE) and (w := m._parameters.get("weight")) is not None
        and w.dtype == torch.float32
        for m in network.modules()
    )  # fmt: skip


def _cast(network: nn.Module) -> nn.Module:
    """Cast the weights that autocast would cast at every call anyway."""
    for module in network.modules():
        if isinstance(module, _CAST_ONCE):
            weight = module._parameters.get("weight")
            if weight is not None and weight.dtype == torch.float32:
                weight.data = weight.data.bfloat16()
    return network
