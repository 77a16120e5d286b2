"""What to take out of a model: the kept elements of each tensor, the sizes that follow, and whole blocks.

A cut is made on a twin, is plain data, and can be sent to other processes. Applying it to the model
(or to any copy with the same names, such as a moving average) is the only moment at which the
original is touched. `masked` is the same cut without removal, which is what a correct cut must equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_accel.errors import StructureMismatch
from lightning_accel.surgery.attributes import Size, set_size
from lightning_accel.surgery.bypass import Handing, bypass
from lightning_accel.surgery.receipt import Change, Kept, Moved, Receipt, Removed, summary
from lightning_accel.surgery.spectral import settle
from lightning_accel.surgery.structure import Structure, named_tensors, replace_data, text


@dataclass(frozen=True)
class Cut:
    """The kept elements of named tensors, and the new value of integer attributes of modules.

    `before` holds the shapes and attributes that the cut expects to find. `scaled` multiplies what is
    kept of a tensor, so that the function stays the same (see `pruning.scaling`); `renormed` does so in
    the shape before the cut, for weights divided by a norm; `added` is added last, to make up for what is
    gone (see `pruning.compensation`). `bypassed` are blocks that go as a whole, with how each hands on its
    input (see `bypass`); all else is said of the network without them.
    """

    kept: Mapping[str, Kept] = field(default_factory=dict)
    before: Structure = field(default_factory=Structure)
    attributes: Mapping[str, Mapping[str, Size]] = field(default_factory=dict)
    skipped: tuple[Change, ...] = ()
    scaled: Mapping[str, Tensor] = field(default_factory=dict)
    renormed: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bypassed: Mapping[str, Handing] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.kept or self.bypassed)

    def __repr__(self) -> str:
        """Write a summary of at most ten lines, without tensors."""
        counts = f"{len(self.kept)} tensors, {len(self.attributes)} modules"
        lines = [f"  {name}: a whole block" for name in self.bypassed]
        lines += [f"  {name}: {kept!r}" for name, kept in self.kept.items()]
        lines += [f"  left alone: {change.name}: {change.what}" for change in self.skipped]
        return summary(f"Cut({counts}, {len(self.skipped)} skipped)", lines)

    @torch.no_grad()
    def apply(self, model: nn.Module, *, raw: bool = False) -> Receipt:
        """Remove the elements in place, gradients included; parameters stay the same objects.

        Args:
            model: The network for which the cut was made.
            raw: Do nothing beside: layers under a spectral norm keep what is left of its vectors.

        Raises:
            StructureMismatch: `model` is not of the shape for which the cut was made; it is untouched.
        """
        self._check(model)
        _release(model)
        blocks = bypass(model, self.bypassed)
        changes = [Change(one.name, "removed", type(one.block).__name__) for one in blocks]
        removed = [
            Removed(f"{one.name}.{n}", p) for one in blocks for n, p in one.parameters.items()
        ]
        tensors, modules = dict(named_tensors(model)), dict(model.named_modules())
        moved: list[Moved] = []
        done: set[int] = set()
        for name, kept in self.kept.items():
            old = tensors[name]
            if id(old) in done:
                continue  # a tied tensor under its second name
            done.add(id(old))
            old_shape, gradient = tuple(old.shape), old.grad
            if gradient is not None and gradient.layout != torch.strided:
                gradient = gradient.to_dense()
            data = kept.take(old)
            if name in self.renormed:
                data.mul_(kept.take(self.renormed[name].to(old)))
            if name in self.scaled:
                data.mul_(self.scaled[name].to(data))
            new = replace_data(model, old, data)
            done.add(id(new))
            if gradient is not None:
                new.grad = kept.take(gradient)
            changes.append(Change(name, "pruned", text(old_shape), text(new.shape)))
            if isinstance(old, nn.Parameter) and isinstance(new, nn.Parameter):
                moved.append(Moved(name, old, new, old_shape, kept))
        tensors = dict(named_tensors(model))
        for name, change in self.renormed.items():
            if name not in self.kept:
                tensors[name].data *= change.to(tensors[name])
        for name, change in self.added.items():
            tensors[name].data += change.to(tensors[name])
            changes.append(Change(name, "compensated"))
        if not raw:
            settled = settle(model, self.kept)
            changes += [Change(name, "divided anew by its spectral norm") for name in settled]
        for name, sizes in self.attributes.items():
            for key, size in sizes.items():
                set_size(modules[name], key, size)
        return Receipt(tuple(changes), tuple(moved), self.skipped, self.notes, tuple(removed))

    @torch.no_grad()
    def masked(self, model: nn.Module, nothing: float = 0.0) -> None:
        """Set what the cut would remove to zero in place, and remove nothing; blocks stay (`pruning.silence`).

        Args:
            model: The network for which the cut was made.
            nothing: What stands for zero; a tiny number where zero would be divided by zero.
        """
        done: set[int] = set()
        tensors = dict(named_tensors(model))
        for name in self.kept:
            tensor = tensors[name]
            if id(tensor) not in done and (tensor.is_floating_point() or tensor.is_complex()):
                done.add(id(tensor))
                tensor.mul_(self.mask(name, tensor.real, nothing))
        for name, change in self.renormed.items():
            tensors[name].mul_(change.to(tensors[name]))

    def mask(self, name: str, like: Tensor, nothing: float = 0.0) -> Tensor:
        """Return ones where the tensor `name` keeps its elements and `nothing` elsewhere, shaped `like`.

        It is expanded where it is the same along a dimension, so it is not to be written into.
        """
        kept = self.kept.get(name, Kept((None,) * like.dim()))
        if kept.flat is not None:
            flat = like.new_full((like.numel(),), nothing)
            flat[kept.flat.to(like.device).flatten()] = 1
            return flat.view(like.shape)
        mask = like.new_ones([1] * like.dim())
        for dim, positions in enumerate(kept.dims):
            if positions is not None:
                line = like.new_zeros(like.shape[dim])
                line[positions.to(like.device)] = 1
                mask = mask * line.view([-1 if d == dim else 1 for d in range(like.dim())])
        return mask.clamp_min(nothing).expand(like.shape)

    def _check(self, model: nn.Module) -> None:
        try:
            found = self.before.now(model)
        except (KeyError, AttributeError) as error:
            raise StructureMismatch(
                "the cut names what the model lacks",
                str(error),
                "apply it to a copy of its own model",
            ) from None
        if found != self.before:
            wrong = [
                name
                for name, shape in self.before.tensors.items()
                if found.tensors.get(name) != shape
            ]
            raise StructureMismatch(
                "the cut was made for a model of another shape",
                ", ".join(wrong[:3]) or "other integer attributes",
                "plan the edit anew for this model",
            )


def _release(model: nn.Module) -> None:
    """Detach weights that a hook of `torch.nn.utils` computed: their graph knows the old shapes."""
    for module in model.modules():
        if module._forward_pre_hooks:
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    module.__dict__[key] = value.detach()
