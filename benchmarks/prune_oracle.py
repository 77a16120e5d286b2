"""Is a pruned network right? An oracle that knows nothing of how it was pruned.

Every element that is gone is found by its value, set to zero in the dense network, and the two must agree in
float64, when norms take one number per call from the dense one instead of statistics over channels: on
new inputs, at another batch size, and at another input size where the dense network takes one. Besides,
the network must train, and come back from its state dict.
"""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_accel.measure.flops import count_macs
from lightning_accel.surgery import Structure
from lightning_accel.surgery.call import as_call, cast, converted, reals, tensors

NOWHERE: Mapping[str, Tensor] = {}
EXACT = 1e-5
"""Largest difference between a right network and the masked one, over the scale of the output.

It is about 1e-15, but where queries or weight norms are rescaled, which is rounded to float32. Where that
is much, it may be ten times what rounding all weights does to the dense network.
"""

Blank = Callable[[nn.Module, nn.Module], nn.Module]


def checked(
    dense: nn.Module,
    small: nn.Module,
    example: Any,
    places: Mapping[str, Tensor] = NOWHERE,
    blank: Blank | None = None,
) -> dict[str, Any]:
    """Return what runs, how much is left, and how far the function is from the masked one.

    `blank` makes, of the dense and of the small network, what takes the state dict of the small one.
    """
    found: dict[str, Any] = {"runs": False, "fails": "", "macs": None, "error": None}
    stage = "forward"
    try:
        sizes = [sum(p.numel() for p in m.parameters()) for m in (small, dense)]
        found["params"] = sizes[0] / sizes[1]
        _compare_shapes(dense, small, example)
        call = as_call(example)
        counts = [count_macs(m, call.args, call.kwargs).macs for m in (dense, small)]
        found["macs"] = counts[1] / max(counts[0], 1)
        others = dict(_others(dense, example))
        found["sizes"] = "another input size" in others
        for stage, other in others.items():  # noqa: B007
            _compare_shapes(dense, small, other)
        stage = "training"
        _backward(copy.deepcopy(small), example)
        stage = "state dict"
        _compare_restored((blank or restored)(dense, small), small, example)
        found["runs"] = True
        stage = "oracle"
        found["error"] = difference(dense, small, [example, *others.values()], places)
    except Exception as error:
        found["fails"] = f"{stage}: {first_line(error)}"
    return found


def first_line(error: Exception) -> str:
    """Write the kind of an error and how its message begins."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _others(dense: nn.Module, example: Any) -> Iterator[tuple[str, Any]]:
    """Yield inputs that the pruning has not seen, by what is other about them."""
    torch.manual_seed(2)
    yield "new inputs", zoo.fresh(example)
    if _takes(dense, other := zoo.other_batch(zoo.fresh(example), 3)):
        yield "another batch size", other
    sized = (size for size in zoo.other_sizes(zoo.fresh(example)) if _takes(dense, size))
    if (other := next(sized, None)) is not None:
        yield "another input size", other


def _takes(dense: nn.Module, example: Any) -> bool:
    try:
        return all(map(_is_finite, outputs_of(dense, example)))
    except Exception:  # whatever a forward raises for a size it was not made for
        return False


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    """Return the numbers that a network gives in eval mode, from one random state."""
    call = as_call(example)
    torch.manual_seed(0)
    with torch.no_grad():
        return reals(model.eval()(*call.args, **call.kwargs))


def _compare_shapes(dense: nn.Module, small: nn.Module, example: Any) -> None:
    if [t.shape for t in outputs_of(small, example)] != [
        t.shape for t in outputs_of(dense, example)
    ]:
        raise ValueError("the output has another shape")


def restored(dense: nn.Module, small: nn.Module) -> nn.Module:
    """Return the dense network in the sizes of the small one."""
    blank = copy.deepcopy(dense)
    Structure.of(small).apply(blank)
    return blank


def _compare_restored(blank: nn.Module, small: nn.Module, example: Any) -> None:
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    blank.load_state_dict(torch.load(file, weights_only=True))
    pairs = zip(outputs_of(blank, example), outputs_of(small, example), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ValueError("restored from its state dict, it computes something else")


def _backward(model: nn.Module, example: Any) -> None:
    call = as_call(example)
    outputs = tensors(model.train()(*call.args, **call.kwargs))
    total = sum(t.float().square().mean() for t in outputs if t.requires_grad)
    total.backward()  # type: ignore[union-attr]
    if all(p.grad is None for p in model.parameters()):
        raise ValueError("no parameter got a gradient")


def distinct(model: nn.Module) -> None:
    """Give every parameter and batch-norm statistic new random values, no two of a tensor equal.

    Layers that begin at zero, which would hide what is wrong behind them, become like the others.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point() and tensor.numel():
                _fill(tensor, generator)
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                own = (module.running_mean, 0.0), (module.running_var, 1.0), (module.weight, 1.0)
                for tensor, middle in own:
                    if tensor is not None:
                        _draw(tensor, middle, 0.1, generator)


def _fill(tensor: Tensor, generator: torch.Generator) -> None:
    spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
    if tensor.dim() > 1:  # enough for the input to reach the output, against what biases add
        gain = 1.0 if tensor.dim() == 2 else 2**0.5
        spread = max(spread, gain * tensor[0].numel() ** -0.5)
    middle = float(tensor.mean())
    if tensor.numel() <= 2048:
        _draw(tensor, middle, spread if spread > 1e-3 else 0.1, generator)
        return
    if tensor.dim() < 2:
        places = torch.randperm(tensor.numel(), generator=generator)
        tensor.copy_(middle + 0.1 * torch.linspace(-1, 1, tensor.numel())[places])
        return
    # Points of a grid that float32 holds exactly, in a scrambled order; the scale is a power of two.
    points = 2**25
    at = torch.arange(tensor.numel()) + int(torch.randint(points, (), generator=generator))
    for shift, odd in ((13, 0x1C7ED5B), (11, 0x0D35A2F), (14, 0x1000193)):
        at.bitwise_and_(points - 1)
        at.bitwise_xor_(at >> shift).mul_(odd)
    at.bitwise_and_(points - 1)
    scale = 2.0 ** round(math.log2(spread * 3**0.5))
    values = at.double() * (2 / points) - 1  # uniform between -1 and 1
    tensor.copy_((values * scale).view(tensor.shape))


def _draw(tensor: Tensor, middle: float, spread: float, generator: torch.Generator) -> None:
    while True:
        noise = 2 * torch.rand(tensor.shape, generator=generator) - 1
        tensor.copy_(middle + 3**0.5 * spread * noise)
        if tensor.unique().numel() == tensor.numel():
            return


def difference(
    dense: nn.Module,
    small: nn.Module,
    examples: list[Any],
    places: Mapping[str, Tensor] = NOWHERE,
) -> float:
    """Return the largest difference between the pruned and the masked dense network, relative.

    Args:
        dense: The network before.
        small: The network after.
        examples: What both take.
        places: Flat positions of what is left, by name. They are only read for parameters whose rows
            have been scaled (queries, to make up for the width of a head), and then checked.

    Raises:
        LookupError: What is left of a tensor cannot be found in the dense one by its values.
    """
    masked, small = copy.deepcopy(dense).eval(), copy.deepcopy(small).eval()
    _mask_by_value(masked, small, places)
    pair = converted(masked, torch.float64), converted(small, torch.float64)
    worst = _worst(*pair, examples)
    if EXACT < worst < 1e-2 and worst <= 10 * _worst(pair[0], _rounded(pair[0]), examples):
        return EXACT
    return worst


def _worst(masked: nn.Module, small: nn.Module, examples: list[Any]) -> float:
    errors = [error for example in examples for error in _errors(masked, small, example)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _rounded(model: nn.Module) -> nn.Module:
    """Return a copy whose weights are off by as much as float32 rounds."""
    generator, rounded = torch.Generator().manual_seed(3), copy.deepcopy(model)
    with torch.no_grad():
        for tensor in rounded.parameters():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
            tensor.mul_(1 + noise * torch.finfo(torch.float32).eps)
    return rounded


def _mask_by_value(dense: nn.Module, small: nn.Module, places: Mapping[str, Tensor]) -> None:
    """Set to zero, in place, what of the dense network is not in the small one."""
    left = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    parameters = dict(dense.named_parameters())
    normed = dict(_norms_of_weights(parameters))
    with torch.no_grad():
        for name, tensor in parameters.items():
            if name not in normed and tensor.shape != left[name].shape:
                mask = _mask(tensor, left[name], name, places.get(name))
                if name in normed.values():
                    magnitude = next(parameters[m] for m, d in normed.items() if d == name)
                    mask = _with_norms(magnitude, tensor, mask)
                tensor.mul_(mask)
        for name, tensor in dense.named_buffers():
            # Equal filters of all channels need no mask, and are no numbers to be told apart by.
            if tensor.shape != left[name].shape and tensor.unique().numel() == tensor.numel():
                tensor.mul_(_mask(tensor, left[name], name))


def _norms_of_weights(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield magnitude and direction of each weight that is divided by its norm."""
    for name in names:
        for magnitude, direction in (("weight_g", "weight_v"), ("original0", "original1")):
            other = name.removesuffix(magnitude) + direction
            if name.endswith(magnitude) and other in names:
                yield name, other


def _with_norms(magnitude: Tensor, direction: Tensor, mask: Tensor) -> Tensor:
    """Let magnitudes, in place, make up for the norms of what is gone; return the mask of directions.

    Directions that are gone whole keep their numbers, or they were divided by nothing.
    """
    over = [dim for dim, size in enumerate(magnitude.shape) if size == 1]
    shares = (direction * mask).norm(dim=over, keepdim=True) / direction.norm(
        dim=over, keepdim=True
    )
    magnitude.mul_(shares)
    return torch.where(shares > 0, mask, 1.0)


def _errors(masked: nn.Module, small: nn.Module, example: Any) -> list[float]:
    call = cast((as_call(example),), torch.float64)[0]
    statistics_of_dense: list[Tensor] = []
    outputs = []
    for model in (masked, small):
        torch.manual_seed(0)
        with torch.no_grad(), _in_float64(), _OneNumberPerNorm(model, statistics_of_dense):
            outputs.append([t for t in reals(model(*call.args, **call.kwargs)) if t.numel()])
    if [t.shape for t in outputs[0]] != [t.shape for t in outputs[1]]:
        return [math.inf]
    return [float((a - b).abs().max()) / _spread(a) for a, b in zip(*outputs, strict=True)]


@contextmanager
def _in_float64() -> Iterator[None]:
    """Make what a forward makes anew as precise as the rest."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _spread(output: Tensor) -> float:
    """Return how much the samples differ: what is the same for all inputs proves nothing."""
    middle = output.mean(0) if output.dim() else 0.0
    spread = float((output - middle).abs().max())
    if not math.isfinite(spread) or spread < 1e-9 * float(output.abs().max()):
        raise LookupError(f"the dense output varies by {spread:.0e}, which proves nothing")
    return spread


def _mask(dense: Tensor, small: Tensor, name: str, told: Tensor | None = None) -> Tensor:
    """Return ones where the dense tensor's elements are left, zeros where they are gone."""
    if dense.is_complex():
        return _mask(dense.real, small.real, name).to(dense.dtype)
    values, order = dense.flatten().sort()
    if (values[1:] == values[:-1]).any():
        raise LookupError(f"{name} has equal values")
    found = torch.searchsorted(values, small.flatten().contiguous()).clamp_max(len(values) - 1)
    places = order[found]
    if not torch.equal(values[found], small.flatten()):
        if told is None or not _is_scaled(dense, small, told):
            raise LookupError(f"{name} has new values")
        places = told.flatten()
    mask = torch.zeros(dense.numel(), dtype=dense.dtype)
    mask[places] = 1
    return mask.view(dense.shape)


def _is_scaled(dense: Tensor, small: Tensor, places: Tensor) -> bool:
    """Whether each row is the dense one's times a number, the same one for all or none."""
    ratios = (small / dense.flatten()[places]).reshape(len(small), -1)
    first = ratios[:, :1]
    one, other = float(first.min()), float(first.max())
    known = (first - one).abs().minimum((first - other).abs())
    return max(float((ratios - first).abs().max()), float(known.max())) < 1e-4


class _OneNumberPerNorm(TorchFunctionMode):
    """Norms scale by one number per call, that of the first network, and then per channel.

    So they stay what they are for each channel, and nothing hangs on how many channels there are; a mean
    divides by as many as in the first network. Conversions to float32 within a forward become float64.
    """

    def __init__(self, model: nn.Module, numbers: list[Tensor]) -> None:
        super().__init__()
        self.numbers, self.known, self.count = numbers, bool(numbers), 0
        self.modules = [m for m in model.modules() if _is_norm(m)]

    def __enter__(self) -> _OneNumberPerNorm:
        for module in self.modules:
            module.forward = lambda x, *rest, m=module, **_: self._module(m, x, rest)  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for module in self.modules:
            del module.forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "float":
            return args[0].double()
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if name in ("to", "type"):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if name.endswith("grouped_mm"):  # it has no float64
            return _grouped(*args, **kwargs)
        if name in ("layer_norm", "rms_norm", "group_norm") or _standardises(name, args, kwargs):
            bound = dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs
            dim = -1 if name in ("layer_norm", "rms_norm") else 1
            return self._affine(bound["input"], bound.get("weight"), bound.get("bias"), dim)
        result = func(*args, **kwargs)
        if name == "mean" and result.is_floating_point():
            divisor = self._as_before(args[0].new_tensor(args[0].numel() / max(result.numel(), 1)))
            result = result * (args[0].numel() / max(result.numel(), 1) / divisor)
        return result

    def _as_before(self, number: Tensor) -> Tensor:
        """Return what this call gave in the first network: in that itself, this number."""
        if not self.known:
            self.numbers.append(number)
        self.count += 1
        return self.numbers[self.count - 1]

    def _module(self, module: nn.Module, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
        weight, bias = _own(module, "weight scale g gamma"), _own(module, "bias b beta")
        first = "2d" in type(module).__name__.lower() or isinstance(module, nn.GroupNorm)
        first |= getattr(module, "data_format", "") == "channels_first"
        dim = getattr(module, "channel_dim", 1 if first and x.dim() > 2 else -1)
        scaled = self._affine(x, weight, bias, dim)
        for key in ("drop", "act"):  # timm's norms with an activation inside
            if isinstance(getattr(module, key, None), nn.Module):
                scaled = getattr(module, key)(scaled)
        if rest and isinstance(rest[0], Tensor):  # a gated norm
            scaled = scaled * torch.nn.functional.silu(rest[0])
        return scaled

    def _affine(self, x: Tensor, weight: Any, bias: Any, dim: int) -> Tensor:
        with torch._C.DisableTorchFunction():
            x = x / self._as_before(x.square().mean().sqrt().clamp_min(1e-6))
            for verb, tensor in ((torch.mul, weight), (torch.add, bias)):
                if isinstance(tensor, Tensor) and tensor.dim() > 1:
                    x = verb(x, tensor)  # as it is broadcast
                elif isinstance(tensor, Tensor):
                    flat = tensor.reshape(-1)
                    shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
                    x = verb(x, flat.view(shape) if flat.numel() > 1 else flat)
        return x


def _own(module: nn.Module, names: str) -> Any:
    """Return the first tensor that a norm has by one of these names."""
    found = (getattr(module, name, None) for name in names.split())
    return next((tensor for tensor in found if isinstance(tensor, Tensor)), None)


def _grouped(rows: Tensor, weights: Tensor, offs: Tensor, **_: Any) -> Tensor:
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(rows.split(sizes), weights, strict=True)])


_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias"),
    "rms_norm": ("input", "normalized_shape", "weight"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
}


def _is_norm(module: nn.Module) -> bool:
    """Whether a module norms over channels in Python of its own, or through torch's functions."""
    name = type(module).__name__.lower()
    if "layer_norm" in type(module).forward.__code__.co_names:
        return False  # which is seen as it is
    over_channels = re.search(r"layernorm|rms_?norm|groupnorm|responsenorm|simplenorm|grn$", name)
    has_layers = any(list(child.parameters()) for child in module.children())
    return bool(over_channels) and not has_layers


def _standardises(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a batch norm takes its statistics from its input: weights made standard, as a rule."""
    if name != "batch_norm":
        return False
    return (args[1] if len(args) > 1 else kwargs.get("running_mean")) is None
