"""Layers that compute as integers of few bits would, by another class of the same modules.

A layer changes by its class and a few attributes, as `float8.py` does it: parameters, names in checkpoints, hooks, and
whoever holds the layer stay the same, so optimizers, averages, distillation and distributed wrappers notice nothing. What
a layer has beside is its grid, the range of what comes in, and the scales of its weights where they are not simply those
of the largest: buffers that are in no state dict. Copies and pickles compute in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.errors import explain
from lightning_accel.quantization import grid as grids
from lightning_accel.quantization.grid import Grid
from lightning_accel.surgery.receipt import Kept

Mode = Literal["plain", "watching", "training", "quantized"]
"""Of a layer: it computes as ever; and notes what comes in; it computes quantized and notes in training; and does not."""


class QuantizedLayer(nn.Module):
    """What all of them have; a layer of torch becomes one by `become`.

    Attributes:
        accel_grid: On which numbers it computes.
        accel_mode: A `Mode`.
        accel_range: Smallest and largest value that may come in, shape (2,).
        accel_known: That there is such a range, for certain.
        accel_seen: The same of what came in since it was last asked.
        accel_scale: Of the weights, where it is not that of the largest: always with fewer than eight bits.
        accel_told: Ranges and scales are those of a file whose weights are loaded next.
        accel_trains: A callback sees to ranges and scales.
    """

    accel_grid: Grid
    accel_mode: Mode
    accel_range: Tensor
    accel_known: bool
    accel_seen: Tensor
    accel_scale: Tensor | None
    accel_told = accel_trains = False
    weight: Tensor
    channels_axis = 0

    def parts(self) -> list[Tensor]:
        """Return the weights, each with its output channels along `channels_axis`."""
        return [self.weight]

    def weight_scale(self) -> Tensor:
        """Return the scale of each output channel of all parts, or of each group."""
        if self.accel_scale is not None:
            return self.accel_scale
        return _joined([grids.scales(w, self.channels_axis, self.accel_grid) for w in self.parts()])

    def part_scales(self) -> list[Tensor]:
        """Return the scales of each part."""
        sizes = [weight.shape[self.channels_axis] for weight in self.parts()]
        return [*self.weight_scale().split(sizes)]

    def fit_scale(self) -> None:
        """Find scales for the present weights where the largest of them should not decide: with few bits."""
        if self.accel_grid.bits < 8:
            grid, axis = self.accel_grid, self.channels_axis
            self.set_scale(_joined([grids.best_scales(w, axis, grid) for w in self.parts()]))

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Say the scale of each output channel, or of each group."""
        if self.accel_scale is None or self.accel_scale.shape != scale.shape:
            self.accel_scale = scale.detach().to(self.accel_range.device).clone()
        else:  # the same tensor, as whoever copies buffers in their order needs it
            self.accel_scale.copy_(scale)

    def quantized_parts(self) -> list[Tensor]:
        """Return the weights to compute with."""
        if self.accel_mode in ("plain", "watching"):
            return self.parts()
        grid, axis = self.accel_grid, self.channels_axis
        pairs = zip(self.parts(), self.part_scales(), strict=True)
        return [
            grids.rounded(weight, scale if weight.requires_grad else scale.detach(), axis, grid)
            for weight, scale in pairs
        ]

    def quantized_weight(self) -> Tensor:
        """Return the weight to compute with, of a layer that has one."""
        return self.quantized_parts()[0]

    def quantized_input(self, values: Tensor) -> Tensor:
        """Return what to compute on, and note its range where that is asked for."""
        if self.accel_mode == "plain" or self.accel_grid.activations is None:
            return values
        if self.accel_grid.activations == "dynamic":
            return values if self.accel_mode == "watching" else _rounded_by_itself(values)
        learns = self.accel_mode == "training" and self.training
        if self.accel_mode == "watching" or learns:
            _note(self.accel_seen, values)
        if self.accel_mode == "watching":
            return values
        if self.accel_known:
            made = grids.rounded_input(values, self.accel_range)
            # No integer stands for NaN, and who looks for it in a loss has to find it.
            return torch.where(values.isfinite(), made, values) if learns else made
        if self.accel_mode == "quantized":
            return values
        # Before anything is known of what comes in, it passes as it is; no one waits for the answer here.
        known = self.accel_range[0] <= self.accel_range[1]
        range_ = torch.where(known, self.accel_range, 0.0)
        return torch.where(known, grids.rounded_input(values, range_), values)

    def take_seen(self) -> Tensor:
        """Return smallest and largest value that came in since this was last asked, shape (2,)."""
        found = self.accel_seen.clone()
        self.accel_seen.copy_(_nothing(found.device))
        return found

    def set_range(self, range_: Tensor) -> None:
        """Say what comes in from now on, shape (2,); an empty range is none."""
        self.accel_range.copy_(range_)
        self.settle()

    def settle(self) -> None:
        """See whether a range is known by now; waits for the device."""
        self.accel_known = bool(self.accel_range[0] <= self.accel_range[1])

    def leave_kind(self) -> Callable[[Mapping[int, Kept]], None]:
        """Become the layer of torch, and return what undoes that; it takes what an edit kept, by parameters' identities."""
        held = self.accel_grid, self.accel_mode, self.accel_range, self.accel_scale
        unbecome(self)
        return partial(_return, self, *held)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = [weight.detach().clone() for weight in self.parts()]
        super()._load_from_state_dict(*args, **kwargs)
        told, self.accel_told = self.accel_told or self.accel_trains, False
        if self.accel_mode != "quantized" or told:
            return
        if not all(map(torch.equal, before, self.parts())):
            _warn_of_old_ranges()

    def extra_repr(self) -> str:
        """Say the grid too."""
        return f"{super().extra_repr()}, {self.accel_grid}"


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute as `nn.Linear` does."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """`nn.Conv1d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute as `nn.Conv1d` does."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """`nn.Conv2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute as `nn.Conv2d` does."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """`nn.Conv3d`."""

    def forward(self, input: Tensor) -> Tensor:
        """Compute as `nn.Conv3d` does."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class _Transposed(QuantizedLayer):
    channels_axis = 1
    compute: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Compute as the transposed convolution does."""
        made: Any = self
        room = made._output_padding(
            input,
            output_size,
            made.stride,
            made.padding,
            made.kernel_size,
            len(made.kernel_size),
            made.dilation,
        )
        return type(self).compute(
            self.quantized_input(input),
            self.quantized_weight(),
            made.bias,
            made.stride,
            made.padding,
            room,
            made.groups,
            made.dilation,
        )


class QuantizedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d`."""

    compute = staticmethod(F.conv_transpose1d)


class QuantizedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d`."""

    compute = staticmethod(F.conv_transpose2d)


class QuantizedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d`."""

    compute = staticmethod(F.conv_transpose3d)


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """`nn.Embedding`, whose rows are the channels; indices come in as they are."""

    def forward(self, input: Tensor) -> Tensor:
        """Look rows up as `nn.Embedding` does."""
        weight = self.quantized_weight()
        return F.embedding(
            input, weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )


class QuantizedAttention(QuantizedLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention`: queries, keys and values come in on one grid, and all projections have their own.

    The products of attention and what comes into the last projection stay in floating point.
    """

    def parts(self) -> list[Tensor]:
        """Return the projections of what comes in, and that of the output."""
        own = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return [*(weight for weight in own if weight is not None), self.out_proj.weight]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute as `nn.MultiheadAttention` does, by its function."""
        turns = self.batch_first and query.dim() == 3
        made: dict[int, Tensor] = {}  # what is one tensor stays one, which torch asks
        for given in (query, key, value):
            if id(given) not in made:
                turned = given.transpose(0, 1) if turns else given
                made[id(given)] = self.quantized_input(turned)
        *own, last = self.quantized_parts()
        q_weight, k_weight, v_weight = own if len(own) == 3 else (None, None, None)
        output, weights = F.multi_head_attention_forward(
            made[id(query)],
            made[id(key)],
            made[id(value)],
            self.embed_dim,
            self.num_heads,
            own[0] if len(own) == 1 else None,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            last,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=len(own) == 3,
            q_proj_weight=q_weight,
            k_proj_weight=k_weight,
            v_proj_weight=v_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return output.transpose(0, 1) if turns else output, weights


KINDS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Embedding: QuantizedEmbedding,
    nn.MultiheadAttention: QuantizedAttention,
}
"""By the class itself: what a class derived from it computes is not known."""
_PLAIN = {made: kind for kind, made in KINDS.items()}


def become(module: nn.Module, grid: Grid, mode: Mode = "quantized") -> QuantizedLayer:
    """Make a layer of torch a quantized one, in place; its range is not known yet."""
    module.__class__ = KINDS[type(module)]
    assert isinstance(module, QuantizedLayer)
    if isinstance(module, nn.Embedding):
        grid = grid._replace(activations=None)
    module.accel_grid, module.accel_mode, module.accel_known = grid, mode, False
    device = module.parts()[0].device
    for name in ("accel_range", "accel_seen"):
        module.register_buffer(name, _nothing(device), persistent=False)
    module.register_buffer("accel_scale", None, persistent=False)
    if grid.bits < 8:
        module.set_scale(module.weight_scale())
    return module


def unbecome(module: QuantizedLayer) -> None:
    """Make it the layer of torch that it was, in place."""
    for name in ("accel_range", "accel_seen", "accel_scale"):
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    for name in ("accel_grid", "accel_mode", "accel_known", "accel_told", "accel_trains"):
        vars(module).pop(name, None)
    object.__setattr__(module, "__class__", _PLAIN[type(module)])


def _return(
    layer: nn.Module,
    grid: Grid,
    mode: Mode,
    range_: Tensor,
    scale: Tensor | None,
    kept: Mapping[int, Kept],
) -> None:
    """Make a layer quantized again, after an edit that may have taken outputs or inputs of it."""
    if grid.group is not None and layer.in_features % grid.group:  # type: ignore[operator]
        warnings.warn(
            explain(
                "a layer computes in floating point from here on",
                f"{layer}, whose inputs are no multiple of group={grid.group} any more",
                "prune with `round_to`, or call `unquantize` and `quantize` anew",
            ),
            stacklevel=5,
        )
        return
    made = become(layer, grid, mode)
    made.set_range(range_)
    if scale is None:
        return
    parts = made.parts()
    dims = kept[id(parts[0])].dims if len(parts) == 1 and id(parts[0]) in kept else ()
    rows = dims[made.channels_axis] if dims else None
    scale = scale if rows is None else scale[rows.to(scale.device)]
    if scale.shape == made.weight_scale().shape:
        made.set_scale(scale)
    else:
        made.fit_scale()


def _warn_of_old_ranges() -> None:
    warnings.warn(
        explain(
            "weights were loaded into quantized layers, whose ranges and scales are of other weights",
            "values that differ from those that were there",
            "call `unquantize` before and `quantize` after it, train on with QuantizationAwareTraining, or load the file "
            "by `lightning_accel.load_from_checkpoint`, which brings its ranges",
        ),
        stacklevel=6,
    )


def is_idle(layer: QuantizedLayer) -> bool:
    """Whether a layer whose inputs were to be quantized saw none."""
    return layer.accel_grid.has_range and bool(layer.accel_range[0] > layer.accel_range[1])


def layers_of(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a model by name.

    >>> layers_of(nn.Linear(2, 2))
    {}
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def _joined(scales: list[Tensor]) -> Tensor:
    return scales[0] if len(scales) == 1 else torch.cat(scales)


def _nothing(device: torch.device) -> Tensor:
    return torch.tensor([float("inf"), float("-inf")], device=device)


@torch.no_grad()
def _extent(values: Tensor) -> Tensor:
    low, high = values.detach().aminmax()
    return torch.stack((low, high)).float()


def _rounded_by_itself(values: Tensor) -> Tensor:
    """Return values on the grid of their own extent; what is no finite number stays."""
    if not values.numel():
        return values
    made = grids.rounded_input(values, _extent(values).nan_to_num())
    return torch.where(values.isfinite(), made, values)


@torch.no_grad()
def _note(seen: Tensor, values: Tensor) -> None:
    """Take in a range; taking the same in twice, as a recomputation does, changes nothing."""
    if values.numel():
        low, high = _extent(values)
        seen[0] = torch.minimum(seen[0], low)
        seen[1] = torch.maximum(seen[1], high)
