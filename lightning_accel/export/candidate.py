"""One format on its way into a bundle: built, opened from its file, tried, measured, and chosen or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_accel.errors import AccelError
from lightning_accel.export import backends, gates, speed, structure
from lightning_accel.export.cases import eager
from lightning_accel.export.gates import Case, Verdict
from lightning_accel.export.network import FlatNetwork
from lightning_accel.export.program import BATCH, Traced, num_samples
from lightning_accel.export.schema import Predictor, Runner, Schema
from lightning_accel.export.speed import EAGER, Pace


@dataclass
class Candidate:
    """One format with all that became known of it; without a runner where it was refused."""

    name: str
    runner: Runner | None = None
    path: Path | None = None
    verdict: Verdict = field(default_factory=Verdict)
    metric: float | None = None
    paces: dict[str, Pace] = field(default_factory=dict)

    def refuse(self, reason: str) -> None:
        """Leave it out of the race, and keep the reason."""
        self.verdict, self.runner = self.verdict._replace(reason=reason), None

    @property
    def mean_gain(self) -> float:
        """The geometric mean of the gains over the batches measured."""
        return math.prod(p.gain.ratio for p in self.paces.values()) ** (1 / len(self.paces))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; an infinite ratio, of equal answers, is `None`."""
        found = self.verdict
        size = self.path.stat().st_size if self.path is not None and self.path.exists() else None
        slow = [size for size, pace in self.paces.items() if pace.verdict]
        tried = found.num_inputs > 0
        return {
            "format": self.name,
            "reason": found.reason,
            "num_inputs": found.num_inputs,
            "sqnr_db": found.sqnr_db if tried and math.isfinite(found.sqnr_db) else None,
            "max_abs_error": found.max_abs_error
            if tried and math.isfinite(found.max_abs_error)
            else None,
            "agreement": found.agreement,
            "metric": self.metric if self.metric is None or math.isfinite(self.metric) else None,
            "bytes": size,
            "paces": {size: pace.to_dict() for size, pace in self.paces.items()},
            "said": f"not faster at batch {' and '.join(slow)}" if slow else "",
        }


def tried(
    names: Sequence[str],
    found: Traced,
    schema: Schema,
    cases: Sequence[Case],
    work: Path,
    floor_db: float = gates.FLOOR_DB,
) -> dict[str, Candidate]:
    """Build, open and try every format that is asked for."""
    made = {}
    for name in backends.FORMATS:
        if name not in names and "auto" not in names:
            continue
        made[name] = candidate = Candidate(name)
        try:
            candidate.path = backends.build(name, found.program, found.example, schema, work)
            candidate.runner = backends.load(name, candidate.path, schema)
        except Exception as error:  # of exporters and compilers, of many kinds
            candidate.refuse(_said_by(error))
            continue
        candidate.verdict = gates.proved(candidate.runner, cases, floor_db)
        if candidate.verdict.reason:
            candidate.refuse(candidate.verdict.reason)
    return made


def measure_metric(
    made: Mapping[str, Candidate],
    network: FlatNetwork,
    schema: Schema,
    metric: Callable[[Any], float] | None,
    max_drop: float | None,
) -> float | None:
    """Refuse who loses more of the metric than it may, and return that of the model.

    Raises:
        ValueError: The metric of the model is no number.
    """
    if metric is None or max_drop is None:
        return None
    known = gates.eager_metric(metric, Predictor(schema, eager(network)))
    for candidate in made.values():
        if candidate.runner is not None:
            predict = Predictor(schema, candidate.runner)
            candidate.metric, reason = gates.kept_metric(metric, known, predict, max_drop)
            if reason:
                candidate.refuse(reason)
    return known


def refuse_failed(made: Mapping[str, Candidate], names: Sequence[str]) -> None:
    """Raise where nobody is left, or somebody who was asked for by name is not.

    Raises:
        AccelError: So it is.
    """
    failed = {name: c.verdict.reason for name, c in made.items() if c.runner is None}
    said = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    if len(failed) == len(made):
        raise AccelError(
            "no format comes through, and nothing was written", said, "see what each says"
        )
    if set(failed) & set(names):
        raise AccelError(
            "a format that was asked for does not come through, and nothing was written",
            said,
            "leave it out of `formats`",
        )


def choose(made: Mapping[str, Candidate], size: str, least: float) -> tuple[str, bool]:
    """Return the fastest candidate, and whether it is faster than the model; if none is, the fastest portable one.

    Faster is who gains in the geometric mean over the batches, measurably at one of them, and is not slower at `size`.

    Args:
        made: The candidates, those without a runner included.
        size: The batch of the example.
        least: The mean gain that is asked for.
    """
    passed = {name: c for name, c in made.items() if c.runner is not None}
    faster = {
        name: c
        for name, c in passed.items()
        if c.mean_gain >= least
        and any(not pace.verdict for pace in c.paces.values())
        and not c.paces[size].verdict.startswith("slower")
    }
    portable = {name: c for name, c in passed.items() if backends.FORMATS[name].portable}
    among = faster or portable or passed
    return max(among, key=lambda name: among[name].mean_gain), bool(faster)


def race(
    made: Mapping[str, Candidate],
    network: FlatNetwork,
    schema: Schema,
    least: float,
    budget_s: float,
) -> dict[str, Pace]:
    """Measure who is left at the batch of the example and at 1, and return the times of the model."""
    passed = [c for c in made.values() if c.runner is not None]
    own = {}
    sizes = _race_sizes(network, schema)
    for size in sizes:
        itself = _call(network.call, network, schema, size)
        calls = {
            c.name: _call(Predictor(schema, c.runner), network, schema, size)
            for c in passed
            if c.runner is not None
        }
        found = speed.paces(itself, calls, least=least, budget_s=budget_s / len(sizes))
        own[str(size)] = found[EAGER]
        for candidate in passed:
            candidate.paces[str(size)] = found[candidate.name]
    return own


def _race_sizes(network: FlatNetwork, schema: Schema) -> list[int]:
    present = num_samples(network.example)
    if present == 1 or not any(BATCH in spec.shape for spec in schema.inputs):
        return [present]
    try:
        _call(network.call, network, schema, 1)()
    except Exception:  # of a network that takes a mean over its batch, say
        return [present]
    return [present, 1]


def _said_by(error: BaseException) -> str:
    """Return what the innermost cause of an error says: exporters wrap it in advice on how to debug them."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0][:200]}"


def _call(target: Any, network: FlatNetwork, schema: Schema, size: int) -> Callable[[], Any]:
    tensors = [
        t[:size] if spec.shape and spec.shape[0] == BATCH else t
        for spec, t in zip(schema.inputs, network.example, strict=True)
    ]
    held = structure.decode(network.arguments, backends.copies(tensors), network.classes)
    args = [held.pop(name) for name in network.parameter_names[: network.positional]]
    if isinstance(target, Predictor):
        return lambda: target(*args, **held)
    return lambda: target(args, held)


def kept_formats(made: Mapping[str, Candidate], best: str, names: Sequence[str]) -> list[str]:
    """Return which files go into the bundle: the best, those that were named, and a portable one."""
    passed = [name for name, c in made.items() if c.runner is not None]
    kept = [name for name in passed if name in (best, "onnx") or name in names]
    if not any(backends.FORMATS[name].portable for name in kept):
        kept += [name for name in passed if backends.FORMATS[name].portable]
    return kept


def said_of_speed(made: Mapping[str, Candidate], best: str) -> list[str]:
    """Return at which batch the one that was chosen is not faster than the model."""
    paces = made[best].paces.items()
    return [f"at batch {size} {best} is not faster: {p.verdict}" for size, p in paces if p.verdict]
