"""The choice of units as a QUBO, for an annealer: simulated by default, D-Wave's if you have a token.

Which `remove` units go is, on G of `reconstruction`, a quadratic problem over bits:

    min_z  z^T G z + penalty * (sum z - remove)^2,      z in {0, 1}^units.

It is encoded, sampled, decoded and then made right: every sample is repaired to the exact number of
units and polished by swaps, and the best of them and of greedy + swap is returned. So the answer is never
worse than greedy + swap, whatever the sampler did; samples that are used as they come are worse (their
penalty is a compromise: too weak and the number is wrong, too strong and the rest is noise).

Large groups are cut down first: of the greedy + swap answer only the most ambiguous units (those whose
cost is next to the border between removed and kept) become variables. That keeps a problem, which is
dense, within reach of a quantum annealer.

What this is: redundancy-aware, quantum-ready, a simulator by default. No speed-up is claimed.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import warnings
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_accel.arguments import finite, one_of, whole
from lightning_accel.errors import Unsupported, explain
from lightning_accel.pruning.reconstruction import check_gram, energy, greedy, swap
from lightning_accel.redact import redacted

Sampler = Literal["sa", "sqa", "tabu", "greedy", "exact", "dwave"]
SAMPLERS = get_args(Sampler)
_EXACT = 20  # variables that can be enumerated: 2^20 samples in about two seconds
_POLISHED = 64  # distinct samples that are decoded, the best ones first


class QuboReport(NamedTuple):
    """What one choice was.

    Attributes:
        sampler: Which sampler gave the samples ("sa" after a fall-back).
        variables: Number of bits; less than the units if the group was cut down.
        energy: z^T G z of the answer.
        greedy_energy: The same of greedy + swap, which is never lower.
        gap: Share by which the answer lies below greedy + swap, 0..1.
        feasible: Share of samples that had the right number of units before repair, 0..1.
        seconds: Time of the whole choice.
        fallback: Why the QPU was not used; empty if it was, or was not asked for.
    """

    sampler: str
    variables: int
    energy: float
    greedy_energy: float
    gap: float
    feasible: float
    seconds: float
    fallback: str = ""


class QuboSelector:
    """Choose units to remove by sampling a QUBO; needs the extra `[quantum]`.

    Args:
        sampler: "sa" simulated annealing, "sqa" simulated quantum (path-integral) annealing, "tabu",
            "greedy" steepest descent from random starts, "exact" enumeration of up to 20 units, or
            "dwave": a D-Wave QPU (package dwave-system, token in `DWAVE_API_TOKEN`), where errors and
            timeouts fall back to "sa" with a warning.
        num_reads: Number of samples.
        num_sweeps: Sweeps per sample of "sa" and "sqa".
        seed: Same seed, same answer; not on a QPU, and not of "sqa", whose sampler (dwave-samplers 1.8.0)
            draws anew each time: a run resumed before its prune may choose otherwise.
        max_variables: Larger groups are cut down to this many units.
        penalty: Weight of the number of units, relative to what a unit at the border between removed and
            kept costs. Weaker, few samples have the right number; stronger, all do and are worse.
        timeout_s: How long to wait for a QPU, in seconds.

    Attributes:
        report: The `QuboReport` of the last choice, `None` before it.

    Raises:
        ImportError: The extra is not installed.

    >>> pair = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.5]])
    >>> QuboSelector()(pair, 2)  # doctest: +SKIP
    [0, 2]
    """

    def __init__(
        self,
        sampler: Sampler = "sa",
        *,
        num_reads: int = 32,
        num_sweeps: int = 1000,
        seed: int = 0,
        max_variables: int = 128,
        penalty: float = 1.0,
        timeout_s: float = 60.0,
    ) -> None:
        one_of("sampler", sampler, SAMPLERS)
        whole("num_reads", num_reads)
        whole("num_sweeps", num_sweeps)
        whole("max_variables", max_variables)
        finite("penalty", penalty, above=0.0)
        finite("timeout_s", timeout_s, above=0.0, unit="seconds")
        require_extra()
        self.sampler, self.num_reads, self.num_sweeps = sampler, num_reads, num_sweeps
        self.seed, self.max_variables, self.penalty = seed, max_variables, penalty
        self.timeout_s = timeout_s
        self.report: QuboReport | None = None

    def __call__(self, gram: Tensor, remove: int) -> list[int]:
        """Return `remove` units in ascending order; `gram` is G of one group.

        Raises:
            ValueError: `gram` or `remove` is no such thing, or it is too large for "exact".
            Unsupported: "dwave" without its package or token.
        """
        start = time.perf_counter()
        check_gram(gram, remove)
        gram = gram.detach().double().cpu()
        known = swap(gram, greedy(gram, remove))
        answer, share, fallback = known, 1.0, ""
        used: str = self.sampler
        cost, border = costs(gram, known)
        free = most_ambiguous(cost, border, self.max_variables)
        if 0 < remove < len(gram) and float(gram.abs().max()) > 0:
            weight = self.penalty * max(border, 1e-3 * float(gram.abs().max()))
            model = encode(*subproblem(gram, known, free), penalty=weight)
            bits, used, fallback = self._sample(model)
            answer, share = decode(gram, known, free, bits)
        lowest, reference = energy(gram, answer), energy(gram, known)
        gap = (reference - lowest) / reference if reference > 0 else 0.0
        seconds = time.perf_counter() - start
        self.report = QuboReport(used, len(free), lowest, reference, gap, share, seconds, fallback)
        return answer

    def _sample(self, model: Any) -> tuple[Tensor, str, str]:
        name = self.sampler
        if name == "dwave":
            sampler = _device()
            try:
                return _bits(self._on_device(sampler, model)), name, ""
            except Exception as error:  # a queue, a network, an embedding: all end in the simulator
                reason = redacted(f"{type(error).__name__}: {error}")
            warnings.warn(
                explain("the QPU gave no samples", reason, "the simulator `sa` is used instead"),
                stacklevel=3,
            )
            return _bits(self._simulate(model, "sa")), "sa", reason
        return _bits(self._simulate(model, name)), name, ""

    def _simulate(self, model: Any, name: str) -> Any:
        import dimod
        from dwave import samplers

        reads, seed = self.num_reads, self.seed
        if name == "exact":
            if model.num_variables > _EXACT:
                do = "use sampler='sa', or lower `max_variables`"
                found = f"{model.num_variables} units"
                raise ValueError(explain(f"'exact' takes at most {_EXACT} units", found, do))
            return dimod.ExactSolver().sample(model)
        if name == "tabu":  # ends by restarts, not by time: the same seed gives the same samples
            return samplers.TabuSampler().sample(
                model, num_reads=reads, seed=seed, num_restarts=10, timeout=10**6
            )
        if name == "greedy":
            return samplers.SteepestDescentSampler().sample(model, num_reads=reads, seed=seed)
        kinds: dict[str, Any] = {
            "sa": samplers.SimulatedAnnealingSampler,
            "sqa": samplers.PathIntegralAnnealingSampler,
        }
        return kinds[name]().sample(model, num_reads=reads, num_sweeps=self.num_sweeps, seed=seed)

    def _on_device(self, make: Any, model: Any) -> Any:
        def work() -> Any:
            sampler = make()
            largest = int(sampler.largest_clique_size)
            if model.num_variables > largest:
                found = f"{model.num_variables} variables"
                do = f"pass max_variables={largest}"
                raise ValueError(explain(f"the QPU embeds at most {largest}", found, do))
            answer = sampler.sample(model, num_reads=self.num_reads)
            answer.resolve()
            return answer

        return _within(self.timeout_s, work)


def require_extra() -> None:
    """Raise `ImportError` that names the extra unless the samplers are installed."""
    try:
        import dimod  # noqa: F401
        import dwave.samplers  # noqa: F401
    except ImportError as error:
        what = "choosing units by a QUBO needs the packages dimod and dwave-samplers"
        do = "pip install lightning-accel[quantum], or choose by GreedySwapSelector"
        raise ImportError(explain(what, str(error), do)) from None


def costs(gram: Tensor, removed: list[int]) -> tuple[Tensor, float]:
    """Return what each unit costs, shape (units,), and the border between removed and kept ones.

    A removed unit's cost is what putting it back saves, a kept one's what removing it adds.

    >>> costs(torch.diag(torch.tensor([1.0, 2.0, 3.0, 9.0])).double(), [0, 1])
    (tensor([1., 2., 3., 9.], dtype=torch.float64), 2.5)
    """
    gone = torch.zeros(len(gram), dtype=torch.bool)
    gone[removed] = True
    pull, own = 2 * gram @ gone.double(), gram.diagonal()
    cost = torch.where(gone, pull - own, pull + own)
    if gone.all() or not gone.any():
        return cost, 0.0
    return cost, float(cost[gone].max() + cost[~gone].min()) / 2


def most_ambiguous(cost: Tensor, border: float, count: int) -> list[int]:
    """Return at most `count` units, those whose cost is nearest to the border.

    >>> most_ambiguous(torch.tensor([1.0, 2.0, 3.0, 9.0]), 2.5, 2)
    [1, 2]
    """
    return sorted((cost - border).abs().argsort(stable=True)[:count].tolist())


def subproblem(gram: Tensor, removed: list[int], free: list[int]) -> tuple[Tensor, Tensor, int]:
    """Return linear and quadratic part over the `free` units, and how many of them go; the rest stays."""
    fixed = torch.zeros(len(gram), dtype=torch.float64)
    fixed[removed] = 1.0
    fixed[free] = 0.0
    index = torch.tensor(free)
    return 2 * (gram @ fixed)[index], gram[index][:, index], len(set(removed) & set(free))


def encode(linear: Tensor, quadratic: Tensor, count: int, *, penalty: float) -> Any:
    """Return the binary quadratic model of choosing `count` bits, relative to the largest entry."""
    import dimod

    scale = float(quadratic.abs().max()) or 1.0
    ones = (linear + quadratic.diagonal() + penalty * (1 - 2 * count)) / scale
    pairs = ((2 * quadratic + 2 * penalty) / scale).triu(1)
    offset = penalty * count**2 / scale
    return dimod.BinaryQuadraticModel(ones.numpy(), pairs.numpy(), offset, dimod.Vartype.BINARY)


def decode(
    gram: Tensor, known: list[int], free: list[int], bits: Tensor
) -> tuple[list[int], float]:
    """Return the best choice that the samples lead to, and the share of them that was feasible.

    Args:
        gram: G of the group.
        known: A choice of the right number of units; the answer is never worse.
        free: Units that the bits stand for; the others are as in `known`.
        bits: Samples, shape (reads, free units), the lowest in energy first.
    """
    fixed = sorted(set(known) - set(free))
    count = len(known) - len(fixed)
    right = bits.sum(1) == count
    index = torch.tensor(free)
    best, lowest = known, energy(gram, known)
    distinct = dict.fromkeys(map(tuple, bits[right][:_POLISHED].tolist()))
    distinct |= dict.fromkeys(map(tuple, bits[~right][:_POLISHED].tolist()))
    for row in distinct:
        chosen = index[torch.tensor(row, dtype=torch.bool)].tolist()
        candidate = swap(gram, repair(gram, fixed + chosen, free, len(known)))
        value = energy(gram, candidate)
        if value < lowest:
            best, lowest = candidate, value
    return best, float(right.double().mean())


def repair(gram: Tensor, removed: list[int], free: list[int], count: int) -> list[int]:
    """Put back, or remove, `free` units one by one, the cheapest first, until `count` are removed.

    >>> repair(torch.diag(torch.tensor([3.0, 1.0, 2.0])).double(), [0, 1, 2], [0, 1, 2], 2)
    [1, 2]
    """
    gone = torch.zeros(len(gram), dtype=torch.bool)
    gone[removed] = True
    movable = torch.zeros_like(gone)
    movable[free] = True
    pull, own = 2 * gram @ gone.double(), gram.diagonal()
    while (left := int(gone.sum()) - count) != 0:
        cost = (own - pull) if left > 0 else (own + pull)
        allowed = movable & (gone if left > 0 else ~gone)
        unit = int(cost.masked_fill(~allowed, float("inf")).argmin())
        gone[unit] = left < 0
        pull += (2 if left < 0 else -2) * gram[unit]
    return gone.nonzero()[:, 0].tolist()


def _bits(samples: Any) -> Tensor:
    """Return samples as (reads, variables) in the order of variables, the lowest in energy first."""
    order = [list(samples.variables).index(i) for i in range(len(samples.variables))]
    rows = samples.record.sample[samples.record.energy.argsort(kind="stable")][:, order]
    return torch.from_numpy(rows.astype("int64"))


def _device() -> Any:
    """Return what opens the QPU; the token stays in the environment, where its client reads it."""
    do = "pip install dwave-system and set DWAVE_API_TOKEN, or use sampler='sa'"
    try:
        from dwave.system import DWaveCliqueSampler
    except ImportError as error:
        raise Unsupported("a D-Wave QPU needs the package dwave-system", str(error), do) from None
    if not os.environ.get("DWAVE_API_TOKEN"):
        raise Unsupported("a D-Wave QPU needs a token", "no DWAVE_API_TOKEN", do)
    return DWaveCliqueSampler


def _within(seconds: float, work: Any) -> Any:
    """Return what `work` does, in a daemon thread so that a dead connection holds nothing up."""
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:  # raised again in the caller's thread
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return answer
