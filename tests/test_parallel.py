"""Sharded training of modules that know nothing of it, beside one process in float64."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forks import results_of
from results import assert_as_alone
from sharded import CASES, GPT, Experts, Penalty, SharedBlock, SkipsByData, Tied, Towers
from torch import Tensor, nn

from lightning_accel.errors import AccelError, UnsafeFile, Unsupported
from lightning_accel.parallel import Uses, find_units, folders, uses_of
from lightning_accel.parallel.sharding import refuse_hooks
from lightning_accel.parallel.units import given
from lightning_accel.strategies import AccelDDPStrategy, FSDP2Strategy

RUNS = (
    "file_of_adam", "file_of_two_optimizers", "file_with_a_scalar", "folder", "evaluation", "averages",
    "pruned", "pruning", "refused",
)  # fmt: skip
REPLICAS = (
    "all used", "tied", "frozen", "unused", "experts", "toggled", "by hand", "skips", "statistics", "pruned",
    "uneven", "compressed", "by_name", "in_order",
)  # fmt: skip
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return results_of("fsdp_fits.py", tmp_path_factory.mktemp("fits"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return results_of("strategy_runs.py", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return results_of("ddp_fits.py", tmp_path_factory.mktemp("replicas"))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", REPLICAS)
def test_replicas_are_one_process(replicas: Found, name: str) -> None:
    for found in replicas:
        one = found[name]
        numbers = list(one.values()) if isinstance(one, dict) else [one]
        assert all(isinstance(n, float) and n < 1e-11 for n in numbers), one


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", CASES)
def test_a_sharded_fit_is_that_of_one_process(fits: Found, name: str) -> None:
    for found in fits:
        one = found[name]
        assert "error" not in one, one["trace"]
        assert one["moved"] > 1e-4, "the plain fit learns nothing, so nothing is compared"
        assert one["apart"] < 1e-11
        if name != "looks in hooks":  # which has gathered the root in the last hook
            share = 1.0 if name == "copies of shards" else 0.5
            assert one["share"] == pytest.approx(share, abs=0.01)
        assert not one["left"] and one["whole"]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_run_lives_as_one_process_does(runs: Found, name: str) -> None:
    for found in runs:
        assert_as_alone(found[name])


class Runs:
    """Whose pickle makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("where", ["index", "shard", "values"])
def test_a_folder_of_shards_runs_nothing(tmp_path: Path, where: str) -> None:
    ran, folder = tmp_path / "ran", tmp_path / "folder"
    evil = Runs(ran)
    more = {"b": evil} if where == "shard" else {}
    state = {"state_dict": {"weight": torch.ones(2, 3), "bias": torch.zeros(2), **more}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": evil if where == "values" else 3}, folder / "meta.pt")
    if where == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(UnsafeFile, match=r"Path|touch|folder|shard"):
        folders.gathered(folder)
    assert not ran.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_of_shards_is_read_as_one_checkpoint(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    dcp.save({"state_dict": net.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    torch.save({"epoch": 3}, tmp_path / "meta.pt")
    found = folders.gathered(tmp_path)
    assert found["epoch"] == 3 and torch.equal(found["state_dict"]["weight"], net.weight)
    for missing in ("*.distcp", ".metadata"):
        for file in tmp_path.glob(missing):
            file.unlink()
        with pytest.raises(AccelError, match=r"copy the whole folder"):
            folders.gathered(tmp_path)


def tokens() -> Tensor:
    return torch.arange(16).view(2, 8)


def uses(model: Any) -> Uses:
    return uses_of(model, lambda: model.training_step([tokens(), tokens()], 0))


BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (GPT, BLOCKS),
        (Tied, BLOCKS),
        (Penalty, ()),
        (SharedBlock, ()),
        (Experts, ()),
        (Towers, tuple(f"{tower}.layers.{i}" for tower in ("one", "two") for i in range(3))),
    ],
)
def test_units_are_the_blocks_whose_weights_are_their_own(
    make: Any, names: tuple[str, ...]
) -> None:
    model = make()
    assert find_units(model, uses(model)).names == names


def test_a_block_that_runs_in_some_steps_only_is_no_unit() -> None:
    model, odd = SkipsByData(), tokens()
    odd[0, 0] += 1
    found = uses(model)
    found.join(uses_of(model, lambda: model.training_step([odd, odd], 1)))
    units = find_units(model, found)
    assert units.names == ("blocks.0", "blocks.2")
    assert "as often" in units.refused["blocks.1"]
    assert {n for n in found.unsteady() if n.startswith("blocks.1.")} == {
        n for n, _ in model.named_parameters() if n.startswith("blocks.1.")
    }


def test_experts_are_told_by_what_flows_and_not_by_the_tokens_of_one_batch() -> None:
    """Each got a token in this step; that another batch may leave one out is seen by who reads whose output."""
    model = Experts()
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.weight.copy_(torch.randn(4, 8))
    found, step = uses(model), 0
    while not all(any(found.calls[f"experts.{i}"]) for i in range(4)):
        step += 1
        batch = torch.randint(0, 24, (2, 8), generator=torch.Generator().manual_seed(step))
        found.join(uses_of(model, lambda batch=batch: model.training_step([batch, batch], 0)))
    assert set(find_units(model, found).by_data) == {f"experts.{i}" for i in range(4)}


def test_large_layers_are_gathered_by_themselves() -> None:
    net = nn.Sequential(nn.Embedding(2**14, 64), nn.Linear(64, 64), nn.Linear(64, 2**14))
    assert find_units(net).names == ("0", "2")


def test_what_writes_buffers_is_seen() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    found = uses_of(net, lambda: net(torch.randn(4, 2)))
    assert found.buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_reading_what_a_weight_is_does_not_count_as_reading_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def step() -> Any:
        assert net[1].weight.shape == (2, 2) and net[1].weight.device.type == "cpu"
        return net(torch.ones(1, 2).to(net[0].weight.dtype))

    assert not uses_of(net, step).outside
    assert uses_of(net, lambda: (net(torch.ones(1, 2)), net[1].weight.data.clone())).outside == {
        "1": "1.weight"
    }


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (lambda w: w.mul_(1.0), True),
        (lambda w: w.data.mul_(1.0), True),
        (lambda w: w.detach()[0].zero_(), True),
        (lambda w: torch._foreach_mul_([w], 1.0), True),
        (lambda w: nn.init.zeros_(w), True),
        (lambda w: w.__setitem__(0, 1.0), True),
        (lambda w: setattr(w, "data", w.data + 0.0), True),
        (lambda w: torch.add(w.data, 0.0, out=w.data), True),
        (lambda w: w.requires_grad_(False), False),
        (lambda w: setattr(w, "grad", None), False),
        (lambda w: w.mul(2.0).add_(1.0), False),
        (lambda w: w.data.clone().zero_(), False),
    ],
)
def test_what_writes_weights_is_seen_though_it_changes_nothing(write: Any, found: bool) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def step() -> None:
        with torch.no_grad():
            write(net[1].weight)

    assert uses_of(net, step).written == ({"1.weight"} if found else set())


def test_a_block_whose_weights_are_written_in_the_step_is_no_unit() -> None:
    class Clamps(GPT):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for p in self.blocks[1].parameters():
                p.data.clamp_(-1.0, 1.0)
            return self.loss(batch)

    model = Clamps()
    units = find_units(model, uses(model))
    assert units.names == ("blocks.0", "blocks.2") and "blocks.1" in units.refused


def test_gradients_that_a_step_takes_itself_are_seen() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def step() -> None:
        x = torch.ones(1, 2, requires_grad=True)
        torch.autograd.grad(net(x).sum(), x)

    own = torch.autograd.grad
    assert uses_of(net, step).differentiates and torch.autograd.grad is own
    assert not uses_of(net, lambda: net(torch.ones(1, 2)).sum().backward()).differentiates


def test_a_hook_on_the_gradient_of_a_weight_is_refused() -> None:
    net = nn.Linear(2, 2)
    refuse_hooks(dict(net.named_parameters()))
    net.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(Unsupported, match="`weight` has one"):
        refuse_hooks(dict(net.named_parameters()))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((FSDP2Strategy, "units", v) for v in (None, 0, float("nan"), "blocks", ["a", 3], True)),
        *((FSDP2Strategy, "replicas", v) for v in (0, -1, None, 1.5, float("nan"), True, "2")),
        *((FSDP2Strategy, "checkpoints", v) for v in (None, "x", 1)),
        *((FSDP2Strategy, "mp_policy", v) for v in ("bf16", 1)),
        *(
            (FSDP2Strategy, n, 1)
            for n in ("reshard_after_forward", "cpu_offload", "sync_every_batch")
        ),
        *((AccelDDPStrategy, "compression", v) for v in ("int8", 1, True)),
        *((AccelDDPStrategy, "find_unused_parameters", v) for v in (None, "x", 1)),
        *((AccelDDPStrategy, n, None) for n in ("weigh_rows", "gradient_as_bucket_view")),
    ],
)
def test_arguments_that_make_no_sense_say_what_to_do(kind: Any, name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="Do: "):
        kind(**{name: value})


@pytest.mark.parametrize("names", [("nowhere",), ("blocks", "blocks.0"), ("blocks.0", "blocks.0")])
def test_units_that_cannot_be_are_named(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="none within another"):
        given(GPT(), names)
    assert given(GPT(), ("blocks.0",)).names == ("blocks.0",)
