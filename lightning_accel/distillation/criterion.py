"""What the user's own criterion takes the logits for, heard in the first step.

Shapes alone cannot say where the classes are in (B, 12, 12), whether outputs are classes, labels or numbers, or
which label belongs to which position once a user has shifted or flattened them. The user's own call of
`F.cross_entropy` can. So the first step is listened to, and of each criterion's input it is asked where its
elements come from: the gradient of the input with respect to the logits is one where an element is used, and
with the classes or the labels as factors it carries those to the logits' own positions, through any reshape,
transpose, slice, shift or selection, and (as a ratio) through any scale or log-softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from lightning_accel.distillation.forward_recorder import ForwardRecord
from lightning_accel.exact import exact

CLASSES, LABELS, NUMBERS, SOFTMAX = "classes", "labels", "numbers", "softmax"
"""One class out of several; any number of labels at once; numbers, as in a regression."""

_BASE = 16  # digits that are exact in bfloat16, with room for a division

_CRITERIA: dict[Any, str] = {
    F.cross_entropy: CLASSES,
    F.nll_loss: CLASSES,
    F.multi_margin_loss: CLASSES,
    F.binary_cross_entropy: LABELS,
    F.binary_cross_entropy_with_logits: LABELS,
    F.multilabel_soft_margin_loss: LABELS,
    F.multilabel_margin_loss: LABELS,
    F.mse_loss: NUMBERS,
    F.l1_loss: NUMBERS,
    F.smooth_l1_loss: NUMBERS,
    F.huber_loss: NUMBERS,
    F.gaussian_nll_loss: NUMBERS,
    F.poisson_nll_loss: NUMBERS,
    F.ctc_loss: SOFTMAX,  # its labels are no labels of positions, and its classes are last
    F.softmax: SOFTMAX,
    F.log_softmax: SOFTMAX,
    torch.softmax: SOFTMAX,
    torch.log_softmax: SOFTMAX,
    torch.logsumexp: SOFTMAX,
    Tensor.softmax: SOFTMAX,
    Tensor.log_softmax: SOFTMAX,
    Tensor.logsumexp: SOFTMAX,
}


_LOGS = {F.log_softmax, torch.log_softmax, Tensor.log_softmax}


class Heard(NamedTuple):
    """One call of a criterion: what it was called for, on what, and which dimension holds classes."""

    kind: str
    input: Tensor
    target: Tensor | None
    dim: int
    ignored: int | None
    summed: bool = False
    """Whether it gives the sum over the positions."""
    logs: bool = False
    """Whether it gives log-probabilities, of which a cross entropy by hand takes a sum."""
    result: Tensor | None = None

    @property
    def judges(self) -> bool:
        """Whether what it gives is a loss with a gradient, or what one is made of, and not the softmax before."""
        result = self.result
        if result is None or result.grad_fn is None:
            return False
        return self.logs or self.kind != SOFTMAX or result.shape != self.input.shape

    @classmethod
    def of(cls, kind: str, function: Any, given: dict[str, Any]) -> Heard | None:
        """Read a call; `None` where its input is no tensor."""
        source, target = given.get("input"), given.get("target")
        if not isinstance(source, Tensor) or not source.dim():
            return None
        dim = given.get("dim")
        if kind == CLASSES:
            dim = 1 if source.dim() > 1 else 0
        ignored = given.get("ignore_index", -100) if kind == CLASSES else None
        target = target if isinstance(target, Tensor) and kind != SOFTMAX else None
        summed = given.get("reduction") == "sum"
        dim = dim if isinstance(dim, int) else -1
        return cls(kind, source, target, dim, ignored, summed, function in _LOGS)


class Listener(TorchFunctionMode):
    """Keep the calls of torch's criteria within a block.

    Args:
        called: Tells whether the student has answered; a softmax before that is its own affair.

    >>> with Listener() as heard:
    ...     _ = torch.nn.CrossEntropyLoss(ignore_index=0)(torch.ones(2, 3), torch.tensor([0, 1]))
    >>> [(call.kind, call.dim, call.ignored) for call in heard.calls]
    [('classes', 1, 0)]
    """

    def __init__(self, called: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self.calls: list[Heard] = []
        self.passed: list[Tensor] = []
        """What `Tensor.backward` was called of, by the user's own code or by `manual_backward`."""
        self._called = called

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Hear nothing meanwhile; code that is compiled within would be compiled for a listener, and then again."""
        if (
            _get_current_function_mode() is not self
        ):  # there is one of the user's above, which cannot be taken off
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            self.passed.append(args[0])
        kind = _CRITERIA.get(func) if _hashable(func) else None
        if kind is not None and (kind != SOFTMAX or self._called()):
            heard = Heard.of(kind, func, _by_name(func, args, kwargs))
            result = func(*args, **kwargs)
            if heard is not None:
                known = result if isinstance(result, Tensor) else None
                self.calls.append(heard._replace(result=known))
            return result
        return func(*args, **kwargs)


class Hearing(NamedTuple):
    """What was heard around one call of the student, and the loss that hangs on it where that is known."""

    record: ForwardRecord
    calls: Sequence[Heard]
    task: Tensor | None = None


class Usage(NamedTuple):
    """What the criteria of a step take the logits for."""

    kinds: frozenset[str] = frozenset()
    class_dim: int | None = None
    """Of the logits; `None` where no criterion of classes says."""
    classes: int | None = None
    """How many of that dimension's entries the criterion takes for classes."""
    soft: bool = True
    """Whether the targets of criteria of labels and numbers are distributions, as of one class out of several."""
    others: tuple[Tensor, ...] = ()
    """Those targets."""
    beside: bool = False
    """Whether the user's loss hangs on entries of that dimension that are no classes."""
    labels: Tensor | None = None
    """At the logits' positions (B, ...), what they are compared with there."""
    counted: Tensor | None = None
    """At which positions they are."""
    ignored: int | None = None
    """The label that the criterion leaves out."""
    origin: int | None = None
    """Where the storage of the labels lies."""
    rest: str | None = None
    """What the part of the loss that no criterion was heard for takes the logits for; see `asked.takes`."""

    @property
    def says_something(self) -> bool:
        """Whether any criterion was found to hang on the logits."""
        return bool(self.kinds) or self.class_dim is not None


def usage(calls: Sequence[Heard], logits: Tensor | None, task: Tensor | None = None) -> Usage:
    """Return what the criteria that hang on the logits take them for.

    Args:
        calls: What was heard.
        logits: As the network gave them, on their graph.
        task: The user's loss.

    >>> logits = torch.randn(2, 5, 4, requires_grad=True) * 1.0
    >>> with Listener() as heard:
    ...     _ = F.cross_entropy(logits.flatten(0, 1), torch.zeros(10, dtype=torch.long))
    >>> found = usage(heard.calls, logits)
    >>> found.kinds, found.class_dim, found.classes, found.labels.shape
    (frozenset({'classes'}), 2, 4, torch.Size([2, 5]))
    """
    if logits is None or not logits.requires_grad:
        return Usage()
    pulls = [pull for call in calls if (pull := Pull.of(call, logits)) is not None]
    kinds = frozenset(pull.call.kind for pull in pulls) - {SOFTMAX}
    others = [pull.call for pull in pulls if pull.call.kind in (LABELS, NUMBERS)]
    soft = all(map(_is_soft, others))
    targets = tuple(call.target for call in others if call.target is not None)
    for pull in sorted(pulls, key=lambda pull: pull.call.kind == SOFTMAX):
        if pull.call.kind in (CLASSES, SOFTMAX) and (dim := pull.class_dim()) is not None:
            classes = pull.call.input.shape[pull.call.dim]
            beside = classes < logits.shape[dim] and pull.is_part_of(task, dim)
            target = pull.call.target
            origin = None if target is None else place_of(target)
            heard = (*pull.labels(dim), pull.call.ignored, origin)
            return Usage(kinds, dim, classes, soft, targets, beside, *heard)
    return Usage(kinds, soft=soft, others=targets)


def place_of(tensor: Tensor) -> int | None:
    """Return where its storage lies, by which views know each other; XLA does not tell.

    >>> both = torch.zeros(2, 3)
    >>> place_of(both) == place_of(both[1])
    True
    """
    return None if tensor.device.type == "xla" else tensor.untyped_storage().data_ptr()


class Pull:
    """Carries factors on a criterion's input back to where its elements are in the logits."""

    def __init__(self, call: Heard, logits: Tensor) -> None:
        self.call, self.logits = call, logits

    @classmethod
    def of(cls, call: Heard, logits: Tensor) -> Pull | None:
        """Return one, or `None` where the input does not hang on the logits."""
        made = cls(call, logits)
        return None if made(torch.ones((), device=call.input.device)) is None else made

    def __call__(self, factors: Tensor) -> Tensor | None:
        """Return for each logit the sum of the factors of what it went into."""
        source = self.call.input
        if source is self.logits:
            return factors.to(source.dtype).expand_as(source)
        if not source.requires_grad:
            return None
        given = factors.to(source.dtype).expand_as(source)
        try:
            found = torch.autograd.grad(
                source, self.logits, given, retain_graph=True, allow_unused=True
            )[0]
        except RuntimeError:  # the user has let go of the graph
            return None
        return None if found is None else found.detach()

    def class_dim(self) -> int | None:
        """Return the dimension of the logits along which the first and the last class lie apart."""
        count = self.call.input.shape[self.call.dim]
        ends = [self(self._of_class(index)) for index in (0, count - 1)]
        found = []
        for dim in range(1, self.logits.dim()):
            first, last = (_only_index(end, dim) for end in ends)
            if first is not None and last is not None and last - first == count - 1 > 0:
                found.append(dim)
        return found[0] if len(found) == 1 else None

    def labels(self, dim: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the criterion's labels at the logits' positions, and which of these count there.

        Labels are carried digit by digit, as ratios to what came of the same factors without them; where
        those are no whole numbers, as after an interpolation, there are none.
        """
        source, target, at = self.call.input, self.call.target, self.call.dim
        alone = torch.Size([*source.shape[:at], *source.shape[at + 1 :]])
        if target is None or target.is_floating_point() or target.shape != alone:
            return None, None
        shape = [1] * source.dim()
        shape[at] = source.shape[at]
        ramp = torch.arange(1, shape[at] + 1, device=source.device).view(shape) / shape[at]
        base = self(ramp)
        assert base is not None
        strongest = base.abs().argmax(dim, keepdim=True)
        base = exact(base.gather(dim, strongest))
        used = base != 0
        lowest = target.min()
        rest, place, labels = target - lowest, 1, torch.zeros_like(base)
        while place == 1 or bool(rest.any()):
            carried = self(ramp * (rest % _BASE).unsqueeze(at))
            assert carried is not None
            digits = exact(carried.gather(dim, strongest)) / base.where(used, base.new_ones(()))
            if bool(((digits - digits.round()).abs() > 0.2).any()):
                return None, None
            labels += place * digits.round()
            rest, place = rest // _BASE, place * _BASE
        found = (labels.long().to(lowest.device) + lowest).squeeze(dim)
        used = used.squeeze(dim).to(found.device)
        return found, used & (found != self.call.ignored)

    def is_part_of(self, task: Tensor | None, dim: int) -> bool:
        """Tell whether a loss hangs on what lies beside the input's classes along a dimension."""
        own = self(torch.ones((), device=self.call.input.device))
        if task is None or own is None or not task.requires_grad:
            return False
        found = torch.autograd.grad(task, self.logits, retain_graph=True, allow_unused=True)[0]
        others = [d for d in range(self.logits.dim()) if d != dim]
        return found is not None and bool(((own == 0).all(others) & (found != 0).any(others)).any())

    def _of_class(self, index: int) -> Tensor:
        """Return one at a class and zero elsewhere, in a shape that expands to the input's."""
        source, dim = self.call.input, self.call.dim
        shape = [1] * source.dim()
        shape[dim] = source.shape[dim]
        return F.one_hot(torch.tensor(index), source.shape[dim]).view(shape).to(source.device)


def _is_soft(call: Heard) -> bool:
    target = call.target
    if target is None or target.dim() < 2 or target.shape != call.input.shape:
        return False
    return any(target.shape[dim] > 1 and are_distributions(target, dim) for dim in (1, -1))


def are_distributions(values: Tensor, dim: int = -1) -> bool:
    """Tell whether numbers are at least zero and sum to one along a dimension.

    >>> are_distributions(torch.tensor([[0.1, 0.9]])), are_distributions(torch.tensor([[1.0, 1.0]]))
    (True, False)
    """
    values = values.float()  # to three digits, as distributions may come in half precision
    return bool((values >= 0).all() and ((values.sum(dim) - 1).abs() < 4e-3).all())


def _only_index(found: Tensor | None, dim: int) -> int | None:
    """Return the one index along a dimension at which anything is above zero."""
    if found is None:
        return None
    others = [d for d in range(found.dim()) if d != dim]
    places = (found > 0).sum(others).nonzero().flatten().tolist()
    return places[0] if len(places) == 1 else None


_NAMES = ("input", "target")


def _by_name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that matter by name; `self` of a method is its input."""
    if _CRITERIA[function] == SOFTMAX and function is not F.ctc_loss:
        names: tuple[str, ...] = ("input", "dim")
    elif function in (F.cross_entropy, F.nll_loss):
        names = (*_NAMES, "weight", "size_average", "ignore_index")
    else:
        names = _NAMES
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if "log_probs" in given:
        given["input"] = given["log_probs"]
    return given


def _hashable(function: Any) -> bool:
    return type(function).__hash__ is not None
