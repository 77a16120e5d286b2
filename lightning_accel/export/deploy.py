"""From a trained model to a folder of files that run without its code, each proved and measured on this machine.

Every candidate is built, opened from its file, and tried on 64 inputs or more beside the model; what answers otherwise,
writes into its input or answers differently the second time is refused (`lightning_accel/export/gates.py`). Who is left is measured beside the
model, in one process in turn. A format that is not faster is never called the best: then the portable one is kept, and
the bundle says so. The folder appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.arguments import finite, flag, instance, one_of, positive, whole
from lightning_accel.arguments import path as as_path
from lightning_accel.errors import AccelError, explain
from lightning_accel.export import (
    backends,
    gates,
    integers,
    manifest,
    place,
    signature,
    structure,
)
from lightning_accel.export.bundle import Bundle, opened
from lightning_accel.export.candidate import (
    Candidate,
    choose,
    kept_formats,
    measure_metric,
    race,
    refuse_failed,
    said_of_speed,
    tried,
)
from lightning_accel.export.cases import differs_on_fast_path, eager, given, known_answers
from lightning_accel.export.gates import Case
from lightning_accel.export.network import FlatNetwork, flat_network, schema_of
from lightning_accel.export.page import page
from lightning_accel.export.program import Traced, fast_path, num_samples, plainly, traced
from lightning_accel.export.schema import Schema
from lightning_accel.export.speed import EAGER
from lightning_accel.progress import progress
from lightning_accel.surgery.acting import nothing_heard
from lightning_accel.surgery.preserve import preserve_rng

_NAMES = ("auto", *backends.FORMATS)


def deploy(
    model: nn.Module,
    example: Any,
    *,
    to: str | PathLike[str],
    formats: str | Sequence[str] = ("auto",),
    batch: int | None = None,
    dynamic: bool | Mapping[str, Mapping[int, str]] = True,
    check: Iterable[Any] | None = None,
    metric: Callable[[Callable[..., Any]], float] | None = None,
    max_drop: float | None = None,
    min_speedup: float = 1.0,
    budget_s: float = 3.0,
    pre: nn.Module | None = None,
    post: nn.Module | None = None,
    quantize: str | None = None,
    calibration: Any = None,
    sign: Any = None,
    overwrite: bool = False,
) -> Bundle:
    """Write a model as files that run without its code, proved and measured here, and open the best of them.

    The model itself is only read: a copy of it is exported, in eval mode, on the CPU.

    Args:
        model: Any module; what is called is `model(*args, **kwargs)`.
        example: Its arguments: a tensor, a tuple of arguments, a dict of those with names, or a `Call` with both. What is
            no tensor in it becomes part of the graph.
        to: A folder that is not there yet, or empty.
        formats: Among "export", "aoti" and "onnx"; "auto" is all that can be had here. One that is named has to come
            through, and is written even if another is faster.
        batch: The largest batch that will be passed; by default any, tried up to twice that of the example.
        dynamic: Whether the batch may vary: dimension 0 of all tensors that have the batch size of the example. Or names
            of further sizes that may, `{"ids": {1: "length"}}`.
        check: More examples to compare answers on, such as batches of a validation.
        metric: Gets a function that is called as the model is, and returns a number, higher is better.
        max_drop: By how much the metric may fall.
        min_speedup: The gain over the model without a graph, in the mean of the example's batch and of one sample, below
            which a format is not called faster.
        budget_s: Seconds of measuring; building and proving come on top.
        pre: Put before the model, into the graph, such as a normalisation.
        post: Put behind it, such as a softmax.
        quantize: "int8" for integers of eight bits; "int4" and less are of weights alone, which are smaller and not faster. A
            model that is quantized already stays so, with its own ranges.
        calibration: For `quantize`, a few batches of the training data.
        sign: A private Ed25519 key, as a PEM file, with which the bundle is signed; `load_bundle(verify=...)` then tells
            whose it is.
        overwrite: Whether a bundle that is at `to` already is replaced.

    Raises:
        ValueError: An argument is out of range, or `to` is taken.
        TypeError: An argument is of another kind.
        AccelError: The model does not run on the example, no format comes through, or one that was named does not.

    >>> import tempfile, torch, warnings
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # so small a network is not faster as a file
    ...     bundle = deploy(net, torch.randn(8, 4), to=f"{folder}/net", formats="export")
    ...     bundle.predict(torch.randn(5, 4)).shape
    torch.Size([5, 3])
    """
    instance("model", model, nn.Module, "a module", "pass a LightningModule or any other nn.Module")
    for name, part in (("pre", pre), ("post", post)):
        instance(name, part, nn.Module, "a module", "pass an nn.Module", none=True)
    names = check_formats(formats)
    check_arguments(dynamic=dynamic, batch=batch, min_speedup=min_speedup, budget_s=budget_s)
    _check_metric(metric, max_drop)
    integers.check(quantize, calibration)
    flag("overwrite", overwrite)
    key = None if sign is None else signature.private_key(sign)
    target = place.free(as_path("to", to), overwrite)
    was_fast = torch.backends.mha.get_fastpath_enabled()
    with progress("exporting"), preserve_rng(), nothing_heard(model), plainly():
        network, notes = flat_network(model, example, pre, post)
        _check_runs(network, example)
        notes += differs_on_fast_path(network) if was_fast else []
        itself, said = integers.quantized(network, quantize, calibration)
        notes += said
        found = traced(network, dynamic, batch)
        for note in found.notes:
            do = "keep sizes out of `forward`, or pass dynamic=False if that is meant"
            warnings.warn(explain("the batch is part of the graph", note, do), stacklevel=2)
        cases, left_out = known_answers(network, found, batch)
        schema = _schema(network, found, cases)
        cases += given(network, check, schema)
        with place.working_folder(target) as work:
            made = tried(names, found, schema, cases, work, integers.floor_db(network, itself))
            known = measure_metric(made, itself, schema, metric, max_drop)
            refuse_failed(made, names)
            model_itself = Candidate(EAGER, metric=known)
            with fast_path(was_fast):
                model_itself.paces = race(made, itself, schema, min_speedup, budget_s)
            best, faster = choose(made, str(num_samples(network.example)), min_speedup)
            notes += [*found.notes, *left_out, *said_of_speed(made, best)]
            _write(
                work,
                kept_formats(made, best, names),
                {
                    "format": best,
                    "faster": faster,
                    "signature": schema.to_dict(),
                    "candidates": [c.to_dict() for c in (model_itself, *made.values())],
                    "host": manifest.host(),
                    "notes": notes,
                },
            )
            if key is not None:
                signature.write(work, manifest.NAME, key)
            place.put(work, target, overwrite)
        classes = structure.classes_in(network.answer(backends.copies(network.example)))
        bundle = opened(target, manifest.read(target), None, classes)
    if not faster:
        do = "use it where the model's code is not, or try a larger example"
        what = "no format is faster than the model itself here"
        warnings.warn(explain(what, "; ".join(said_of_speed(made, best)), do), stacklevel=2)
    return bundle


def check_formats(formats: Any) -> tuple[str, ...]:
    """Return names of formats.

    Raises:
        ValueError: One of them is unknown.
        TypeError: They are no names.
    """
    given = (formats,) if isinstance(formats, str) else formats
    if not isinstance(given, Sequence) or not given:
        raise TypeError(
            explain("`formats` is a list of names", repr(formats), f"pass some of {_NAMES}")
        )
    return tuple(one_of("formats", name, _NAMES) for name in given)


def check_arguments(*, dynamic: Any, batch: Any, min_speedup: Any, budget_s: Any) -> None:
    """Raise unless these are such as `deploy` takes.

    Raises:
        ValueError: One is out of range.
        TypeError: One is of another kind.
    """
    whole("batch", batch, none=True)
    positive("min_speedup", min_speedup)
    positive("budget_s", budget_s, unit="seconds")
    if isinstance(dynamic, bool):
        return
    do = "pass {'ids': {1: 'length'}}"
    what = "true, false, or sizes by the name of an input"
    instance("dynamic", dynamic, Mapping, what, do)
    for named in dynamic.values():
        instance("dynamic", named, Mapping, "names of dimensions", do)
        for dim, name in named.items():
            whole("dynamic", dim, least=0)
            instance("dynamic", name, str, "names of dimensions", do)


def _check_metric(metric: Any, max_drop: Any) -> None:
    finite("max_drop", max_drop, least=0.0, none=True)
    if metric is not None and not callable(metric):
        do = "pass one that gets `predict` and returns a number"
        raise TypeError(explain("`metric` is a function", repr(metric)[:80], do))
    if (metric is None) != (max_drop is None):
        found = "only `max_drop`" if metric is None else "only `metric`"
        what = "`metric` and `max_drop` go together"
        raise ValueError(explain(what, found, "pass both, or none"))


def _check_runs(network: FlatNetwork, example: Any) -> None:
    if not network.example:
        raise TypeError(
            explain(
                "`example` holds tensors",
                repr(example)[:80],
                "pass the arguments of the model's forward",
            )
        )
    try:
        eager(network)(network.example)
    except AccelError:
        raise
    except Exception as error:  # of the user's model
        raise AccelError(
            "the model has to run on the example in eval mode, on the CPU",
            f"{type(error).__name__}: {error}",
            "pass the arguments of its `forward`: a tensor, a tuple of them, or a dict by name",
        ) from error
    answer, reason = gates.answered(eager(network), network.example)
    if reason:
        do = "keep what is drawn at random or counted out of `forward` in eval mode"
        raise AccelError("the model has to answer the same when it is asked twice", reason, do)
    if not _has_nan(network.example) and _has_nan(answer):
        do = "look at its weights: those of a training that diverged are NaN"
        raise AccelError("the model's answers are no numbers", "NaN, to the example itself", do)
    if not answer:
        raise AccelError(
            "the model answers with no tensor",
            "an answer without one",
            "return tensors from `forward`",
        )


def _schema(network: FlatNetwork, found: Traced, cases: Sequence[Case]) -> Schema:
    sizes = {
        name: [case.sample.tensors[index].shape[dim] for case in cases]
        for index, named in enumerate(found.axes)
        for dim, name in named.items()
    }
    return schema_of(network, found.axes, [case.wanted for case in cases], sizes, found.most)


def _write(work: Path, kept: Sequence[str], content: dict[str, Any]) -> None:
    """Remove the files of those that are not kept, and write page and manifest."""
    files = {name: backends.FORMATS[name].file for name in kept}
    for path in work.iterdir():
        # Weights of an ONNX network above 2 GB lie beside it, in a file that begins with its name.
        if not any(
            path.name == file or path.name.startswith(f"{file}.") for file in files.values()
        ):
            path.unlink()
    content = {**content, "formats": files}
    (work / "README.md").write_text(page(content), encoding="utf-8")
    manifest.write(work, content)


def _has_nan(tensors: Iterable[Tensor]) -> bool:
    return any(bool(t.isnan().any()) for t in tensors if gates.is_real(t))
