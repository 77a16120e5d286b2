"""Which channels hang together, by torch-pruning's autograd trace, and what removing them cuts.

torch-pruning finds the coupled layers and knows how each layer type is sliced. Its pruners are run on
*index probes* only: shallow clones of the layers whose tensors hold their own flat positions. What is
left in a probe says element by element what stays (checked element by element in the tests),
for any layer type that torch-pruning or the user knows, buffers included; so the network itself is
never touched by it, and its traps (eval mode, flags, lost ties, living graphs) cannot reach it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.pruning.importance import score
from lightning_accel.surgery import Change, Cut, Kept, Select, Structure
from lightning_accel.surgery.call import Call, run

ROOTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)


class Group(NamedTuple):
    """Channels that can only go together: `root` is a layer, `layers` all whose outputs shrink."""

    root: str
    layers: tuple[str, ...]
    items: Any
    blocks: int
    scores: Tensor


class Graph:
    """The prunable groups of one network.

    Args:
        model: A twin; it is put into eval mode and must not be used for anything else.
        calls: Example calls, small ones; the channels are found by tracing them.
        select: Every layer whose outputs shrink must be among these.
        importance: See `importance.KNOWN`.
        frozen: Names of parameters that must not be touched.

    Raises:
        AccelError: The calls fail, or their outputs do not depend on the parameters.
        NoEffect: There is no group at all.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        *,
        select: Select,
        importance: str,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.model = model.eval()
        self.names = {module: name for name, module in model.named_modules()}
        self.frozen = frozen
        self.skipped: list[Change] = []
        self._dependencies, outputs = _trace(model, calls, self.names)
        self.groups = list(self._find(select, importance, outputs))
        self.skipped += [
            Change(name, "it never ran on the example")
            for module, name in self.names.items()
            if isinstance(module, ROOTS) and module not in self._dependencies.module2node
        ]
        if not self.groups:
            reasons = "; ".join(f"{c.name}: {c.what}" for c in self.skipped[:4])
            raise NoEffect(
                "no layer can be pruned",
                reasons or f"no convolution or linear layer in {type(model).__name__}",
                "widen `select`, or unfreeze the layers to prune",
            )

    def cut(
        self, ratio: float, *, round_to: int | None, groups: Sequence[Group] | None = None
    ) -> Cut:
        """Return the cut that removes this share of the channels of each group."""
        from lightning_accel.pruning.selection import least

        probes = _Probes(self.model, self.names)
        for group in self.groups if groups is None else groups:
            gone = least(group.scores, ratio=ratio, blocks=group.blocks, round_to=round_to)
            if gone:
                root = group.items[0].dep
                part = self._dependencies.get_pruning_group(root.target.module, root.handler, gone)
                probes.prune(part, self._dependencies)
        return probes.cut()

    def _find(
        self, select: Select, importance: str, outputs: set[nn.Module]
    ) -> Iterator[Group]:
        chosen = set(select.require(self.model))
        seen: set[nn.Module] = set()
        for module in list(self._dependencies.module2node):
            if module in seen or not isinstance(module, ROOTS) or module not in self.names:
                continue
            try:
                items, shrinking = self._group_of(module)
                seen |= shrinking
                reason = self._refusal(shrinking, items, chosen, outputs)
                if not reason:
                    layers = tuple(self.names[m] for m in self.names if m in shrinking)
                    scores = score(items, importance)
                    yield Group(self.names[module], layers, items, _blocks(items), scores)
                    continue
            except (IndexError, KeyError, TypeError, ValueError, AssertionError, RuntimeError) as e:
                reason = f"torch-pruning cannot handle it ({type(e).__name__}: {e})"
            if reason != _UNSELECTED:
                self.skipped.append(Change(self.names[module], reason))

    def _group_of(self, module: nn.Module) -> tuple[Any, set[nn.Module]]:
        pruner = self._dependencies.get_pruner_of_module(module)
        width = pruner.get_out_channels(module)
        items = self._dependencies.get_pruning_group(
            module, pruner.prune_out_channels, list(range(width))
        )
        shrinking = {
            dep.target.module
            for dep, _ in items
            if self._dependencies.is_out_channel_pruning_fn(dep.handler)
            and isinstance(dep.target.module, ROOTS)
        }
        return items, shrinking | {module}

    def _refusal(
        self, shrinking: set[nn.Module], items: Any, chosen: set[str], outputs: set[nn.Module]
    ) -> str:
        if shrinking & outputs:
            return "it makes the network's output"
        if not any(self.names[m] in chosen for m in shrinking):
            return _UNSELECTED
        for module in shrinking:
            if self.names[module] not in chosen:
                return f"it hangs together with `{self.names[module]}`, which is not selected"
        for dep, _ in items:
            module = dep.target.module
            if module in self.names:
                for leaf, _ in module.named_parameters():
                    name = f"{self.names[module]}.{leaf}".lstrip(".")
                    if name in self.frozen:
                        return f"`{name}` is frozen"
            elif isinstance(module, nn.Parameter):
                if self._dependencies._param_to_name.get(module) in self.frozen:
                    return f"`{self._dependencies._param_to_name[module]}` is frozen"
        return ""


_UNSELECTED = "it is not selected"


class _Probes:
    """Clones of layers whose tensors hold flat positions, pruned in place of the layers."""

    def __init__(self, model: nn.Module, names: dict[nn.Module, str]) -> None:
        self.model = model
        self.names = names
        self.clones: dict[nn.Module, nn.Module] = {}
        self.parameters: dict[str, nn.Parameter] = {}

    def prune(self, items: Any, dependencies: Any) -> None:
        for dep, positions in items:
            target, handler = dep.target.module, dep.handler
            if dep.target.pruning_dim is not None:
                handler.__self__.pruning_dim = dep.target.pruning_dim
            if isinstance(target, nn.Parameter):
                name = dependencies._param_to_name[target]
                probe = self.parameters.get(name, nn.Parameter(_positions(target)))
                self.parameters[name] = handler(probe, list(positions))
            elif target in self.names:
                self.clones.setdefault(target, _clone(target))
                handler(self.clones[target], list(positions))

    def cut(self) -> Cut:
        """Read what is left in the probes.

        Raises:
            ValueError: A tied tensor would come apart, or a buffer outside checkpoints would change.
        """
        left: dict[str, Tensor] = {n: p.detach().long() for n, p in self.parameters.items()}
        attributes: dict[str, dict[str, Any]] = {}
        for module, clone in self.clones.items():
            prefix = f"{self.names[module]}." if self.names[module] else ""
            for name, tensor in [*clone.named_parameters(), *clone.named_buffers()]:
                left[prefix + name] = tensor.detach().long()
            before = Structure.of(module).attributes
            for name, sizes in Structure.of(clone).attributes.items():
                changed = {k: v for k, v in sizes.items() if before[name].get(k) != v}
                if changed:
                    attributes[(prefix + name).rstrip(".")] = changed
        for name in self.parameters:
            path, _, leaf = name.rpartition(".")
            owner, shape = self.model.get_submodule(path), tuple(left[name].shape)
            if leaf == "weight" and getattr(owner, "normalized_shape", None) is not None:
                attributes.setdefault(path, {})["normalized_shape"] = shape  # nn.RMSNorm
        kept = {
            name: Kept.from_flat(flat, tuple(original.shape))
            for name, flat in left.items()
            if (original := _tensor(self.model, name)).dim() and original.shape != flat.shape
        }
        self._refuse_torn_ties(kept)
        before = Structure(
            {name: tuple(_tensor(self.model, name).shape) for name in kept},
            {name: {k: 0 for k in sizes} for name, sizes in attributes.items()},
        )
        return Cut(kept, before.now(self.model), attributes)

    def _refuse_torn_ties(self, kept: dict[str, Kept]) -> None:
        persistent = set(self.model.state_dict(keep_vars=True))
        holders: dict[int, list[str]] = {}
        for module, prefix in self.names.items():
            for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    holders.setdefault(id(tensor), []).append(f"{prefix}.{leaf}".lstrip("."))
        for names in holders.values():
            if any(name in kept for name in names):
                first, *others = [_comparable(kept.get(name)) for name in names]
                if any(other != first for other in others):
                    raise ValueError(f"tied weights would come apart: {' and '.join(names)}")
                if not any(name in persistent for name in names):
                    raise ValueError(f"`{names[0]}` is a buffer that checkpoints do not hold")


def _trace(
    model: nn.Module, calls: Sequence[Call], names: dict[nn.Module, str]
) -> tuple[Any, set[nn.Module]]:
    """Build torch-pruning's graph; return it with the layers that make the network's outputs."""
    from torch_pruning import DependencyGraph

    produced: dict[Any, nn.Module] = {}
    outputs: set[nn.Module] = set()

    def forward(traced: nn.Module, _: Any) -> list[Tensor]:
        with _located(traced, names), _GradientWatch() as watch, _recorded(traced, produced):
            results = tree_leaves(run(traced, calls))
        usable = [t for t in results if isinstance(t, Tensor) and t.grad_fn is not None]
        if not usable:
            raise AccelError(
                "the network cannot be traced: its outputs do not depend on its parameters",
                f"the gradient ends at `{watch.lost_at or 'torch.no_grad'}`",
                "return differentiable outputs, or choose the part before it by `example` and model",
            )
        outputs.update(m for t in usable if (m := produced.get(t.grad_fn)) is not None)
        return usable

    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    dependencies = DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        dependencies.build_dependency(model, None, forward_fn=forward, verbose=False)
    return dependencies, outputs


@contextmanager
def _recorded(model: nn.Module, produced: dict[Any, nn.Module]) -> Iterator[None]:
    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            produced[output.grad_fn] = module

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, ROOTS)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _located(model: nn.Module, names: dict[nn.Module, str]) -> Iterator[None]:
    """Name the module in which a forward fails."""
    with where(model, names) as stack:
        try:
            yield
        except AccelError:
            raise
        except Exception as error:
            place = stack[-1] if stack else ""
            raise AccelError(
                "the network cannot be traced: its forward fails on the example",
                f"{type(error).__name__} in `{place or type(model).__name__}`: {error}",
                "pass an `example` that the network accepts",
            ) from error


@contextmanager
def where(model: nn.Module, names: dict[nn.Module, str]) -> Iterator[list[str]]:
    """Give the list of modules now running, innermost last; after an error, where it happened."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for module, name in names.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _GradientWatch(TorchFunctionMode):
    """Remembers the last operation that took tensors with gradient and gave none."""

    lost_at = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if not name.startswith("__") and _any_gradient((args, kwargs)):
            tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if tensors and not _any_gradient(result):
                self.lost_at = name
        return result


def _any_gradient(values: Any) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(values))


def _blocks(items: Any) -> int:
    sizes = [1]
    for dep, _ in items:
        module = dep.target.module
        groups = getattr(module, "groups", 1) if isinstance(module, ROOTS[:-1]) else 1
        if groups > 1 and groups != module.out_channels:
            sizes.append(groups)
        if isinstance(module, nn.GroupNorm):
            sizes.append(module.num_groups)
    blocks = math.lcm(*sizes)
    if len(items[0].idxs) % blocks:
        raise ValueError(f"its {len(items[0].idxs)} channels do not fall into {blocks} equal blocks")
    return blocks


def _clone(module: nn.Module) -> nn.Module:
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__ = dict(vars(module))
    clone._parameters = {
        k: None if p is None else nn.Parameter(_positions(p)) for k, p in module._parameters.items()
    }
    clone._buffers = {
        k: b if b is None or not b.dim() else _positions(b) for k, b in module._buffers.items()
    }
    clone._modules = {k: None if c is None else _clone(c) for k, c in module._modules.items()}
    return clone


def _positions(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    held = owner._parameters.get(leaf)
    tensor = held if held is not None else owner._buffers[leaf]
    assert tensor is not None
    return tensor


def _comparable(kept: Kept | None) -> Any:
    if kept is None:
        return None
    flat = None if kept.flat is None else kept.flat.tolist()
    return [None if d is None else d.tolist() for d in kept.dims], flat
