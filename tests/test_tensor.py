"""Split networks beside whole ones: fits of many modules, whole lives of runs, and what could go silently wrong."""

from __future__ import annotations

import importlib.util
import random
from functools import partial
from typing import Any

import pytest
import torch
from forks import results_of
from results import assert_as_alone
from sharded import Adam, Manual, apart, data, made, trainer, weights
from split import CASES, Bottleneck, Heads, Images, ReadsWidth, Split, Squeeze
from torch import Tensor, nn

from lightning_accel.errors import NoEffect, Unsupported
from lightning_accel.parallel.sharding import whole
from lightning_accel.parallel.tensor import TensorPlan, plan_tensor
from lightning_accel.parallel.tensor.elementwise import require_elementwise
from lightning_accel.parallel.tensor.narrow import Narrowing, narrow
from lightning_accel.strategies import FSDP2Strategy, TensorParallelStrategy
from lightning_accel.surgery.call import Call
from lightning_accel.surgery.structure import named_tensors

Found = list[dict[str, Any]]
RUNS = (
    "file_of_adam", "file_of_two_optimizers", "folder", "evaluation", "averages", "pruned_file", "pruning",
    "refused",
)  # fmt: skip
RUNS_OF_BOTH = ("file_of_adam", "pruned_file")
SITUATIONS = (
    "other_batches", "samplers", "batches_by_rank", "optimizers", "dropout", "random_by_rank", "clipped_by_hand", "backward_by_hand",
    "precisions", "metrics", "compiled", "uneven", "fused_optimizer", "evaluated_only", "sizes", "planted",
    "hooks", "later", "of_whole_shapes", "names_in_files", "resumed_in_short_formats",
)  # fmt: skip
REFUSED = ("penalty", "manual, clips itself", "convolutions")
"""Whose steps read weights that would be split, or whose only widths are those of the input and output."""
BOTH = (
    "adam", "accumulation, clipped", "manual, toggled", "target that follows", "norms of heads, clipped", "closed gates",
    "reads its width", "uneven heads", "looks in hooks",
)  # fmt: skip


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return results_of("tensor_fits.py", tmp_path_factory.mktemp("fits"), "2")


@pytest.fixture(scope="module")
def fits_of_both(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return results_of("tensor_fits.py", tmp_path_factory.mktemp("both"), "2", *BOTH, count=4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return results_of("strategy_runs.py", tmp_path_factory.mktemp("runs"), KIND="tensor")


@pytest.fixture(scope="module")
def runs_of_both(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("runs_of_both")
    return results_of("strategy_runs.py", folder, *RUNS_OF_BOTH, count=4, KIND="fsdp_tensor")


@pytest.fixture(scope="module")
def situations(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return results_of("tensor_situations.py", tmp_path_factory.mktemp("situations"))


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", CASES)
def test_a_split_fit_is_that_of_one_process(fits: Found, name: str) -> None:
    if name.startswith(("Llama", "Qwen", "GPT2", "Bert")):
        pytest.importorskip("transformers")
    for found in fits:
        one = found[name]
        assert "error" not in one, one["trace"]
        assert ("refused" in one) == (name in REFUSED), one
        if "refused" not in one:
            assert one["moved"] > 1e-4, "the plain fit learns nothing, so nothing is compared"
            assert one["apart"] < 1e-11
            assert one["share"] < 0.9
            assert not one["left"] and one["hooks"] == (3 if name == "scalar in a block" else 0)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", BOTH)
def test_a_split_and_sharded_fit_is_that_of_one_process(fits_of_both: Found, name: str) -> None:
    for found in fits_of_both:
        one = found[name]
        assert "error" not in one, one["trace"]
        assert one["moved"] > 1e-4
        assert one["apart"] < 1e-11
        assert one["share"] < (0.55 if name == "looks in hooks" else 0.45)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", RUNS)
def test_a_split_run_lives_as_one_process_does(runs: Found, name: str) -> None:
    for found in runs:
        assert_as_alone(found[name])


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", RUNS_OF_BOTH)
def test_a_split_and_sharded_run_lives_as_one_process_does(runs_of_both: Found, name: str) -> None:
    for found in runs_of_both:
        assert_as_alone(found[name])


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", SITUATIONS)
def test_nothing_goes_silently_wrong(situations: Found, name: str) -> None:
    for found in situations:
        one = found[name]
        assert one and all(isinstance(v, float) and v < 1e-6 for v in one.values()), one


# ---- one process


@pytest.mark.parametrize("kind", [TensorParallelStrategy, FSDP2Strategy])
@pytest.mark.parametrize("manual", [False, True])
def test_with_nobody_to_share_with_a_fit_is_the_plain_one_bit_for_bit(
    kind: Any, manual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, buffers, optimizer, random states, batches, calls of the module's hooks, logged values."""

    class Seen(Manual if manual else Adam):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.calls = nn.Dropout(0.3), list[Any]()
            self.register_buffer("count", torch.zeros(()))

        def embed(self, tokens: Tensor) -> Tensor:
            return self.drop(super().embed(tokens))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.count += 1
            self.calls.append(("step", batch[0].sum().item(), random.random()))
            self.log("seen", float(batch[0].sum()))
            return super().training_step(batch, batch_idx)

        def on_after_backward(self) -> None:
            self.calls.append("backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.calls.append("optimizer")

    sides, threads = [], torch.get_num_threads()
    for strategy in ("auto", kind()):
        torch.set_num_threads(threads)  # which Lightning's launcher of processes changes
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        random.seed(4)
        module = made(Seen)
        ours = trainer(devices=1, strategy=strategy, gradient_clip_val=None if manual else 0.05)
        ours.fit(module, data(0, 1), data(0, 1))
        states = [o.state_dict()["state"] for o in ours.optimizers]
        numbers = [
            whole(v)
            for one in states
            for entry in one.values()
            for v in entry.values()
            if isinstance(v, Tensor)
        ]
        logged = {k: float(v) for k, v in ours.callback_metrics.items()}
        sides.append(
            (
                weights(module),
                numbers,
                torch.get_rng_state(),
                random.getstate(),
                module.calls,
                logged,
            )
        )
    plain, found = sides
    assert apart(plain[0], found[0]) == 0.0
    assert len(plain[1]) == len(found[1]) and all(map(torch.equal, plain[1], found[1]))
    assert torch.equal(plain[2], found[2])
    assert plain[3:] == found[3:]


# ---- plans, in one process


def planned(model: nn.Module, size: int = 2, **given: Any) -> TensorPlan:
    return plan_tensor(model, [Call("", (torch.arange(16).view(2, 8),), {})], size, **given)


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (Split, 4),
        (partial(Split, partial(Heads, 8, 4, groups=2)), 2),
        (partial(Split, partial(ReadsWidth, 8, 4)), 4),
    ],
)
def test_heads_and_hidden_channels_are_split(make: Any, heads: int) -> None:
    plan = planned(make())
    units = {(g.kind, g.units) for g in plan.groups}
    assert units == {("heads", heads), ("channels", 16)}
    assert all(g.makers != g.readers for g in plan.groups) and len(plan.groups) == 4


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_parts_of_all_processes_are_the_network(size: int) -> None:
    """Each element of each tensor is somewhere once, or everywhere."""
    model = Split(lambda: Heads(8, 4, normed=True))
    plan = planned(model, size)
    tensors = dict(named_tensors(model))
    for name in plan.cuts[0].kept:
        places = torch.arange(tensors[name].numel()).view(tensors[name].shape)
        parts = [cut.kept[name].take(places).flatten() for cut in plan.cuts]
        assert torch.equal(torch.cat(parts).sort().values, places.flatten())
    assert max(plan.shares) < 1.0 and sum(plan.shares) > 1.0


def test_each_part_runs_by_itself() -> None:
    for rank in range(2):
        model = Images(Squeeze)
        planned(model).cuts[rank].apply(model)
        assert model(torch.arange(16).view(2, 8)).shape == (2, 8, 24)


def test_depthwise_convolutions_pass_units_on() -> None:
    plan = planned(Images(Squeeze))
    group = next(g for g in plan.groups if g.name == "body.0.expand")
    assert group.makers == ("body.0.expand", "body.0.fc2")
    assert group.readers == ("body.0.fc1", "body.0.project")


def test_what_does_not_go_to_so_many_processes_says_so() -> None:
    plan = planned(Split(lambda: Heads(8, 2)), 4)
    assert plan.whole["blocks.0.att.qkv"] == "2 heads do not go to 4 processes"
    with pytest.raises(NoEffect, match="no layer can be split over 32 processes.*accel_fsdp"):
        planned(Split(), 32)
    with pytest.raises(NoEffect, match="no layer can be split.*accel_fsdp"):
        plan_tensor(nn.Sequential(nn.Linear(2, 2)), [Call("", (torch.ones(1, 2),), {})], 2)


def test_groups_that_a_proof_has_refused_stay_whole() -> None:
    first = planned(Split())
    refused = {g.signature: "it was refused" for g in first.groups if g.kind == "heads"}
    plan = planned(Split(), without=refused)
    assert {g.kind for g in plan.groups} == {"channels"}
    assert plan.whole["blocks.1.att.qkv"] == "it was refused"


def test_a_plan_says_what_is_split_in_ten_lines() -> None:
    text = repr(planned(Images(Bottleneck)))
    assert text.startswith("TensorPlan(2 processes, ") and "summed after body.0.body.6" in text
    assert text.count("\n") < 10


def test_an_input_says_within_a_module_that_it_is_narrower_and_computes_as_it_is() -> None:
    seen: list[Any] = []

    class Reads(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            _, _, c = x.shape
            seen.extend([c, x.size(-1), x.size(), tuple(x.shape), x.dim(), mask.shape[-1], x.dtype])
            assert type(x + 1) is Tensor and (x + 1).shape == (2, 3, 8)
            return x

    model = nn.ModuleDict({"at": Reads()})
    leave = narrow(model, Narrowing("at", 8, 4))
    x = torch.randn(2, 3, 8, requires_grad=True)
    y = model["at"](x, torch.ones(3))
    assert seen == [4, 4, (2, 3, 4), (2, 3, 4), 3, 3, torch.float32]
    assert type(y) is Tensor and y.shape == (2, 3, 8)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    leave()
    assert "forward" not in vars(model["at"])


@pytest.mark.parametrize(
    ("make", "elementwise"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), True),
        (lambda p: torch.optim.AdamW(p, 0.0, fused=True), True),
        (lambda p: torch.optim.NAdam(p), True),
        (lambda p: torch.optim.Adagrad(p), True),
        (lambda p: torch.optim.Adafactor(p), False),
        (lambda p: torch.optim.LBFGS(p), False),
        (lambda p: torch.optim.Muon(p), False),
    ],
)
def test_optimizers_of_whole_weights_are_told_by_a_trial(make: Any, elementwise: bool) -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    before, optimizer = weight.detach().clone(), make([weight])
    if elementwise:
        require_elementwise(optimizer)
    else:
        with pytest.raises(Unsupported, match="each number by itself"):
            require_elementwise(optimizer)
    assert torch.equal(weight, before) and weight.grad is None
    assert not any(value.any() for entry in optimizer.state.values() for value in entry.values())


@pytest.mark.parametrize("given", [{"replicas": 2}, {"checkpoints": "sharded"}])
def test_what_shards_alone_can_is_refused(given: Any) -> None:
    with pytest.raises(Unsupported, match="FSDP2Strategy"):
        TensorParallelStrategy(**given)


@pytest.mark.parametrize("size", [0, -1, 1.5, float("nan"), "all", True, None, [2]])
def test_a_size_is_a_whole_number(size: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        TensorParallelStrategy(tensor_parallel_size=size)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_a_llama_is_split_by_groups_of_queries() -> None:
    plan = planned(CASES["LlamaForCausalLM"].make())
    assert {g.units for g in plan.groups if g.kind == "heads"} == {2}
