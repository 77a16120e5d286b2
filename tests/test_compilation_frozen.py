"""Frozen copies, against the networks they stand in for."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import BlockCompile
from lightning_accel.compilation import FrozenPredict, frozen
from lightning_accel.compilation.frozen import freeze
from lightning_accel.compilation.frozen.freeze import difference
from lightning_accel.errors import NoEffect, Unsupported

pytestmark = [
    pytest.mark.usefixtures("clean_dynamo"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Spy:
    """A backend that runs eagerly and keeps what it saw."""

    def __init__(self, off: float = 0.0) -> None:
        self.off = off
        self.freezing: list[bool] = []
        self.dtypes: list[set[torch.dtype]] = []
        self.last: list[bool] = []
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.freezing.append(torch._inductor.config.freezing)
        tensors = [*graph.parameters(), *(x for x in inputs if isinstance(x, Tensor))]
        self.dtypes.append({t.dtype for t in tensors if t.is_floating_point()})
        self.last += [
            t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.dim() == 4
        ]

        def run(*args: Any) -> Any:
            self.runs += 1
            return tuple(x * (1 + self.off) for x in graph.forward(*args))

        return run


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net if net is not None else tiny.MLP()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def data(net: type[nn.Module] = tiny.MLP, size: int = 14) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    shape = tiny.INPUTS[net]().shape[1:]
    x = torch.randn(size, *shape, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(size) % 4), 4)


def module(net: nn.Module | None = None) -> Module:
    torch.manual_seed(0)
    return Module(net)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def trainer(trainer_kwargs: dict[str, Any]) -> Any:
    return lambda *callbacks, **kwargs: Trainer(
        **{**trainer_kwargs, "callbacks": [*callbacks], **kwargs}
    )


# --- the core -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(tiny.INPUTS))
@pytest.mark.parametrize("weights", [None, "bf16-true"])
def test_a_frozen_network_gives_what_it_gave(kind: Any, weights: str | None) -> None:
    torch.manual_seed(0)
    net, x, spy = kind().eval(), tiny.INPUTS[kind](), Spy()
    before = state(net)
    with torch.no_grad():
        wanted = net(x)
        with frozen(net, precision=weights, backend=spy) as (one,):
            first, second = net(x), net(x)
    assert torch.equal(first, wanted)
    assert spy.runs == 2
    assert second.dtype == wanted.dtype
    if weights is None:
        assert torch.equal(second, wanted)
    else:
        assert not torch.equal(second, wanted)
        assert (second - wanted).norm() < 0.03 * wanted.norm()
        assert spy.dtypes == [{torch.bfloat16}]
    assert one.error == difference(second, wanted)
    assert one.reason == ""
    assert equal(state(net), before)
    assert net._compiled_call_impl is None
    assert spy.freezing == [True]
    assert torch._inductor.config.freezing is False


def test_copies_can_be_channels_last_and_the_network_is_not() -> None:
    net, x, spy = tiny.ConvNet().eval(), torch.randn(4, 3, 8, 8), Spy()
    with torch.no_grad(), frozen(net, channels_last=True, backend=spy) as (one,):
        net(x)
    assert spy.last and all(spy.last) and one.reason == ""
    assert net.stem[0].weight.is_contiguous()
    assert x.is_contiguous()


def test_a_copy_that_is_off_is_not_used_and_the_figures_are_kept() -> None:
    net, x = tiny.MLP().eval(), torch.randn(4, 8)
    with torch.no_grad():
        wanted = net(x)
        for off, used in ((1e-2, False), (1e-6, True)):
            spy = Spy(off)
            with frozen(net, backend=spy) as (one,):
                assert torch.equal(net(x), wanted)
                assert torch.equal(net(x), wanted) != used
            assert one.error == pytest.approx(off, rel=0.1)
            assert ("off by 0.01" in one.reason) != used
        with frozen(net, tolerance=0.1, backend=Spy(1e-2)) as (one,):
            net(x)
        assert one.reason == ""


def test_gradients_and_training_are_left_to_the_network_itself() -> None:
    net, x, spy = tiny.MLP(), torch.randn(4, 8), Spy()
    with frozen(net, backend=spy) as (one,):
        net(x).sum().backward()
        with torch.no_grad():
            net(x)  # in training
        net.eval()
        net(x).sum().backward()
    assert spy.freezing == [] and one.num_calls == 0
    assert all(p.grad is not None for p in net.parameters())


def test_a_network_with_hooks_or_states_runs_as_it_is() -> None:
    class Counter(tiny.MLP):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return super().forward(x)

    hooked, counter, called = tiny.MLP().eval(), Counter().eval(), []
    hooked.head.register_forward_hook(lambda *_: called.append(1))
    with (
        torch.no_grad(),
        frozen(hooked, backend="eager") as (one,),
        frozen(counter, backend="eager") as (two,),
    ):
        for _ in range(3):
            hooked(torch.randn(4, 8)), counter(torch.randn(4, 8))
    assert "hooks" in one.reason and len(called) == 3
    assert "writes `seen`" in two.reason and counter.seen == 3


def test_what_cannot_be_compiled_runs_as_it_is_and_a_bad_input_is_the_users() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no such kernel")

    net, x = tiny.MLP().eval(), torch.randn(4, 8)
    with torch.no_grad(), frozen(net, backend=broken) as (one,):
        assert net(x).shape == (4, 4)
    assert "no such kernel" in one.reason
    with (
        torch.no_grad(),
        frozen(net, backend="eager"),
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
    ):
        net(torch.randn(4, 9))
    assert net._compiled_call_impl is None


def test_the_first_call_has_its_effects_once() -> None:
    class Noisy(tiny.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1)) + torch.rand(4)

    net, x = Noisy().eval(), torch.randn(4, 8)
    torch.manual_seed(3)
    with torch.no_grad():
        wanted = net(x.clone())
        after = torch.rand(2)
        torch.manual_seed(3)
        with frozen(net, backend="eager", tolerance=1e9):
            inputs = x.clone()
            assert torch.equal(net(inputs), wanted)
            assert torch.equal(torch.rand(2), after)
    assert torch.equal(inputs, x + 1)


def test_other_sizes_run_eagerly_until_they_are_the_rule() -> None:
    net, spy = tiny.MLP().eval(), Spy()
    with torch.no_grad(), frozen(net, backend=spy):
        for size in [4, 4, 3, 4]:
            net(torch.randn(size, 8))
        assert len(spy.freezing) == 1 and spy.runs == 3
        for i in range(140):
            x = torch.randn(2 + i % 5, 8)
            assert torch.allclose(net(x), tiny.MLP.forward(net, x), atol=1e-6)
        assert spy.freezing == [True, True]
        assert spy.runs > 60


@pytest.mark.slow
@pytest.mark.parametrize("made_inside", [True, False])
def test_inputs_made_in_inference_mode_or_before_are_both_served(made_inside: bool) -> None:
    net, spy = tiny.MLP().eval(), Spy()
    x = torch.randn(4, 8)
    with torch.inference_mode(), frozen(net, backend=spy) as (one,):
        x = x.clone() if made_inside else x
        for _ in range(3):
            net(x)
    assert x.is_inference() == made_inside
    assert (spy.runs, one.num_calls, one.num_missed) == (3, 3, 0)


def test_changed_weights_are_taken_over_at_the_next_batch() -> None:
    net, x, spy = tiny.MLP().eval(), torch.randn(4, 8), Spy()
    with torch.no_grad(), frozen(net, backend=spy) as (one,):
        net(x), one.renew(), net(x)
        assert len(spy.freezing) == 1
        net.head.weight.mul_(2)
        one.renew()
        wanted = tiny.MLP.forward(net, x)
        net(x)
        assert torch.equal(net(x), wanted)
    assert len(spy.freezing) == 2


def test_difference_is_that_of_norms_and_infinite_where_structures_differ() -> None:
    a, b = torch.randn(7), torch.randn(7)
    wanted = float((a.double() - b.double()).norm() / b.double().norm())
    assert difference(a, b) == pytest.approx(wanted)
    inf = torch.tensor([float("inf"), 1.0])
    assert difference({"a": inf}, {"a": inf}) == 0.0
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    far = float("inf")
    nan = torch.tensor([float("nan"), 1.0])
    for one, other in ((a, b[:3]), ([a], [a, b]), (inf, -inf), (nan, a[:2]), (a[:2], nan), (a, 3)):
        assert difference(one, other) == far


# --- in a Trainer -------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["predict", "test", "validate"])
@pytest.mark.parametrize("inference_mode", [True, False])
def test_every_evaluation_gives_what_it_gave(trainer: Any, verb: str, inference_mode: bool) -> None:
    user, spy = module(), Spy()
    before, classes = state(user), [type(m) for m in user.modules()]
    run = trainer(FrozenPredict(backend=spy), inference_mode=inference_mode)
    plain = getattr(trainer(), verb)(user, data())
    ours = getattr(run, verb)(user, data())
    assert spy.runs == 3  # of four batches, the ragged last one runs eagerly
    if verb == "predict":
        assert all(map(torch.equal, ours, plain))
    else:
        assert ours == plain
    assert equal(state(user), before)
    assert [type(m) for m in user.modules()] == classes
    assert user.net._compiled_call_impl is None


def test_a_fit_is_refused_and_a_later_fit_without_it_learns(trainer: Any) -> None:
    user, other = module(), module()
    with pytest.raises(Unsupported, match="cannot learn.*Do: "):
        trainer(FrozenPredict(backend="eager")).fit(user, data())
    trainer(FrozenPredict(backend="eager")).predict(user, data())
    trainer().fit(user, data())
    trainer().fit(other, data())
    assert equal(state(user), state(other))


def test_bfloat16_that_is_too_far_off_is_told_with_figures(trainer: Any) -> None:
    edit = FrozenPredict(precision="bf16-true", tolerance=1e-6, backend="eager")
    user = module()
    with pytest.warns(
        UserWarning, match=r"`net` runs as it is.*off by 0\.00\d+ .*1e-06.*Do: "
    ) as told:
        ours = trainer(edit).predict(user, data())
    assert len([w for w in told if "runs as it is" in str(w.message)]) == 1
    assert all(map(torch.equal, ours, trainer().predict(user, data())))


def test_an_error_puts_the_module_back(trainer: Any) -> None:
    class Stop(Callback):
        def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("stopped")

    user = module()
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(FrozenPredict(backend="eager"), Stop()).predict(user, data())
    assert user.net._compiled_call_impl is None


def test_a_network_that_is_not_called_is_an_error(trainer: Any) -> None:
    class Functional(Module):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.linear(batch[0], self.net.weight)

    user = Functional(nn.Linear(8, 4))
    with pytest.raises(NoEffect, match="`net` had no effect.*Do: "):
        trainer(FrozenPredict(backend="eager")).predict(user, data())
    assert user.net._compiled_call_impl is None
    with pytest.raises(NoEffect, match="nowhere"):
        trainer(FrozenPredict("nowhere", backend="eager")).predict(module(), data())


def test_it_works_beside_compiled_blocks_and_gives_them_back(trainer: Any) -> None:
    user, blocks, spy = module(), BlockCompile(backend="eager"), Spy()
    run = trainer(blocks, FrozenPredict(backend=spy))
    plain = trainer().predict(copy.deepcopy(user), data())
    assert all(map(torch.equal, run.predict(user, data()), plain))
    assert spy.runs == 3
    assert blocks.totals["graphs"] == 1
    user.eval()
    assert torch.equal(user.net(data().dataset.tensors[0][:4]), plain[0])
    assert spy.runs == 3


def test_a_mixed_precision_prediction_is_that_of_the_plain_one(trainer: Any) -> None:
    user, edit = module(), FrozenPredict(backend="eager")
    plain = trainer(precision="bf16-mixed").predict(user, data())
    ours = trainer(edit, precision="bf16-mixed").predict(user, data())
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    assert edit.networks[0].reason == ""
    assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"precision": "16-true"},
        {"precision": True},
        {"channels_last": None},
        {"channels_last": 1},
        {"tolerance": 0},
        {"tolerance": -1.0},
        {"tolerance": float("nan")},
        {"tolerance": "1"},
        {"tolerance": True},
        {"backend": None},
        *({"check_every_n_calls": value} for value in (0, -1, 1.5, float("nan"), "2", True)),
    ],
)
def test_bad_arguments_are_refused_at_once(kwargs: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="Found: .*Do: "):
        FrozenPredict(**kwargs)


def test_an_unknown_backend_is_an_error_at_setup(trainer: Any) -> None:
    with pytest.raises(ValueError, match="inductor"):
        trainer(FrozenPredict(backend="indctor")).predict(module(), data())


@pytest.mark.slow
def test_inductor_folds_batch_norm_and_stays_within_tolerance(trainer: Any) -> None:
    torch.manual_seed(0)
    user = module(tiny.ConvNet())
    user.net(torch.randn(64, 3, 8, 8))  # statistics that are not those of a new network
    edit = FrozenPredict(channels_last=True)
    plain = trainer().predict(user, data(tiny.ConvNet))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = trainer(edit).predict(user, data(tiny.ConvNet))
    assert edit.networks[0].reason == "" and 0 <= edit.networks[0].error < 1e-4
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def passing(copy_s: float) -> Iterator[float]:
    """Yield times by which the network takes 2 s, a look at it 0.5, and its copy at all but the first call `copy_s`."""
    now = 0.0
    for seconds in itertools.chain((2.0, 0.5, 0.1), itertools.cycle((2.0, 0.5, copy_s))):
        yield now
        now += seconds
        yield now


@pytest.mark.filterwarnings("always:`.*` was slower frozen")
@pytest.mark.parametrize(
    ("copy_s", "size", "ratio"), [(1.5, 20, ""), (2.5, 20, "1.50x"), (2.5, 16, "")]
)
def test_a_copy_that_takes_longer_is_told(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, copy_s: float, size: int, ratio: str
) -> None:
    """The first of five calls compiles and does not count, and of four the other three are too few."""
    monkeypatch.setattr(freeze, "_clock", passing(copy_s).__next__)
    edit = FrozenPredict(backend=Spy(), check_every_n_calls=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(edit).predict(module(), data(size=size))
    said = [str(w.message) for w in caught if "was slower frozen" in str(w.message)]
    assert len(said) == bool(ratio) and all(ratio in one for one in said)
