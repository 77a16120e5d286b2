"""What a look at a training found out, as plain data, and what a finding is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lightning_accel.measure.race import Ratio


class Times(NamedTuple):
    """Seconds of one step, median over those that count; `steps` is how many.

    Attributes:
        data: Waiting for the batch.
        move: Bringing it to the device, with the batch hooks.
        forward: `training_step` without what is named here.
        backward: Gradients.
        optimizer: The optimizers' steps.
        rest: What is left of a step: clipping, zeroing, scaling.
        host: Until a step returns, begun on an idle device; `None` on a CPU, where host and device are one.
        steps: Counted.
    """

    data: float
    move: float
    forward: float
    backward: float
    optimizer: float
    rest: float
    host: float | None = None
    steps: int = 0

    @property
    def work(self) -> float:
        """Seconds of a step without the data."""
        return self.forward + self.backward + self.optimizer + self.rest

    @property
    def total(self) -> float:
        """Seconds from batch to batch.

        >>> Times(1.0, 0.0, 1.0, 1.5, 0.25, 0.25).total
        4.0
        """
        return self.data + self.move + self.work


class Loader(NamedTuple):
    """How the data comes: what the DataLoader says, and what making a batch costs where that was asked.

    Attributes:
        kind: Its class.
        num_workers: 0 where this process reads itself; `None` of what is no DataLoader.
        pin_memory: Whether batches lie in pinned memory.
        persistent: Whether workers stay from epoch to epoch.
        is_stream: Whether the dataset has no indices.
        batches: In an epoch, `None` where nobody knows.
        first_s: Until the first batch of an epoch.
        read_s: To read the items of one batch in one process.
        collate_s: To make a batch of them.
        dataset: Its class.
        collate: Its name.
        in_memory: Whether the dataset is nothing but tensors.
    """

    kind: str
    num_workers: int | None = None
    pin_memory: bool = False
    persistent: bool = False
    is_stream: bool = False
    batches: int | None = None
    first_s: float = 0.0
    read_s: float | None = None
    collate_s: float | None = None
    dataset: str = ""
    collate: str = ""
    in_memory: bool = False


class Sync(NamedTuple):
    """A line of the user's at which the host waits for the device: the call, how often a step, and for how long."""

    call: str
    where: str
    per_step: float
    seconds: float


class Captured(NamedTuple):
    """What capturing graphs of the step's networks gave, over some batches.

    Attributes:
        is_compiled: Whether the training compiles, so that all this happens in it.
        graphs: Captured.
        breaks: The reason by the line at which a graph ended.
        recompilations: The reasons for which something was captured again.
        seconds: That compiling took after the first batches; a lower bound where only graphs were captured.
        steps: Batches after the first ones.
        error: Why nothing could be captured.
    """

    is_compiled: bool = False
    graphs: int = 0
    breaks: Mapping[str, str] = {}
    recompilations: tuple[str, ...] = ()
    seconds: float = 0.0
    steps: int = 0
    error: str = ""


class Memory(NamedTuple):
    """Bytes: what stays (weights, gradients, optimizer), what one sample adds, and what there is room for."""

    fixed: int
    per_sample: float
    room: int
    batch: int | None
    source: str = "counted"

    @property
    def largest(self) -> int | None:
        """Samples for which there is room, a tenth left free; `None` where that is not known.

        >>> Memory(fixed=100, per_sample=10, room=1000, batch=8).largest
        80
        """
        if self.per_sample <= 0 or not self.batch:
            return None
        return max(0, int((0.9 * self.room - self.fixed) / self.per_sample))


class Lane(NamedTuple):
    """One thing done otherwise on a copy, beside the step as it is."""

    gain: Ratio
    verdict: str = ""


class Facts(NamedTuple):
    """All that the findings are made of, so that they can be tried on trainings that are not there.

    Of the `losses` of the steps that were followed some are `lost`: NaN or infinite.
    """

    times: Times
    loader: Loader
    device: str = "cpu"
    cores: int = 1
    threads: int = 1
    others_cores: float | None = 0.0
    batch_size: int | None = None
    precision: str = "32-true"
    dtypes: Mapping[str, int] = {}
    fast_dtypes: tuple[str, ...] = ()
    lanes: Mapping[str, Lane] = {}
    syncs: tuple[Sync, ...] = ()
    prints: tuple[Sync, ...] = ()
    captured: Captured = Captured()
    memory: Memory | None = None
    losses: int = 0
    lost: int = 0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        plain = self._asdict()
        plain |= {"times": self.times._asdict(), "loader": self.loader._asdict()}
        plain["captured"] = self.captured._asdict()
        plain["memory"] = self.memory and {
            **self.memory._asdict(),
            "largest": self.memory.largest,
        }
        plain["lanes"] = {
            name: {"gain": list(lane.gain), "verdict": lane.verdict}
            for name, lane in self.lanes.items()
        }
        plain["syncs"] = [sync._asdict() for sync in self.syncs]
        plain["prints"] = [sync._asdict() for sync in self.prints]
        return plain


class Finding(NamedTuple):
    """What to look at, by what it would give.

    Attributes:
        what: In a few words.
        saves: The share of the time from batch to batch that it would save at most, 0..1; 0 for what costs nothing here.
        found: The numbers.
        how: How they were measured.
        do: The line to change, or the callback to take.
        is_choice: Whether it would change the training, and so is the user's to decide.
        is_broken: Whether the training learns nothing, however fast it is.
    """

    what: str
    saves: float
    found: str
    how: str
    do: str
    is_choice: bool = False
    is_broken: bool = False

    @property
    def costs(self) -> bool:
        """Whether it costs time here that can be had without another training, or all of the training."""
        return self.is_broken or (self.saves > 0 and not self.is_choice)
