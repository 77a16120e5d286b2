"""What a removal leaves of each tensor, found out on clones that hold positions instead of weights.

torch-pruning knows how each layer type is sliced. Its pruners run here on shallow clones of the layers
whose tensors hold their own flat positions: what is left in a clone says element by element what
stays, for any layer type that torch-pruning or the user knows, buffers included. The network itself
is never touched by it, so its traps (eval mode, flags, lost ties, living graphs) cannot reach it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.surgery import Cut, Kept, Structure


class Probes:
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
            dense = Structure.of(module).attributes
            for name, sizes in Structure.of(clone).attributes.items():
                changed = {k: v for k, v in sizes.items() if dense[name].get(k) != v}
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
            {name: dict.fromkeys(sizes, 0) for name, sizes in attributes.items()},
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
