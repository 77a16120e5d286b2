"""How features of different shapes become comparable: layouts, sizes, and layers that change widths.

Legend: B batch, T tokens, D features, C channels, L H W and D before H positions in space.

`align` has no parameters: it brings two features into one layout and one size in time or space, and
leaves their widths. What it gives is told apart by its dimensions alone:

    2  BD     vectors, as soon as one side is a vector: the other is averaged over all positions
    3  BTD    tokens, also from "BCL", which is tokens with the channels first
    4  BCHW   maps, as soon as one side is a map: tokens are laid out as the map that they are
    5  BCDHW  maps of volumes

Sizes meet at the smaller one by adaptive average pooling. It is computed as a sum of products, since
torch's own kernels have no deterministic gradient on CUDA. Then a `Projector` without bias takes the
student's width to the teacher's (Romero et al. 2015, arXiv 1412.6550), and an `Embedding` takes any
feature to a vector for contrastive losses (Tian et al. 2020, arXiv 1910.10699). Weights are drawn from a
generator of their own: all processes make the same ones and the user's random state never moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd, isqrt, prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_accel.arguments import one_of
from lightning_accel.errors import explain
from lightning_accel.surgery import Change, Kept, Moved, Receipt
from lightning_accel.surgery.structure import replace_data, text

LAYOUTS = {
    "BD": (0, 1),
    "BTD": (0, 1, 2),
    "BCL": (0, 2, 1),
    "BCHW": (0, 1, 2, 3),
    "BHWC": (0, 3, 1, 2),
    "BCDHW": (0, 1, 2, 3, 4),
}
"""Each layout with the order of its dimensions that makes it a vector, tokens or a map."""

ProjectorKind = Literal["map", "tokens", "vector"]
PROJECTORS = get_args(ProjectorKind)
KINDS: dict[int, ProjectorKind] = {2: "vector", 3: "tokens", 4: "map", 5: "map"}
"""What an aligned feature is, by its number of dimensions."""

MAX_EXTRA = 16
"""How many leading tokens may be no part of the sequence or image: class and register tokens."""


def layout_of(feature: Tensor, layout: str | None = None) -> str:
    """Tell the layout of a feature: the named one if it fits, else by the number of dimensions.

    Two dimensions are "BD", three "BTD", four "BCHW", five "BCDHW"; "BCL" and "BHWC" need naming.

    Raises:
        ValueError: The name is unknown, or the feature has not its dimensions.

    >>> layout_of(torch.ones(2, 5, 8)), layout_of(torch.ones(2, 5, 5, 8), "BHWC")
    ('BTD', 'BHWC')
    """
    found = layout or {2: "BD", 3: "BTD", 4: "BCHW", 5: "BCDHW"}.get(feature.dim())
    if found not in LAYOUTS or len(found) != feature.dim():
        fitting = [name for name in LAYOUTS if len(name) == feature.dim()]
        raise ValueError(
            explain(
                f"a feature has no layout {layout!r}"
                if layout
                else "a feature has no known layout",
                f"the shape {text(feature.shape)}",
                f"name one of {', '.join(fitting)}"
                if fitting
                else f"tap a layer that gives one of {', '.join(LAYOUTS)}",
            )
        )
    return found


def align(
    student: Tensor,
    teacher: Tensor,
    *,
    student_layout: str | None = None,
    teacher_layout: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Bring two features into one layout and one size in time or space; their widths stay.

    Tokens beside a map lose up to 16 leading ones (class, registers), as few as it takes until the rest
    has the map's aspect ratio; a square of all, or all but one, will do beside any map. Two runs of tokens: where one is up to 16 longer and
    not twice as long, its leading tokens go; where both are squares, but for a class token each, they
    are pooled as the images that they are, else over time. A map beside a map of another aspect ratio is
    pooled to the smaller extent along each dimension. Gradients flow to both sides.

    Args:
        student: A feature of any layout, floating point.
        teacher: One of the same batch.
        student_layout: A name of `LAYOUTS`; by default told by the dimensions, see `layout_of`.
        teacher_layout: As `student_layout`.

    Returns:
        Both as BD, BTD, BCHW or BCDHW, equal but for D or C.

    Raises:
        ValueError: A layout does not fit, the batches differ, a map meets a volume, or tokens are no image.

    >>> vit, cnn = torch.ones(2, 17, 64), torch.ones(2, 32, 8, 8)
    >>> [tuple(feature.shape) for feature in align(cnn, vit)]
    [(2, 32, 4, 4), (2, 64, 4, 4)]
    """
    one, other = _ordered(student, student_layout), _ordered(teacher, teacher_layout)
    if len(one) != len(other):
        raise ValueError(
            explain(
                "the features of student and teacher are of different batches",
                f"{len(one)} and {len(other)} rows, shapes {text(one.shape)} and {text(other.shape)}",
                "tap layers whose outputs have the batch as dimension 0",
            )
        )
    kinds = (KINDS[one.dim()], KINDS[other.dim()])
    if "vector" in kinds:
        return _vector(one), _vector(other)
    if kinds == ("tokens", "tokens"):
        return _same_tokens(one, other)
    if kinds[0] == "tokens":
        one = _as_map(one, other.shape[2:])
    elif kinds[1] == "tokens":
        other = _as_map(other, one.shape[2:])
    return _same_extent(one, other)


class Projector(nn.Module):
    """A linear map from the student's width to the teacher's at each position, without bias.

    Args:
        student_width: Channels or features that come in.
        teacher_width: Those that go out.
        kind: "map" for channels at dimension 1 (a 1x1 convolution in any number of dimensions), "tokens"
            or "vector" for features at the last one.
        seed: Of the initial weights, which are as those of `nn.Linear`.

    Raises:
        ValueError: A width is no positive number, or the kind is unknown.

    >>> Projector(4, 8, "map")(torch.ones(2, 4, 3, 3)).shape
    torch.Size([2, 8, 3, 3])
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        kind: ProjectorKind = "vector",
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        one_of("kind", kind, PROJECTORS)
        self.kind = kind
        self.weight = nn.Parameter(_drawn(teacher_width, student_width, seed))

    def forward(self, feature: Tensor) -> Tensor:
        """Project a feature, in the wider dtype of the two."""
        feature, weight = _alike(feature, self.weight)
        if self.kind == "map":
            return F.linear(feature.movedim(1, -1), weight).movedim(-1, 1)
        return F.linear(feature, weight)

    def extra_repr(self) -> str:
        """Say widths and kind in the summary of a model."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.kind!r}"


class Embedding(nn.Module):
    """Any feature as a vector for a contrastive loss: the average of all positions, then a linear layer.

    Args:
        width: Channels or features of what comes in.
        dim: Length of the vector.
        layout: Of what comes in; by default told by its dimensions.
        seed: Of the initial weights.

    Raises:
        ValueError: A width is no positive number.

    >>> Embedding(8, 4)(torch.ones(2, 8, 3, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self, width: int, dim: int = 128, *, layout: str | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.layout = layout
        self.weight = nn.Parameter(_drawn(dim, width, seed))
        self.bias = nn.Parameter(torch.zeros(dim, device="cpu", dtype=torch.float32))

    @classmethod
    def of(
        cls, feature: Tensor, dim: int = 128, *, layout: str | None = None, seed: int = 0
    ) -> Embedding:
        """Make one for features like this.

        >>> Embedding.of(torch.ones(2, 8, 3, 3)).weight.shape
        torch.Size([128, 8])
        """
        width = _vector(_ordered(feature, layout)).shape[1]
        made = cls(width, dim, layout=layout, seed=seed).to(feature.device)
        return made.to(torch.promote_types(feature.dtype, torch.float32))

    def forward(self, feature: Tensor) -> Tensor:
        """Embed a feature, in the wider dtype of the two."""
        feature, weight = _alike(feature, self.weight)
        vector_BD = _vector(_ordered(feature, self.layout))
        return F.linear(vector_BD, weight, self.bias.to(weight.dtype))

    def extra_repr(self) -> str:
        """Say the widths in the summary of a model."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


def make_projector(student: Tensor, teacher: Tensor, *, seed: int = 0) -> Projector | None:
    """Make the projector between two aligned features, or none where they are equally wide.

    >>> make_projector(torch.ones(2, 5, 4), torch.ones(2, 5, 8))
    Projector(4, 8, 'tokens')
    >>> make_projector(torch.ones(2, 5, 4), torch.ones(2, 5, 4)) is None
    True
    """
    kind = KINDS.get(student.dim())
    if kind is None or student.dim() != teacher.dim():
        raise ValueError(
            explain(
                "a projector stands between two aligned features",
                f"{text(student.shape)} and {text(teacher.shape)}",
                "call `align` first",
            )
        )
    at = 1 if kind == "map" else -1
    if student.shape[at] == teacher.shape[at]:
        return None
    made = Projector(student.shape[at], teacher.shape[at], kind, seed=seed).to(student.device)
    return made.to(torch.promote_types(student.dtype, torch.float32))


def spec(module: Projector | Embedding) -> dict[str, int | str]:
    """Describe a projector or an embedding as plain data, to make an empty one of its shape again.

    >>> spec(Projector(4, 8, "map"))
    {'kind': 'map', 'student_width': 4, 'teacher_width': 8}
    """
    out, into = module.weight.shape
    if isinstance(module, Projector):
        return {"kind": module.kind, "student_width": into, "teacher_width": out}
    return {"kind": "embedding", "width": into, "dim": out, "layout": module.layout or ""}


def from_spec(described: Mapping[str, Any]) -> Projector | Embedding:
    """Make a module of the shape that `spec` described, with initial weights.

    Raises:
        ValueError: The description is none that `spec` gives.

    >>> from_spec({"kind": "map", "student_width": 4, "teacher_width": 8})
    Projector(4, 8, 'map')
    """
    given = dict(described)
    try:
        if given.get("kind") != "embedding":
            return Projector(**given)
        del given["kind"]
        return Embedding(**{**given, "layout": given.get("layout") or None})
    except TypeError as error:
        raise ValueError(
            explain(
                "not the description of a projector", f"{described} ({error})", "pass `spec(...)`"
            )
        ) from None


def narrowed(module: Projector | Embedding, kept: Tensor, *, name: str = "projector") -> Receipt:
    """Keep some of the channels that come in, in place, after the student's layer was pruned.

    The parameter stays the same object and its gradient is sliced with it; hand the receipt to
    `lightning_accel.surgery.follow` for the optimizer's state.

    Args:
        module: A projector, or the embedding of the student's side.
        kept: Positions of the channels that stay, integers in increasing order.
        name: What the receipt calls the module.

    Raises:
        ValueError: The positions are empty, not increasing or beyond the width.

    >>> projector = Projector(4, 8)
    >>> receipt = narrowed(projector, torch.tensor([0, 2]))
    >>> projector, receipt.changes[0].after
    (Projector(2, 8, 'vector'), '8x2')
    """
    old = module.weight
    width, shape, gradient = old.shape[1], tuple(old.shape), old.grad
    _check_positions(kept, width)
    if len(kept) == width:
        return Receipt()
    map_of_kept = Kept((None, kept.detach().cpu()))
    new = replace_data(module, old, map_of_kept.take(old))
    assert isinstance(new, nn.Parameter)
    new.grad = None if gradient is None else map_of_kept.take(gradient)
    name = f"{name}.weight"
    return Receipt(
        (Change(name, "narrowed", text(shape), text(new.shape)),),
        (Moved(name, old, new, shape, map_of_kept),),
    )


def _ordered(feature: Tensor, layout: str | None) -> Tensor:
    """Return a feature as BD, BTD, BCHW or BCDHW."""
    if not feature.is_floating_point():
        raise ValueError(
            explain(
                "a feature holds floating point numbers", str(feature.dtype), "tap another layer"
            )
        )
    return feature.permute(LAYOUTS[layout_of(feature, layout)])


def _vector(feature: Tensor) -> Tensor:
    """Average over all positions of an ordered feature."""
    if KINDS[feature.dim()] == "tokens":
        return feature.mean(1)
    return feature.flatten(2).mean(2) if feature.dim() > 2 else feature


def _same_tokens(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    short, long = sorted((one.shape[1], other.shape[1]))
    extra = long - short
    for dropped in (0, 1) if extra else ():
        sides = isqrt(short - dropped), isqrt(long - dropped)
        if sides[0] > 0 and [side**2 + dropped for side in sides] == [short, long]:
            grids = (_grid(feature, (isqrt(feature.shape[1]),) * 2) for feature in (one, other))
            one, other = _same_extent(*grids)
            return one.flatten(2).transpose(1, 2), other.flatten(2).transpose(1, 2)
    if extra <= MAX_EXTRA and extra < short:
        return one[:, -short:], other[:, -short:]
    return _pooled(one, 1, short), _pooled(other, 1, short)


def _as_map(tokens_BTD: Tensor, like: torch.Size) -> Tensor:
    """Lay tokens out as the map that they are, beside a map of the extent `like`."""
    for grid in _grids(tokens_BTD.shape[1], tuple(like)):
        return _grid(tokens_BTD, grid)
    raise ValueError(
        explain(
            "tokens cannot be laid out beside a map",
            f"{tokens_BTD.shape[1]} tokens, which are no grid in the aspect ratio {text(like)} even "
            f"without up to {MAX_EXTRA} leading ones",
            "tap a layer that gives a map, such as the embedding of patches, or compare vectors",
        )
    )


def _grids(num_tokens: int, like: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the grids that the last of so many tokens may be, the likeliest first."""
    unit = [size // gcd(*like) for size in like]
    for dropped in range(min(MAX_EXTRA + 1, num_tokens)):
        times = round(((num_tokens - dropped) / prod(unit)) ** (1 / len(like)))
        grid = tuple(times * size for size in unit)
        if prod(grid) == num_tokens - dropped:
            yield grid
        side = isqrt(num_tokens - dropped)
        if len(like) == 2 and dropped < 2 and side**2 == num_tokens - dropped:
            yield side, side


def _grid(tokens_BTD: Tensor, grid: tuple[int, ...]) -> Tensor:
    return tokens_BTD[:, -prod(grid) :].transpose(1, 2).unflatten(2, grid)


def _same_extent(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if one.dim() != other.dim():
        raise ValueError(
            explain(
                "a map and a volume cannot be compared position by position",
                f"{text(one.shape)} and {text(other.shape)}",
                "tap layers of the same number of dimensions",
            )
        )
    for dim in range(2, one.dim()):
        size = min(one.shape[dim], other.shape[dim])
        one, other = _pooled(one, dim, size), _pooled(other, dim, size)
    return one, other


def _pooled(feature: Tensor, dim: int, size: int) -> Tensor:
    """Average-pool one dimension to `size` bins, as `adaptive_avg_pool1d` cuts them."""
    old = feature.shape[dim]
    if old == size:
        return feature
    if old % size == 0:
        return feature.unflatten(dim, (size, old // size)).mean(dim + 1)
    bins, places = (
        torch.arange(size, device=feature.device),
        torch.arange(old, device=feature.device),
    )
    starts, ends = bins * old // size, -(-(bins + 1) * old // size)
    inside = (places >= starts[:, None]) & (places < ends[:, None])
    shares = inside.to(feature.dtype) / (ends - starts)[:, None]
    return (feature.movedim(dim, -1) @ shares.mT).movedim(-1, dim)


def _drawn(out: int, into: int, seed: int) -> Tensor:
    """Draw the weights of a linear layer as torch does, from a generator of our own."""
    if min(out, into) < 1:
        raise ValueError(
            explain(
                "widths are positive numbers", f"{into} to {out}", "pass the widths of features"
            )
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    weight = torch.empty(out, into, device="cpu", dtype=torch.float32)
    return weight.uniform_(-(into**-0.5), into**-0.5, generator=generator)


def _alike(feature: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(feature.dtype, weight.dtype)
    return feature.to(dtype), weight.to(dtype)


def _check_positions(kept: Tensor, width: int) -> None:
    whole = kept.dim() == 1 and not kept.is_floating_point() and kept.dtype != torch.bool
    if whole and len(kept) and kept[0] >= 0 and kept[-1] < width and bool((kept.diff() > 0).all()):
        return
    raise ValueError(
        explain(
            f"`kept` holds positions below {width} in increasing order",
            f"{kept.tolist()}",
            "pass those that stayed, such as torch.tensor([0, 2])",
        )
    )
