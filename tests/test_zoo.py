"""The benchmarks of pruning: real architectures come out right, and the oracle can tell when not."""

from __future__ import annotations

import copy
import importlib
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries warn of is theirs


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def zoo(benchmark: Any) -> Any:
    return benchmark("zoo")


@pytest.fixture
def prune_zoo(benchmark: Any) -> Any:
    return benchmark("prune_zoo")


@pytest.fixture
def oracle(benchmark: Any) -> Any:
    return benchmark("prune_oracle")


class Net(nn.Module):
    """Norms over channels, and channels that meet twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Linear(8, 24), nn.LayerNorm(24)
        self.up, self.norm1, self.down = nn.Linear(24, 48), nn.LayerNorm(48), nn.Linear(48, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm0(self.stem(x))
        return self.head(x + self.down(self.norm1(self.up(x)).relu()))


def test_every_network_has_a_name_of_its_own(zoo: Any) -> None:
    assert len(zoo.NAMES) >= 80
    assert len(set(zoo.NAMES)) == len(zoo.NAMES)


@pytest.mark.parametrize(
    ("example", "order"),
    [
        (torch.arange(4).view(2, 2), [0, 1, 2, 3, 0, 1]),
        ((torch.arange(4).view(2, 2), 7), [0, 1, 2, 3, 0, 1]),
        ({"x": torch.arange(4).view(2, 2)}, [0, 1, 2, 3, 0, 1]),
    ],
)
def test_another_batch_repeats_the_samples(zoo: Any, example: Any, order: list[int]) -> None:
    other = zoo.other_batch(example, 3)
    found = other["x"] if isinstance(other, dict) else other[0] if type(other) is tuple else other
    assert found.flatten().tolist() == order


def test_distinct_values_are_distinct_within_each_tensor(oracle: Any) -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Linear(300, 40))
    oracle.distinct(net)
    tensors = [*net.parameters(), net[1].running_mean, net[1].running_var]
    assert all(t.unique().numel() == t.numel() for t in tensors)
    assert 0.02 < float(net[0].weight.std()) < 0.2


def pruned(prune_zoo: Any, oracle: Any) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    net, example = Net(), torch.randn(4, 8)
    oracle.distinct(net)
    dense = copy.deepcopy(net)
    prune_zoo.ours(net, example)
    return dense, net, example


def test_the_oracle_agrees_with_a_right_cut(prune_zoo: Any, oracle: Any) -> None:
    dense, small, example = pruned(prune_zoo, oracle)
    assert small.up.out_features < 48 and small.stem.out_features < 24
    assert oracle.difference(dense, small, [example]) < 1e-12
    found = oracle.checked(dense, small, example)
    assert found["runs"] and prune_zoo.is_right(found) and prune_zoo.is_reached(found)


def test_the_oracle_finds_channels_wired_to_the_wrong_columns(prune_zoo: Any, oracle: Any) -> None:
    dense, small, example = pruned(prune_zoo, oracle)
    with torch.no_grad():
        small.down.weight.copy_(small.down.weight.roll(1, dims=1))
    assert oracle.difference(dense, small, [example]) > 1e-3


def test_the_oracle_finds_a_column_of_a_channel_that_is_gone(prune_zoo: Any, oracle: Any) -> None:
    dense, small, example = pruned(prune_zoo, oracle)
    gone = [c for c in dense.head.weight.unbind(1) if not (c == small.head.weight.T).all(1).any()]
    with torch.no_grad():
        small.head.weight[:, 0] = gone[0]
    assert oracle.difference(dense, small, [example]) > 1e-3


def test_the_oracle_says_when_values_are_new(prune_zoo: Any, oracle: Any) -> None:
    dense, small, example = pruned(prune_zoo, oracle)
    with torch.no_grad():
        small.head.weight.mul_(1.5)
    with pytest.raises(LookupError, match="new values"):
        oracle.difference(dense, small, [example])


def test_the_oracle_believes_scaled_rows_where_it_is_told_their_places(
    prune_zoo: Any, oracle: Any
) -> None:
    net, example = Net(), torch.randn(4, 8)
    oracle.distinct(net)
    dense = copy.deepcopy(net)
    places = prune_zoo.ours(net, example)["places"]
    with torch.no_grad():
        net.up.weight.mul_(0.5)
    assert oracle.difference(dense, net, [example], places) > 1e-3
    with torch.no_grad():
        net.up.weight[0, 0] += 1.0
    with pytest.raises(LookupError, match="new values"):
        oracle.difference(dense, net, [example], places)


def test_the_oracle_proves_nothing_with_a_constant_network(oracle: Any) -> None:
    net = Net()
    nn.init.zeros_(net.head.weight)
    with pytest.raises(LookupError, match="proves nothing"):
        oracle.difference(net, net, [torch.randn(4, 8)])


class Scaled(nn.Module):
    """A layer, and numbers that neither parameters nor sizes hold."""

    def __init__(self, at: int, scale: float) -> None:
        super().__init__()
        self.layer, self.at, self.scale = nn.Conv2d(3, 4, 1), at, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (self.scale if x.shape[-1] == self.at else 1.0)


def test_the_oracle_tries_another_size_of_the_input(oracle: Any) -> None:
    dense, small = Scaled(12, 1.0), Scaled(12, 1.1)
    small.load_state_dict(dense.state_dict())
    example = torch.randn(2, 3, 8, 8)
    assert oracle.difference(dense, small, [example]) == 0
    found = oracle.checked(dense, small, example, blank=lambda *_: copy.deepcopy(small))
    assert found["sizes"] and found["error"] > 1e-2


def test_the_oracle_wants_the_network_back_from_its_state_dict(oracle: Any) -> None:
    dense, small = Scaled(8, 1.0), Scaled(8, 1.1)
    small.load_state_dict(dense.state_dict())
    found = oracle.checked(dense, small, torch.randn(2, 3, 8, 8))
    assert not found["runs"] and found["fails"].startswith("state dict")


def test_the_oracle_knows_what_a_norm_of_weights_and_a_mean_come_to(
    prune_zoo: Any, oracle: Any
) -> None:
    class Mean(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self[1](self[0](x)).relu()
            return self[2](hidden) + hidden.mean(-1, keepdim=True)

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(24, 16))
    net, example = Mean(nn.Linear(8, 24), normed, nn.Linear(16, 3)), torch.randn(4, 8)
    oracle.distinct(net)
    dense = copy.deepcopy(net)
    places = prune_zoo.ours(net, example, 0.5)["places"]
    assert net[0].out_features == 12 and net[1].out_features == 8
    assert oracle.difference(dense, net, [example], places) < 1e-6
    with torch.no_grad():
        net[1].parametrizations.weight.original0.mul_(1.01)
    assert oracle.difference(dense, net, [example], places) > 1e-4


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"runs": True, "error": 1e-12}, "right"),
        ({"runs": True, "error": 0.1}, "wrong"),
        ({"runs": True, "error": None}, "unproved"),
        ({"runs": False, "error": None}, "crashed"),
        ({"outcome": "left"}, "left"),
    ],
)
def test_every_outcome_has_a_word(prune_zoo: Any, found: dict[str, Any], word: str) -> None:
    assert prune_zoo.outcome(found) == word
    found = {"seconds": 1.0, "params": 0.5, **found}
    table = prune_zoo.packages({"monai/unet": {"ours": found}}, ["ours"])
    assert dict(zip(table.columns, table.rows[0], strict=True))[word] == 1


def test_inputs_are_made_anew_where_they_are_noise(zoo: Any) -> None:
    mask, ids, noise = torch.ones(2, 3), torch.arange(6).view(2, 3), torch.randn(2, 3, 4, 4)
    other = zoo.fresh({"mask": mask, "ids": ids, "noise": noise})
    assert torch.equal(other["mask"], mask) and not torch.equal(other["noise"], noise)
    assert sorted(other["ids"].flatten().tolist()) == [*range(6)]
    sizes = [tuple(e["noise"].shape) + tuple(e["ids"].shape) for e in zoo.other_sizes(other)]
    assert (2, 3, 6, 6, 2, 4) in sizes and (2, 3, 4, 4, 2, 6) in sizes and len(set(sizes)) == 9


def test_a_hang_is_a_result(prune_zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prune_zoo.WAYS, "ours", lambda *_: time.sleep(3600))
    limits = {"make": 900.0, "prune": 0.3, "check": 900.0}
    ((name, _, found),) = prune_zoo.run(["torch/gru"], ["ours"], 1, limits)
    assert (name, found["fails"]) == ("torch/gru", "prune: not back after 0 s")
    assert prune_zoo.verdict(found).startswith("no (prune: not back")


def test_promises_are_kept_only_if_all_networks_are_right(prune_zoo: Any) -> None:
    good = {"runs": True, "error": 1e-15, "macs": 0.49, "seconds": 1.0, "fails": ""}
    wrong = {**good, "error": 0.1}
    assert prune_zoo._kept(prune_zoo.summary({"a": {"ours": good}}, "ours"))
    assert not prune_zoo._kept(
        prune_zoo.summary({"a": {"ours": good}, "b": {"ours": wrong}}, "ours")
    )


def test_the_picture_of_accuracy_is_one_file(benchmark: Any) -> None:
    accuracy = benchmark("prune_accuracy")
    found = {("dense", 1.0, "cut"): [99.0, 98.0]}
    for share in accuracy.SHARES:
        for name in ("magnitude", "magnitude, compensated"):
            for moment in ("cut", "tuned"):
                found[name, share, moment] = [90 * share, 80 * share]
    svg = accuracy.picture([("digits", found)], {"cut": "at once", "tuned": "later"})
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and "href" not in svg
    assert len(root.findall(".//{*}polyline")) == 4
    assert "59.50 ± 3.50" in accuracy.table("digits", found, "cut", "at once").to_markdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "timm/resnet18",
        "timm/ghostnet_050",
        "timm/convnextv2_atto",
        "timm/mixer_s32_224",
        "timm/vit_tiny_patch16_224",
        "timm/swin_tiny_patch4_window7_224",
        "timm/pvt_v2_b0",
        "torchvision/shufflenet_v2_x0_5",
        "transformers/bert",
        "transformers/gpt2",
        "transformers/llama",
        "transformers/t5",
        "torch/transformer_encoder",
        "torch/lstm_two_layers_both_ways",
    ],
)
def test_real_architectures_are_pruned_rightly(
    zoo: Any, prune_zoo: Any, oracle: Any, name: str
) -> None:
    if name not in zoo.available():
        pytest.skip(f"{name.partition('/')[0]} is not installed")
    model, example = zoo.build(name)
    oracle.distinct(model)
    dense = copy.deepcopy(model)
    places = prune_zoo.ours(model, example)["places"]
    found = oracle.checked(dense, model, example, places)
    assert found["fails"] == ""
    assert prune_zoo.is_right(found), found
    assert prune_zoo.is_reached(found), found
