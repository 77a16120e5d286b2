"""Which integer each weight becomes: the nearest, or those that together leave the layer's outputs nearest.

Rounding each weight to the nearest integer is the best choice for the weights, and not for what the layer computes. With
X^T X of what comes in, the columns of the weight matrix are rounded one after another, and what each rounding does wrong is
made up for by those that are not rounded yet (GPTQ, Frantar et al. 2023, arXiv:2210.17323; its ancestor is Optimal Brain
Surgeon, Hassibi and Stork 1993). Then each integer is set to the best one beside the others, a few times over. What is left of a shift of the mean output is taken off the bias (Nagel et al. 2019,
arXiv:1906.04721).

Names of tensors end in their dimensions: G groups of a layer, N positions, I inputs x kernel, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_accel.pruning.unfold import like_weight, matrix, patches, pieces, samples
from lightning_accel.quantization.adaround import adaround
from lightning_accel.quantization.calibration import in_mode, listening
from lightning_accel.quantization.grid import rounded
from lightning_accel.quantization.layers import (
    QuantizedAttention,
    QuantizedEmbedding,
    QuantizedLayer,
)
from lightning_accel.quantization.shared import shared_tensors
from lightning_accel.surgery.call import Call, run

Rounding = Literal["nearest", "least_squares", "adaround"]
ROUNDINGS = ("nearest", "least_squares", "adaround")
WIDE = 4096
"""Inputs x kernel of a layer up to which X^T X is made (134 MB)."""
_TOGETHER = 2**27
"""Numbers of such matrices that are held at a time (1 GB)."""
_SWEEPS = 4
_SAME = 1e-9
"""Variance by mean square below which an input counts as constant."""
_PULL = 0.01
"""Share of the mean squared input that is added to each, so that few samples do not decide too much."""


class Sums:
    """Of what comes into one layer: X^T X, the mean of X and that of its squares, float64.

    Args:
        layer: A linear layer or a convolution.
        products: Whether X^T X is wanted.
    """

    def __init__(self, layer: QuantizedLayer, *, products: bool) -> None:
        groups, _, inputs = matrix(layer, layer.weight).shape
        self.layer, self.count = layer, 0
        zeros = layer.weight.new_zeros
        self.sum_GI = zeros(groups, inputs, dtype=torch.float64)
        self.square_GI = zeros(groups, inputs, dtype=torch.float64)
        wanted = products and inputs <= WIDE
        self.gram_GII = zeros(groups, inputs, inputs, dtype=torch.float64) if wanted else None

    def add(self, values: Tensor) -> None:
        """Take in what comes into the layer."""
        x = samples(self.layer, values)
        for piece in x.split(pieces(self.layer, x)):
            x_GNI = patches(self.layer, piece)
            self.count += x_GNI.shape[1]
            self.sum_GI += x_GNI.sum(1)
            self.square_GI += x_GNI.square().sum(1)
            if self.gram_GII is not None:
                self.gram_GII += x_GNI.mT @ x_GNI

    def constant(self) -> float:
        """Return the share of inputs that had one value only, on all samples."""
        mean_GI, power_GI = self.sum_GI / self.count, self.square_GI / self.count
        return float((power_GI - mean_GI.square() <= _SAME * power_GI).double().mean())


@torch.no_grad()
def refine(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: Sequence[Sequence[Call]],
    *,
    rounding: Rounding,
    correct_bias: bool,
) -> list[str]:
    """Round weights by what comes in, and correct biases, in place; return what to tell of layers where that is not so.

    The weights are then on their grid, and each layer keeps the scales of before.
    """
    plain = {name: "a layer of its kind" for name, one in layers.items() if not _has_matrix(one)}
    tied, kept, constant = shared_tensors(model), [], []
    for chunk in _chunks({name: layer for name, layer in layers.items() if _has_matrix(layer)}):
        products = rounding != "nearest"
        sums = {name: Sums(layer, products=products) for name, layer in chunk.items()}

        def add(name: str, values: Any, sums: dict[str, Sums] = sums) -> None:
            if name in sums and isinstance(values, Tensor):
                sums[name].add(values)

        with in_mode(layers, "plain"), listening(chunk, add):
            for calls in batches:
                run(model, calls)
        for name, layer in chunk.items():
            if not sums[name].count:
                continue
            if id(layer.weight) in tied:  # another module reads it too
                sums[name].gram_GII = None
                plain[name] = "its weight is another module's too"
            elif sums[name].gram_GII is None:
                plain[name] = "too wide for X^T X"
            if sums[name].constant() > 0.5:
                constant.append(f"`{name}` ({sums[name].constant():.0%})")
            why = _why_bias_stays(layer, tied) if correct_bias else ""
            kept += [f"{name}: its bias is not corrected, {why}"] if why else []
            _refine(layer, sums[name], rounding, correct_bias and not why)
    if constant:
        kept.append(
            f"most inputs had one value only on the calibration: {', '.join(constant[:6])}; "
            "if that is not so in training, pass batches that are like it"
        )
    if rounding == "nearest":
        return kept
    return [*(f"{name}: rounded to the nearest, {why}" for name, why in plain.items()), *kept]


def _why_bias_stays(layer: QuantizedLayer, tied: set[int]) -> str:
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if bias is not None and "bias" not in layer._parameters:  # by torch.nn.utils.prune, say
        return "it is computed from others"
    return "it is another module's too" if id(bias) in tied else ""


def _refine(layer: QuantizedLayer, sums: Sums, rounding: Rounding, correct_bias: bool) -> None:
    scale = layer.weight_scale()
    rows_GOI = matrix(layer, layer.weight)
    if sums.gram_GII is not None:
        round_ = adaround if rounding == "adaround" else by_products
        held = (
            rows_GOI,
            _pulled(sums.gram_GII),
            _scale_of_each(layer, scale),
            layer.accel_grid.top,
        )
        made_GOI = descended(round_(*held), *held)
        made_GOI = made_GOI.where(rows_GOI != 0, 0.0)  # a weight that was pruned stays so
        layer.set_scale(scale)
        layer.weight.copy_(like_weight(layer, made_GOI))
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if correct_bias and bias is not None:
        made = rounded(layer.weight, scale, layer.channels_axis, layer.accel_grid)
        now_GOI = matrix(layer, made)
        shift_GO = ((rows_GOI - now_GOI) @ (sums.sum_GI / sums.count)[..., None])[..., 0]
        bias += shift_GO.flatten().to(bias.dtype)


def _scale_of_each(layer: QuantizedLayer, scale: Tensor) -> Tensor:
    """Return the scale of each weight, in the shape of `matrix`."""
    weight = layer.weight
    if layer.accel_grid.group is not None:
        whole = scale.repeat_interleave(layer.accel_grid.group, dim=1)
    else:
        shape = [-1 if dim == layer.channels_axis else 1 for dim in range(weight.dim())]
        whole = scale.view(shape).expand_as(weight)
    return matrix(layer, whole)


def by_products(rows_GOI: Tensor, gram_GII: Tensor, scale_GOI: Tensor, top: int) -> Tensor:
    """Return the rows on their grid, so that X rows^T changes little.

    Args:
        rows_GOI: Float64.
        gram_GII: X^T X, of full rank.
        scale_GOI: Of each weight.
        top: The largest integer.

    >>> rows, gram = torch.tensor([[[0.4, 0.4]]]).double(), torch.tensor([[[1.01, 1.0], [1.0, 1.01]]]).double()
    >>> by_products(rows, gram, torch.ones(1, 1, 2).double(), 7)  # of two equal inputs, one takes it all
    tensor([[[0., 1.]]], dtype=torch.float64)
    """
    energy_GI = gram_GII.diagonal(dim1=-2, dim2=-1)
    order_GI = energy_GI.argsort(dim=-1, descending=True, stable=True)
    system = _ordered(_ordered(gram_GII, order_GI, -1), order_GI, -2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    upper_GII = torch.linalg.cholesky(inverse, upper=True)
    left_GOI, scale_GOI = _ordered(rows_GOI, order_GI, -1), _ordered(scale_GOI, order_GI, -1)
    made_GOI = torch.empty_like(left_GOI)
    for column in range(left_GOI.shape[-1]):
        scale_GO, value_GO = scale_GOI[..., column], left_GOI[..., column]
        whole_GO = (value_GO / scale_GO).round().clamp(-top, top)
        made_GOI[..., column] = whole_GO * scale_GO
        error_GO = (value_GO - made_GOI[..., column]) / upper_GII[:, column, column, None]
        after = upper_GII[:, None, column, column + 1 :]
        left_GOI[..., column + 1 :] -= error_GO[..., None] * after
    return _ordered(made_GOI, order_GI.argsort(dim=-1), -1)


def descended(
    made_GOI: Tensor, rows_GOI: Tensor, gram_GII: Tensor, scale_GOI: Tensor, top: int
) -> Tensor:
    """Return rows on their grid whose error is no larger: each integer is set to the best one beside the others, some times.

    It is coordinate descent (QuantEase, Behdin et al. 2023, arXiv:2309.01885).

    >>> rows, gram = torch.tensor([[[0.4, 0.4]]]).double(), torch.ones(1, 2, 2).double()
    >>> descended(torch.zeros(1, 1, 2).double(), rows, gram, torch.ones(1, 1, 2).double(), 7).abs()
    tensor([[[1., 0.]]], dtype=torch.float64)
    """
    made_GOI = made_GOI.clone()
    change_GOI = made_GOI - rows_GOI
    for _ in range(_SWEEPS):
        for column in range(made_GOI.shape[-1]):
            slope_GO = (change_GOI * gram_GII[:, column, None, :]).sum(-1)
            best_GO = made_GOI[..., column] - slope_GO / gram_GII[:, column, column, None]
            scale_GO = scale_GOI[..., column]
            best_GO = (best_GO / scale_GO).round().clamp(-top, top) * scale_GO
            change_GOI[..., column] += best_GO - made_GOI[..., column]
            made_GOI[..., column] = best_GO
    return made_GOI


def _pulled(gram_GII: Tensor) -> Tensor:
    """Return X^T X with a share of the mean squared input added to each."""
    energy_GI = gram_GII.diagonal(dim1=-2, dim2=-1)
    pull_G = _PULL * energy_GI.mean(-1).clamp_min(1e-30)
    return gram_GII + torch.diag_embed(pull_G[:, None].expand_as(energy_GI))


def _ordered(tensor: Tensor, order_GI: Tensor, dim: int) -> Tensor:
    index = order_GI[:, None, :] if dim == -1 else order_GI[:, :, None]
    return tensor.gather(dim, index.expand_as(tensor))


def _has_matrix(layer: QuantizedLayer) -> bool:
    if isinstance(layer, (QuantizedAttention, QuantizedEmbedding)):
        return False
    return not (layer.channels_axis == 1 and int(getattr(layer, "groups", 1)) > 1)


def _chunks(layers: dict[str, QuantizedLayer]) -> list[dict[str, QuantizedLayer]]:
    """Part layers so that the matrices of each part can be held together."""
    parts: list[dict[str, QuantizedLayer]] = [{}]
    held = 0
    for name, layer in layers.items():
        groups, _, inputs = matrix(layer, layer.weight).shape
        size = groups * min(inputs, WIDE) ** 2
        if parts[-1] and held + size > _TOGETHER:
            parts.append({})
            held = 0
        parts[-1][name] = layer
        held += size
    return parts
