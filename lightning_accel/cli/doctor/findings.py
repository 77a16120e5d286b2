"""From what was seen to what to do first: each finding with its number, how that was measured, and the line to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil

from lightning_accel.cli.doctor import lanes
from lightning_accel.cli.doctor.facts import Facts, Finding, Sync

_DATA = 0.05
_MOVE = 0.03
_MOVE_S = 0.001
"""On a CPU nothing is moved; what takes longer is in the hooks."""
_START = 0.02
_WAIT = 0.01
_COMPILING = 0.01
_BATCH = 1.1
"""A rate that much higher is worth telling of a batch twice as large."""
_FULL = 0.9
_BUSY = 0.15
"""Cores that others may take."""
_STEPS = "steps of a copy, on batches as they come"
_BESIDE = "a copy beside the step as it is, in turns; in brackets the 95 % interval"


def findings(facts: Facts) -> list[Finding]:
    """Return what to look at, the most costly first, what costs nothing here at the end.

    >>> from lightning_accel.cli.doctor.facts import Loader, Times
    >>> waits = Times(data=0.03, move=0.0, forward=0.005, backward=0.004, optimizer=0.001, rest=0.0)
    >>> for finding in findings(Facts(waits, Loader("DataLoader", num_workers=0), cores=4)):
    ...     print(f"{finding.saves:.0%}", finding.what)
    75% the step waits for its data
    """
    found = [finding for check in _CHECKS for finding in check(facts)]
    return sorted(found, key=lambda finding: (not finding.is_broken, -finding.saves))


def _lost(facts: Facts) -> Iterator[Finding]:
    if facts.lost:
        yield Finding(
            "losses are no numbers: this training learns nothing, and its speed says little",
            0.0,
            f"{facts.lost} of {facts.losses} losses are NaN or infinite",
            "the steps that were followed",
            "look at the data, the learning rate and the precision; Trainer(detect_anomaly=True) names the operation",
            is_broken=True,
        )


def _data(facts: Facts) -> Iterator[Finding]:
    times, loader = facts.times, facts.loader
    share = times.data / times.total
    if share < _DATA:
        return
    made = ""
    if loader.read_s is not None and loader.collate_s is not None:
        collate = f" (`{loader.collate}`)" if loader.collate else ""
        made = (
            f"; one process needs {_ms(loader.read_s + loader.collate_s)} for a batch: {_ms(loader.read_s)} for items "
            f"of {loader.dataset}, {_ms(loader.collate_s)} to collate them{collate}"
        )
    yield Finding(
        "the step waits for its data",
        share,
        f"{_ms(times.data)} of {_ms(times.total)} from batch to batch, num_workers={loader.num_workers}{made}",
        f"{times.steps} {_STEPS}",
        _do_for_data(facts),
    )


def _do_for_data(facts: Facts) -> str:
    loader, times = facts.loader, facts.times
    if loader.in_memory:
        return (
            f"FastLoading (+accel/loading=auto): {loader.dataset} is tensors in memory, of which it takes whole "
            "batches at once where that is faster"
        )
    if loader.num_workers is None:
        return f"let {loader.kind} make its batches ahead, in a thread or a process of its own"
    cost = times.data if loader.read_s is None else loader.read_s + (loader.collate_s or 0.0)
    if loader.num_workers and loader.read_s is not None and 2 * cost < times.data:
        return (
            f"DataLoader(num_workers=0): this process makes a batch in {_ms(cost)}, sooner than a worker hands "
            "it over; +accel/loading=auto measures that"
        )
    needed = max(1, ceil(cost / max(times.work, 1e-6)))
    heavy = loader.collate_s is not None and loader.collate_s > 2 * (loader.read_s or 0.0)
    where = f"`{loader.collate or 'the collate function'}`" if heavy else f"`{loader.dataset}`"
    spare = max(1, facts.cores - 1)
    if loader.num_workers >= spare:
        return (
            f"make {where} cheaper or do its work once, beforehand: {loader.num_workers} workers on "
            f"{facts.cores} cores cannot do more"
        )
    count = min(spare, max(needed, loader.num_workers + 1))
    stream = "; each worker has to read a part of its own (`get_worker_info`)"
    more = stream if loader.is_stream else ""
    also = f"; {needed} would be needed, so make {where} cheaper as well" if needed > spare else ""
    return (
        f"DataLoader(num_workers={count}, persistent_workers=True){more}{also}. Or +accel/loading=auto, "
        "which measures what loads faster"
    )


def _move(facts: Facts) -> Iterator[Finding]:
    share = facts.times.move / facts.times.total
    if share < _MOVE or (facts.device == "cpu" and facts.times.move < _MOVE_S):
        return
    pins = facts.device == "cuda" and not facts.loader.pin_memory
    yield Finding(
        "bringing batches to the device takes long",
        share,
        f"{_ms(facts.times.move)} of {_ms(facts.times.total)}, pin_memory={facts.loader.pin_memory}",
        f"{facts.times.steps} {_STEPS}; batch hooks are in it",
        "DataLoader(pin_memory=True)"
        if pins
        else "move work out of `on_before_batch_transfer` and `on_after_batch_transfer`, into workers",
    )


def _start(facts: Facts) -> Iterator[Finding]:
    loader, times = facts.loader, facts.times
    if not loader.num_workers or loader.persistent or not loader.batches:
        return
    share = loader.first_s / (loader.first_s + loader.batches * times.total)
    if share >= _START:
        yield Finding(
            "workers start anew in each epoch",
            share,
            f"{_ms(loader.first_s)} until the first batch, {_ms(loader.batches * times.total)} for the {loader.batches} steps of an epoch",
            "the first batch of a fresh iterator",
            "DataLoader(persistent_workers=True)",
        )


def _lanes(facts: Facts) -> Iterator[Finding]:
    found = {
        lanes.BF16: (
            "a shorter precision is faster here, and not used",
            'Trainer(precision="bf16-mixed"), or +accel=amp',
        ),
        lanes.FLOAT32: (
            "weights are of double precision",
            "leave out `.double()` and `torch.set_default_dtype(torch.float64)`, or Trainer(precision='32-true')",
        ),
        lanes.FUSED: (
            "the optimizer runs as a loop over its parameters",
            "torch.optim's `fused=True`, or the callback FusedOptimizer (+accel/loop=fused)",
        ),
        lanes.ANOMALY: (
            "anomaly detection is on",
            "leave out detect_anomaly=True when nothing is being hunted",
        ),
        lanes.THREADS: (
            "torch uses more threads than there are cores",
            f"export OMP_NUM_THREADS={facts.cores}",
        ),
    }
    for name, (what, do) in found.items():
        lane = facts.lanes.get(name)
        if lane is None or lane.verdict:
            continue
        work = facts.times.work / facts.times.total
        saves = work * (1 - 1 / lane.gain.ratio)
        double = facts.dtypes.get("float64", 0)
        numbers = f", {double:,} weights are float64" if name == lanes.FLOAT32 else ""
        yield Finding(what, saves, f"{name} trains a step {lane.gain}{numbers}", _BESIDE, do)


def _doubles(facts: Facts) -> Iterator[Finding]:
    """Told also where it costs nothing measurable."""
    lane = facts.lanes.get(lanes.FLOAT32)
    if facts.dtypes.get("float64") and (lane is None or lane.verdict):
        why = lane.verdict if lane is not None else "not measured"
        yield Finding(
            "weights are of double precision",
            0.0,
            f"{facts.dtypes['float64']:,} weights are float64; {why}",
            _BESIDE,
            "leave out `.double()` unless the method needs it",
        )


def _syncs(facts: Facts) -> Iterator[Finding]:
    by_cost = facts.device != "cpu"
    work = facts.times.total
    for sync in facts.syncs:
        # What the host could do meanwhile, at most all that it does else.
        saves = min(sync.seconds, work - sync.seconds) / work if by_cost else 0.0
        costs = (
            f"the host waits {_ms(sync.seconds)} a step for the device"
            if by_cost
            else "costs nothing on a CPU, where there is no queue to wait for; on an accelerator the host waits "
            "here, and compiled code ends here"
        )
        yield Finding(
            "a line reads a tensor into Python in every step"
            if sync.per_step >= 1
            else "a line reads a tensor into Python in some steps",
            max(0.0, saves) if saves >= _WAIT else 0.0,
            f"{sync.where}: {sync.call}, {sync.per_step:.3g} times a step; {costs}",
            "steps of a copy in which each call on tensors is looked at",
            _do_for_sync(sync),
        )


def _do_for_sync(sync: Sync) -> str:
    if sync.where.endswith("(in torchmetrics)"):
        return "pass validate_args=False to the metric, which looks at the values of each batch otherwise"
    if sync.call in ("[mask]", ".nonzero()", ".argwhere()", ".masked_select()", ".unique()"):
        return "use `torch.where` or a weight of 0, whose shapes do not depend on values"
    if sync.call == "as text":
        return "print every n-th step only, or leave it to `self.log`"
    if sync.call == "if tensor":
        return "use `torch.where`, or decide from what Python knows already"
    return (
        "pass tensors: `self.log` takes them as they are, sums may stay on the device (`.detach()`)"
    )


def _prints(facts: Facts) -> Iterator[Finding]:
    told = {sync.where for sync in facts.syncs if sync.call == "as text"}
    for line in (line for line in facts.prints if line.where not in told):
        yield Finding(
            "a line prints in the step",
            0.0,
            f"{line.where}: {line.per_step:.3g} times a step",
            "the standard output of steps of a copy",
            "print every n-th step, or use `self.log`",
        )


def _graphs(facts: Facts) -> Iterator[Finding]:
    found = facts.captured
    if found.recompilations:
        share = found.seconds / found.steps / (facts.times.total + found.seconds / found.steps)
        again, why = len(found.recompilations), " ".join(found.recompilations[0].split())
        costs = found.is_compiled and share >= _COMPILING
        yield Finding(
            "compiled code is compiled again in mid-training"
            if found.is_compiled
            else "compiled, this would be compiled again and again",
            share if costs else 0.0,
            f"{again} times in {found.steps} steps, {_ms(found.seconds / found.steps)} for each of these: {why}. Dynamo gives up after some, and runs eagerly",
            "graphs captured on batches as they come",
            "make what changes a tensor or a constant, pad batches to few sizes, or BlockCompile(dynamic=True); "
            "BlockCompile runs what no graph fits eagerly rather than compile it in mid-training",
        )
    for at, why in found.breaks.items():
        yield Finding(
            "a graph breaks" if found.is_compiled else "compiled, a graph would break",
            0.0,
            f"{at}: {why}",
            "graphs captured on batches as they come",
            "write the line in operations on tensors, or keep that part out by BlockCompile(select=...)",
        )


def _memory(facts: Facts) -> Iterator[Finding]:
    memory = facts.memory
    if memory is None or memory.batch is None:
        return
    needed = memory.fixed + memory.per_sample * memory.batch
    if memory.room and needed > _FULL * memory.room:
        yield Finding(
            "memory is nearly full",
            0.0,
            f"{_mib(needed)} of {_mib(memory.room)} at batch {memory.batch}",
            f"bytes of a step on a copy, {memory.source}",
            "ActivationCheckpointing or ActivationBudget (+accel/memory=budget), or a smaller batch",
        )


def _larger(facts: Facts) -> Iterator[Finding]:
    size, lane = facts.batch_size, facts.lanes.get(lanes.DOUBLE)
    largest = facts.memory.largest if facts.memory else None
    if not size or lane is None or lane.verdict or lane.gain.low < _BATCH:
        return
    if largest is not None and largest < 2 * size:
        return
    room = f"; there is memory for {fits(facts)}" if largest else ""
    work = facts.times.work / facts.times.total
    yield Finding(
        "a larger batch trains more samples a second",
        work * (1 - 1 / lane.gain.ratio),
        f"batches of {2 * size} in place of {size} train {lane.gain} as many samples{room}",
        _BESIDE,
        f"batch_size={2 * size}, with the learning rate found anew",
        is_choice=True,
    )


def _host(facts: Facts) -> Iterator[Finding]:
    times = facts.times
    if times.host is None or times.host < 0.9 * times.work or any(s.seconds for s in facts.syncs):
        return
    yield Finding(
        "the device waits for Python",
        0.0,
        f"a step begun on an idle device returns after {_ms(times.host)} of {_ms(times.work)}",
        "until a step returns, and until the device is done",
        "BlockCompile (+accel=compile), with CUDA graphs for small steps; larger batches; fused optimizer",
    )


def _threads(facts: Facts) -> Iterator[Finding]:
    workers = facts.loader.num_workers or 0
    wanted = workers + (facts.threads if facts.device == "cpu" else 1)
    if workers and wanted > facts.cores + 1 and facts.times.data < _DATA * facts.times.total:
        yield Finding(
            "workers and threads are more than the cores",
            0.0,
            f"{workers} workers and {facts.threads} threads on {facts.cores} cores",
            "what the DataLoader and torch say",
            "fewer workers: the step does not wait for its data",
        )


def _others(facts: Facts) -> Iterator[Finding]:
    others = facts.others_cores or 0.0
    spare = max(0, facts.cores - facts.threads)
    if others <= spare + _BUSY:
        return
    yield Finding(
        "other work is on this machine",
        0.0,
        f"{others:.1f} of {facts.cores} cores were taken by others while this was measured",
        "processor time of all processes",
        "end it, or look again when it is done: all times here are as it lets them be",
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def fits(facts: Facts) -> str:
    """Say for how large a batch there is memory; beyond a thousand times this one the number says nothing."""
    memory = facts.memory
    if memory is None or memory.batch is None or memory.largest is None:
        return "a batch of unknown size"
    if memory.largest > 1000 * memory.batch:
        return "a batch more than 1,000 times as large"
    return f"a batch of about {rounded(memory.largest)}"


def rounded(number: int) -> str:
    """Say a number by its first two digits.

    >>> rounded(4480153), rounded(87)
    ('4,500,000', '87')
    """
    digits = max(0, len(str(number)) - 2)
    return f"{round(number, -digits):,}"


def _mib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


_CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    *(_lost, _data, _move, _start, _lanes, _doubles, _syncs, _prints, _graphs),
    *(_memory, _larger, _host, _threads, _others),
)
