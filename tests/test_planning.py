"""What a plan says a device needs, beside what an allocator gave and what shares of weights must be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forks import results_of
from lightning.pytorch.strategies import SingleDeviceStrategy
from sharded import Block, Convolutions, data, made, trainer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_accel.cli.devices import size
from lightning_accel.cli.main import main
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.parallel.accelerators import ACCELERATORS, seconds
from lightning_accel.parallel.choice import options
from lightning_accel.parallel.live_bytes import LiveBytes, TooLarge
from lightning_accel.parallel.meta import materialize
from lightning_accel.parallel.planning import Option, Workload, estimate
from lightning_accel.strategies import AutoStrategy

MIB = 2**20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(100, 128)
        self.blocks = nn.ModuleList(Block(128, 4) for _ in range(4))
        self.head = nn.Linear(128, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def work(**given: Any) -> Workload:
    plain = {
        "make": Net, "batch": lambda: torch.zeros(4, 256, dtype=torch.int64), "step": loss,
        "optimizer": lambda m: torch.optim.AdamW(m.parameters(), foreach=False),
    }  # fmt: skip
    return Workload(**{**plain, **given})


def allocated(tmp_path: Path) -> int:
    """Return the most bytes that the allocator gave in the second step."""
    one = work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model, batch = one.make(), one.batch()
        optimizer = one.optimizer(model)
        for _ in range(2):
            optimizer.zero_grad()
            one.step(model, batch).backward()
            optimizer.step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    seen = [e["args"] for e in events if e.get("name") == "[memory]"]
    base = seen[0]["Total Allocated"] - seen[0]["Bytes"]  # what others hold in this process
    return max(args["Total Allocated"] for args in seen) - base


def test_one_device_is_what_the_allocator_gives(tmp_path: Path) -> None:
    planned = estimate(work(), Option("single"))
    assert planned.peak == pytest.approx(allocated(tmp_path), rel=0.01)
    assert sum(planned.parts.values()) == pytest.approx(planned.peak, rel=0.011)
    weights = sum(p.numel() * 4 for p in Net().parameters())
    assert planned.parts["weights"] == weights
    assert planned.parts["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert planned.states == pytest.approx(4 * weights, rel=0.01)


def test_shards_and_splits_divide_what_they_should() -> None:
    one = estimate(work(), Option("single"))
    fsdp = estimate(work(), Option("fsdp", 4))
    both = estimate(work(), Option("fsdp_tensor", 4, 2))
    split = estimate(work(), Option("tensor", 2, 2))
    assert fsdp.states == pytest.approx(one.states / 4, rel=0.01)
    assert fsdp.parts["optimizer"] == pytest.approx(one.parts["optimizer"] / 4, rel=0.02)
    assert fsdp.parts["activations"] == pytest.approx(one.parts["activations"], rel=0.1), (
        "which FSDP leaves"
    )
    assert one.states / 2 < split.states < one.states * 0.65
    assert both.states == pytest.approx(split.states / 2, rel=0.05)
    assert split.flops < one.flops * 0.6 and split.sent["between"] > 0 == split.sent["beside"]
    weights = sum(p.numel() * 4 for p in Net().parameters())
    assert fsdp.sent["beside"] == pytest.approx(3 * weights, rel=0.1), "gathered twice, summed once"


def test_checkpointing_takes_activations_away() -> None:
    plain, less = (estimate(work(), Option("single", checkpointing=c)) for c in (False, True))
    assert less.parts.get("activations", 0) < plain.parts["activations"] / 2
    assert less.flops > plain.flops * 1.2


def test_beyond_a_limit_nothing_further_is_run() -> None:
    steps: list[int] = []

    def counted(model: Any, tokens: Tensor) -> Tensor:
        steps.append(1)
        return loss(model, tokens)

    one = work(step=counted)
    states = estimate(work(), Option("single")).states
    found = estimate(one, Option("single"), limit=states - 1)
    assert found.peak is None and "alone" in found.why and not steps
    found = estimate(one, Option("single"), limit=int(states * 1.3))
    assert found.peak is None and found.why == "weights and activations" and len(steps) == 1


def test_nothing_is_left_of_a_group_that_never_was() -> None:
    resize = torch.UntypedStorage.resize_
    with pytest.raises(AccelError, match="hold no numbers.*--example"):
        estimate(work(step=lambda m, b: m(b).sum() * m(b).sum().item()), Option("fsdp", 2))
    assert not dist.is_initialized() and torch.UntypedStorage.resize_ is resize


def test_a_group_that_runs_is_left_alone(tmp_path: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    with pytest.raises(Unsupported, match="a process of its own"):
        estimate(work(), Option("fsdp", 2))


def test_storages_count_while_they_live_and_as_large_as_they_are() -> None:
    kept = torch.zeros(256)
    live = LiveBytes(lambda: {"weights": [kept]})
    with live:
        assert live.live == 1024
        a = torch.ones(512)
        b = a + 1
        assert live.live == 1024 + 4096
        del a
        assert live.live == 1024 + 2048
        b.untyped_storage().resize_(0)
        assert live.live == 1024
        b.untyped_storage().resize_(4096)
        assert live.live == 1024 + 4096
    assert live.peak == 1024 + 4096 and live.parts["weights"] == 1024
    with pytest.raises(TooLarge), LiveBytes(dict, 100):
        torch.ones(26)


@pytest.mark.parametrize(
    ("text", "number"),
    [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("512MiB", 512 * MIB), ("7", 7)],
)
def test_sizes_are_read(text: str, number: int) -> None:
    assert size(text) == number


@pytest.mark.parametrize("text", ["nan", "-1GiB", "GiB", "1.2.3GB", "80 apples", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="say 80GiB"):
        size(text)


def test_ways_to_train_divide_the_devices() -> None:
    assert [o.name for o in options(1)] == ["single", "single + checkpointing"]
    for devices in (2, 6, 8, 64):
        found = list(options(devices))
        assert found[0] == Option("ddp", devices)
        assert all(not devices % o.tensor for o in found)
        assert any(o.strategy == "tensor" for o in found) == (devices <= 8)


def test_a_step_takes_what_its_slowest_part_takes() -> None:
    h100 = ACCELERATORS["h100"]
    near = seconds(h100, operations=0, beside=int(h100.near), between=int(h100.near), is_near=True)
    assert near == pytest.approx(2.0)
    assert seconds(
        h100, operations=h100.flops, beside=0, between=0, is_near=False
    ) == pytest.approx(2.5)


NETS = """
import torch
from torch import nn
from test_planning import Net
from sharded import GPT, data

def net():
    return Net()

def lit():
    return GPT(), data(0, 1)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "planned_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "planned_nets"


def plan(*words: str) -> int:
    return main(["plan", *words])


def test_the_command_names_a_strategy(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = ("--example", "4,256:int64:100")
    assert plan(f"{nets}:net", *example, "--devices", "4", "--memory", "80MiB") == 0
    assert 'strategy="accel_ddp"' in capsys.readouterr().out
    assert plan(f"{nets}:net", *example, "--devices", "4", "--memory", "14MiB", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] in ("ddp + checkpointing", "fsdp + checkpointing")
    fits = next(o for o in found["options"] if not o["why_not"])
    assert fits["peak"] <= 0.9 * 14 * MIB
    assert plan(f"{nets}:net", *example, "--devices", "2", "--memory", "1MiB") == 1
    out = capsys.readouterr().out
    assert "nothing fits" in out and "too large" in out


def test_the_users_own_step_and_optimizer_are_planned(
    nets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(f"{nets}:lit", "--devices", "2", "--memory", "1GiB", "--all", "--json") == 0
    found = json.loads(capsys.readouterr().out)["options"]
    single = next(o for o in found if o["strategy"] == "ddp" and not o["checkpointing"])
    weights = single["parts"]["weights"]
    assert single["states"] == 3 * weights, "SGD with momentum"
    assert {o["strategy"] for o in found if o["peak"]} == {"ddp", "fsdp", "tensor"}


def test_how_layers_are_split_is_shown(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = ("--example", "4,256:int64:100")
    assert plan(f"{nets}:net", *example, "--parallel", "4") == 0
    out = capsys.readouterr().out
    assert "4 processes" in out and "blocks.0.mlp.0" in out and "blocks.0.mlp.2" in out
    assert "whole: head: it makes the network's output" in out
    assert plan(f"{nets}:net", *example, "--parallel", "4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {g["units"] for g in found["groups"]} == {4, 256} and max(found["shares"]) < 0.5
    assert plan(f"{nets}:net", *example, "--parallel", "999") == 2
    assert "no layer can be split over 999" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--devices", "0", "--memory", "1GiB"), "devices are counted"),
        (("--devices", "-3", "--memory", "1GiB"), "devices are counted"),
        (("--devices", "2"), "pass --memory"),
        (("--parallel", "1"), "pass 2 or more"),
    ],
)
def test_what_is_missing_is_told(
    nets: str, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(f"{nets}:net", "--example", "1,8:int64:9", *words) == 2
    assert said in capsys.readouterr().err


AUTO = ("shards", "read_outside", "by_hand", "sends", "relied_on", "again", "folder", "meta")


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results_of("auto_fits.py", tmp_path_factory.mktemp("auto"))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", AUTO)
def test_a_chosen_strategy_trains_as_one_process(chosen: list[dict[str, Any]], name: str) -> None:
    kinds = {"relied_on": "AutoStrategy", "sends": "AutoStrategy"}
    for found in (one[name] for one in chosen):
        assert "error" not in found, found["trace"]
        assert found.get("kind", "FSDP2Strategy") == kinds.get(name, "FSDP2Strategy")
        apart = [found[key] for key in ("apart", "from file", "loaded") if key in found]
        assert all(one < 1e-11 for one in apart)
        assert ("could be planned" in found.get("why", "")) == (name in ("by_hand", "sends"))
    if (
        name == "again"
    ):  # evaluated as copies, trained and tested as shards; a small module as copies
        sharded, copied = "FSDP2Strategy", "AutoStrategy"
        assert found["kinds"] == [copied, sharded, sharded, copied]
    if name == "shards":
        assert found["why"].startswith("ddp needs more") and "fsdp needs" in found["why"]


def test_one_device_has_nothing_to_choose() -> None:
    ours = trainer(devices=1, strategy="accel_auto", max_epochs=1)
    ours.fit(made(Convolutions), data(0, 1))
    assert isinstance(ours.strategy, SingleDeviceStrategy) and not dist.is_initialized()


@pytest.mark.parametrize("memory", [0, -1, True, 1.5, None, "80 apples", "nan"])
def test_memory_of_a_choice_is_a_size(memory: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"memory.*Found: .*Do: "):
        AutoStrategy(memory=memory)


def test_what_cannot_fill_itself_is_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))
            self.register_buffer("angle", torch.ones(3), persistent=False)

    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 3), Own())
    with pytest.raises(Unsupported, match=r"`1` \(Own\).*it has none"):
        materialize(net)
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 3), Own())
    with pytest.raises(Unsupported, match=r"buffer `angle` is in no checkpoint"):
        materialize(net, fills=False)
