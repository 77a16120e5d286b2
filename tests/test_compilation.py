"""Compiling blocks in place, against eager runs and against what dynamo really captured."""

from __future__ import annotations

import copy
import io
import pickle
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import BlockCompile, Select, StructuredPruning
from lightning_accel.compilation import captures, compile_blocks, find_blocks
from lightning_accel.compilation.callbacks import block_compile as adapter
from lightning_accel.compilation.region import recompile, region
from lightning_accel.errors import AccelError, NoEffect, Unsupported
from lightning_accel.pruning import prune

pytestmark = [
    pytest.mark.usefixtures("clean_dynamo"),
    # Dynamo hides this warning of its own by `showwarning`, which comes too late under "error".
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings(
        "ignore:`torch.jit.script_method` is deprecated"
    ),  # importing inductor
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Spy:
    """A backend that runs eagerly and keeps what it was given."""

    def __init__(self) -> None:
        self.graphs: list[list[Any]] = []
        """Sizes of the inputs of each graph when it was captured."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        shapes = [tuple(v.shape) if isinstance(v, Tensor) else (v,) for v in inputs]
        self.graphs.append([size for shape in shapes for size in shape])
        return graph.forward

    @property
    def static(self) -> bool:
        return not any(isinstance(size, torch.SymInt) for sizes in self.graphs for size in sizes)


class Block(nn.Module):
    def __init__(self, width: int = 8, drop: float = 0.0, index: int = 0) -> None:
        super().__init__()
        self.fc, self.drop, self.index = nn.Linear(width, width), nn.Dropout(drop), index

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.relu(self.fc(x)))


class Stack(nn.Module):
    """A stem, blocks in a list, a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList(blocks or [Block() for _ in range(4)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Branching(nn.Module):
    """Breaks its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        torch._dynamo.graph_break()  # the line to be named
        return self.out(x)


class Hidden(nn.Module):
    """Dynamo may not look in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self, net: nn.Module | None = None, **others: nn.Module) -> None:
        super().__init__()
        self.net = net if net is not None else Stack()
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def data(size: int = 16, batch: int = 4, net: type[nn.Module] = tiny.MLP) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    shape = tiny.INPUTS[net]().shape[1:]
    x = torch.randn(size, *shape, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(size) % 4), batch)


def module(net: nn.Module | None = None, kind: type[Module] = Module, **others: Any) -> Module:
    torch.manual_seed(0)
    return kind(net, **others)


@pytest.fixture
def trainer(trainer_kwargs: dict[str, Any]) -> Callable[..., Trainer]:
    return lambda *edits, **kwargs: Trainer(
        **{**trainer_kwargs, "callbacks": list(edits), **kwargs}
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# --- which parts ------------------------------------------------------------------------------


def test_repeated_blocks_are_found_wherever_containers_put_them() -> None:
    nested = nn.Sequential(nn.Sequential(Block(), Block()), nn.ModuleDict({"a": Block()}))
    assert list(find_blocks(nn.Sequential(nn.Linear(8, 8), nested))) == [
        "1.0.0",
        "1.0.1",
        "1.1.a",
    ]


def test_the_outermost_repeat_is_taken() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    assert list(find_blocks(nn.Sequential(Outer(), Outer()))) == ["0", "1"]


@pytest.mark.parametrize("net", [tiny.MLP, tiny.ConvNet, tiny.AttentionNet, tiny.TiedLM])
def test_a_network_without_repeats_is_taken_whole(net: Any) -> None:
    assert list(find_blocks(net())) == [""]


def test_repeated_activations_do_not_stand_for_the_network() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.beta * x)

    layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), Swish())]
    assert list(find_blocks(nn.Sequential(*layers))) == [""]


def test_blocks_that_all_differ_are_not_worth_it() -> None:
    drops = [Block(drop=0.1 * i) for i in range(1, 5)]
    assert list(find_blocks(Stack(*drops))) == [""]
    assert len(find_blocks(Stack(*[Block(index=i) for i in range(12)]))) == 12


def test_a_selection_names_what_is_compiled_whole() -> None:
    net = Stack()
    assert list(find_blocks(net, select="layers.1")) == ["layers.1"]
    assert list(find_blocks(net, select=Select(types=("Linear",)))) == [
        "stem",
        *[f"layers.{i}.fc" for i in range(4)],
        "head",
    ]
    assert list(find_blocks(net, select=Select(exclude=("layers.2",)))) == [
        "stem",
        "layers.0",
        "layers.1",
        "layers.3",
        "head",
    ]
    assert list(find_blocks(net, blocks=False)) == [""]


def test_a_module_held_twice_is_compiled_once() -> None:
    shared = Block()
    net = nn.ModuleDict({"a": Stack(shared, shared), "b": shared})
    assert list(find_blocks(net, blocks=False)) == ["a", "b"]
    twice = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    assert list(find_blocks(twice)) == ["a"]
    assert len(compile_blocks(net["a"], backend="eager").changes) == 1


def test_metrics_losses_and_recurrent_layers_are_left_alone() -> None:
    from torchmetrics import MeanMetric

    class Learned(MeanMetric):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

    user = module(metric=Learned(), loss=nn.CrossEntropyLoss(), rnn=nn.LSTM(8, 8))
    assert {name.partition(".")[0] for name in find_blocks(user, itself=False)} == {"net"}


def test_a_network_with_a_recurrent_layer_is_compiled_around_it() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 8), nn.Sequential(nn.Linear(8, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    net, spy = Tagger(), Spy()
    assert list(find_blocks(net)) == ["head"]
    compile_blocks(net, backend=spy)
    net(torch.randn(4, 8))
    assert len(spy.graphs) == 1


def test_what_others_compiled_is_left_alone() -> None:
    net = nn.ModuleDict({"a": torch.compile(Stack()), "b": Stack()})
    net["b"].layers[0].compile(backend="eager")
    assert list(find_blocks(net["b"].layers)) == ["1", "2", "3"]
    with pytest.raises(NoEffect, match="compiled already"):
        find_blocks(nn.ModuleDict({"a": net["a"]}))


# --- the verb ---------------------------------------------------------------------------------


BUILT_IN = {
    "Sequential": lambda: (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 8)),
    "Linear": lambda: (nn.Linear(8, 8), torch.randn(2, 8)),
    "TransformerEncoderLayer": lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        torch.randn(2, 3, 8),
    ),
    "user": lambda: (Stack(), torch.randn(2, 8)),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_class_is_really_compiled(name: str) -> None:
    net, x = BUILT_IN[name]()
    expected, spy = net(x), Spy()
    compile_blocks(net, backend=spy, blocks=False)
    torch.testing.assert_close(net(x), expected)
    assert len(spy.graphs) == 1
    assert captures(net)[0].graphs == 1


def test_containers_are_compiled_whether_torchs_own_way_does_it_or_not() -> None:
    """PyTorch #150915: `Module.compile` did nothing for a container before 2.14.

    `Region` stays as long as 2.10 is supported: one path for all, and it wraps a forward of the module's own.
    """
    net, own, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), Spy(), torch.randn(2, 8)
    expected = net(x)
    plain = copy.deepcopy(net)
    plain.compile(backend=own)
    torch.testing.assert_close(plain(x), expected)
    assert len(own.graphs) in (0, 1), "of torch's own way either is expected, no more"
    spy = Spy()
    compile_blocks(net, blocks=False, backend=spy)
    torch.testing.assert_close(net(x), expected)
    assert len(spy.graphs) == 1


def test_each_kind_is_compiled_once() -> None:
    wide = [Block(), *[Block() for _ in range(5)]]
    net, spy = Stack(*wide), Spy()
    x = torch.randn(4, 8)
    expected = net(x)
    compile_blocks(net, backend=spy)
    torch.testing.assert_close(net(x), expected)
    net(x).sum().backward()
    assert len(spy.graphs) == 1
    net.eval()
    with torch.inference_mode():
        net(x)
    assert len(spy.graphs) == 2  # evaluation is another graph, and no recompilation
    assert captures(net)[0].recompilations == []


def test_two_kinds_do_not_make_each_other_dynamic() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Sequential(nn.Linear(8, 8), *[Block(8) for _ in range(4)])
            self.grow = nn.Linear(8, 16)
            self.wide = nn.Sequential(*[Block(16) for _ in range(4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.grow(self.narrow(x)))

    net, spy = Two(), Spy()
    compile_blocks(net, backend=spy)
    net(torch.randn(4, 8))
    assert len(spy.graphs) == 2
    assert spy.static


@pytest.mark.slow
def test_more_kinds_than_dynamos_limit_are_all_compiled() -> None:
    net, spy = nn.ModuleList(Block(8 + i) for i in range(12)), Spy()
    compile_blocks(net, backend=spy)
    for i, block in enumerate(net):
        block(torch.randn(4, 8 + i))
    assert len(spy.graphs) == 12
    assert spy.static


def test_gradients_hooks_and_train_flags_are_those_of_the_eager_network() -> None:
    net = Stack(*[Block() for _ in range(3)])
    eager = copy.deepcopy(net)
    compile_blocks(net, backend="aot_eager")
    heard: list[int] = []
    for one in (net, eager):
        one.layers[1].register_forward_hook(lambda *_: heard.append(1))
        one(torch.ones(4, 8)).square().sum().backward()
    assert heard == [1, 1]
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.slow
def test_hooks_that_come_and_go_are_obeyed() -> None:
    net, x = Stack(), torch.ones(4, 8)
    heard: list[str] = []
    net.layers[0].register_forward_hook(lambda *_: heard.append("first"))
    net.layers[1].fc.register_forward_hook(lambda *_: heard.append("inner"))
    compile_blocks(net, backend="eager")
    net(x)
    handle = net.layers[2].register_forward_pre_hook(lambda *_: heard.append("late"))
    net(x)
    handle.remove()
    net(x)
    assert heard == ["first", "inner", "first", "inner", "late", "first", "inner"]


def test_keys_copies_and_pickles_are_those_of_the_eager_network() -> None:
    net, x = Stack(), torch.randn(4, 8)
    keys, expected = list(net.state_dict()), net(x)
    compile_blocks(net, backend="eager")
    net(x)
    assert list(net.state_dict()) == keys
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert type(copied.layers[0]) is Block
        assert not captures(copied)
        torch.testing.assert_close(copied(x), expected)


def test_a_compiled_network_can_be_exported() -> None:
    net, x = Stack(), torch.ones(4, 8)
    compile_blocks(net, backend="eager")
    expected = net(x)
    for strict in (False, True):
        exported = torch.export.export(net, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), expected)


def test_a_compiled_block_can_stand_in_a_larger_graph() -> None:
    net, spy = Stack(), Spy()
    compile_blocks(net, backend="eager")
    whole = torch.compile(lambda x: net(x) * 2, backend=spy, fullgraph=True)
    torch.testing.assert_close(whole(torch.ones(4, 8)), net(torch.ones(4, 8)) * 2)
    assert len(spy.graphs) == 1


def test_compiling_twice_changes_nothing() -> None:
    net = Stack()
    assert len(compile_blocks(net, backend="eager").changes) == 4
    before = [region(layer) for layer in net.layers]
    assert not compile_blocks(net, backend="eager")
    assert before == [region(layer) for layer in net.layers]
    assert compile_blocks(net, backend="aot_eager")  # another backend is another wish


def test_a_reshaped_network_is_compiled_again_once_and_statically() -> None:
    net, spy, x = tiny.MLP(), Spy(), torch.randn(4, 8)
    compile_blocks(net, backend=spy)
    for _ in range(3):
        net(x).sum().backward()
    assert len(spy.graphs) == 1
    prune(net, example=x, ratio=0.5)
    assert recompile(net)
    for _ in range(3):
        net(x).sum().backward()
    assert len(spy.graphs) == 2
    assert spy.static
    assert not recompile(net)


def test_layers_without_shapes_of_their_own_stay_static_too() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    net, spy, x = nn.Sequential(nn.Linear(8, 8), Scale(), nn.Linear(8, 4)), Spy(), torch.ones(4, 8)
    compile_blocks(net, select=Select(types=("Linear", "Scale")), backend=spy)
    net(x)
    prune(net, example=x, ratio=0.5)
    recompile(net)
    net(x)
    assert len(spy.graphs) == 6
    assert spy.static


@pytest.mark.slow
def test_many_prunes_after_graph_breaks_do_not_use_up_dynamos_limit() -> None:
    net, spy, x = Branching(), Spy(), torch.ones(4, 8)
    net.fc, net.out = nn.Linear(8, 32), nn.Linear(32, 4)
    compile_blocks(net, backend=spy)
    for step in range(12):
        net(x)
        assert len(spy.graphs) == 2 * step + 2
        prune(net, example=x, ratio=0.1)
        recompile(net)


def test_compiled_modules_of_others_keep_their_graphs() -> None:
    net, spy, x = tiny.MLP(), Spy(), torch.randn(4, 8)
    other = torch.compile(tiny.MLP(), backend=spy)
    compile_blocks(net, backend="eager")
    other(x), net(x)
    prune(net, example=x, ratio=0.5)
    recompile(net)
    other(x), net(x)
    assert len(spy.graphs) == 1


def test_a_block_that_comes_later_shares_the_graphs_of_its_kind() -> None:
    net, spy, x = Stack(), Spy(), torch.ones(4, 8)
    compile_blocks(net, backend=spy)
    net(x)
    net.layers.append(Block())
    assert [change.name for change in compile_blocks(net, backend=spy).changes] == ["layers.4"]
    net(x)
    assert len(spy.graphs) == 1


def test_sizes_seen_before_would_make_the_channels_dynamic_DUMMY_channels_would_become_dynamic() -> (
    None
):
    """The trap that `recompile` is for; if this fails, it may go."""
    spy = Spy()
    broken = torch.compile(lambda x: x * 2, backend=spy)
    broken(torch.randn(4, 8))
    broken(torch.randn(4, 16))
    assert not spy.static


def test_a_changing_batch_does_not_compile_without_end() -> None:
    net, spy = Stack(), Spy()
    compile_blocks(net, backend=spy)
    for size in (4, 4, 3, 4, 2, 4, 5, 7, 6, 4, 11):
        net(torch.randn(size, 8))
    assert len(spy.graphs) == 2  # one for the first size, one for all others


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"backend": "indctor"}, "inductor"),
        ({"backend": ""}, "eager"),
        ({"mode": "max-autotun"}, "max-autotune"),
        ({"mode": "reduce-overhead", "backend": "eager"}, "backend='inductor'"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(kwargs: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compile_blocks(Stack(), **kwargs)


def test_nothing_to_compile_is_an_error() -> None:
    with pytest.raises(NoEffect, match="nowhere"):
        compile_blocks(Stack(), select="nowhere")
    with pytest.raises(NoEffect, match="nothing to compile"):
        compile_blocks(nn.Sequential(nn.ReLU()))


# --- what happened ----------------------------------------------------------------------------


def test_a_graph_break_is_named_with_the_users_line_and_counted_once() -> None:
    net = Branching()
    compile_blocks(net, backend="eager")
    net(torch.randn(4, 8))
    (capture,) = captures(net)
    ((place, reason),) = capture.breaks.items()
    file, line = place.rsplit(":", 1)
    assert "the line to be named" in Path(file).read_text().splitlines()[int(line) - 1]
    assert "graph_break" in reason
    assert capture.graphs == 2


def test_a_graph_break_in_torchs_code_is_put_at_the_users_line() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            torch.nn.utils.rnn.pack_sequence([x])  # the line
            return x + 1

    net = Looking()
    compile_blocks(net, backend="eager")
    net(torch.randn(4, 8))
    for place in captures(net)[0].breaks:
        file, line = place.rsplit(":", 1)
        assert "# the line" in Path(file).read_text().splitlines()[int(line) - 1]
    assert captures(net)[0].breaks


def test_a_recompilation_is_named_with_its_reason() -> None:
    net = tiny.MLP()
    compile_blocks(net, backend="eager")
    net(torch.randn(4, 8))
    net(torch.randn(3, 8))
    (capture,) = captures(net)
    assert len(capture.recompilations) == 1
    assert "size mismatch" in capture.recompilations[0]
    assert capture.graphs == 2


def test_what_others_compile_is_not_counted_as_ours() -> None:
    net = tiny.MLP()
    compile_blocks(net, backend="eager")
    net(torch.randn(4, 8))
    other = torch.compile(Branching(), backend="eager")
    other(torch.randn(4, 8))
    net(torch.randn(4, 8))
    (capture,) = captures(net)
    assert (capture.graphs, capture.breaks, capture.recompilations) == (1, {}, [])


# --- in a Trainer -----------------------------------------------------------------------------


def test_a_fit_gives_the_weights_of_the_plain_fit(trainer: Any) -> None:
    ours, plain, edit = module(), module(), BlockCompile(backend="eager")
    trainer(edit).fit(ours, data(), data())
    trainer().fit(plain, data(), data())
    assert same(ours, plain)
    assert edit.totals == {"graphs": 2, "graph_breaks": 0, "recompilations": 0, "eager_calls": 0}
    assert [row[:3] for row in edit.report.rows] == [
        ["net.layers.0 ... net.layers.3 (4 x Block)", "graphs", 2]
    ]


def test_every_verb_runs_compiled(trainer: Any) -> None:
    user = module()
    for verb in ("validate", "test", "predict"):
        edit = BlockCompile(backend=Spy())
        getattr(trainer(edit), verb)(user, data())
        assert edit.totals["graphs"] == 1


def test_networks_built_late_are_compiled(trainer: Any) -> None:
    class Late(Module):
        def __init__(self, net: Any = None) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = Stack()

    edit = BlockCompile(backend="eager")
    trainer(edit).fit(module(kind=Late), data())
    assert edit.totals["graphs"] == 1


def test_layers_of_the_lightning_module_itself_are_compiled_but_never_the_module(
    trainer: Any,
) -> None:
    class Direct(Module):
        def __init__(self, net: Any = None) -> None:
            super().__init__(nn.Linear(8, 8))
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.net(x)))

    user, edit = module(kind=Direct), BlockCompile(backend="eager")
    trainer(edit).fit(user, data())
    assert region(user) is None
    assert region(user.net) is not None
    assert edit.totals["graphs"] == 2


@pytest.mark.parametrize("how", ["compile", "torch.compile"])
def test_a_compiled_lightning_module_is_refused(trainer: Any, how: str) -> None:
    user = module()
    if how == "compile":
        user.compile(backend="eager")
    else:
        user = torch.compile(user, backend="eager")
    with pytest.raises(Unsupported, match="plain module"):
        trainer(BlockCompile(backend="eager")).fit(user, data())


@pytest.mark.parametrize("bad", ["indctor", "max-autotune"])
def test_an_unknown_backend_is_an_error_at_setup(trainer: Any, bad: str) -> None:
    with pytest.raises(ValueError, match="'eager', .*'inductor'"):
        trainer(BlockCompile(backend=bad)).fit(module(), data())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"on_graph_break": "explode"},
        {"on_graph_break": None},
        {"dynamic": "yes"},
        {"fullgraph": None},
        {"blocks": float("nan")},
        {"backend": None},
        {"select": 3},
        {"select": [None]},
    ],
)
def test_bad_arguments_are_refused_at_once(kwargs: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        BlockCompile(**kwargs)


def test_the_backend_is_chosen_by_the_device(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer()
    assert BlockCompile()._backend(run) == "inductor"
    monkeypatch.setattr(type(run.strategy), "root_device", torch.device("xla"))
    with pytest.raises(Unsupported, match="XLA compiles whole steps"):
        BlockCompile()._backend(run)
    assert BlockCompile(backend="eager")._backend(run) == "eager"


def test_names_are_checked_at_setup_also_for_networks_built_late(trainer: Any) -> None:
    with pytest.raises(ValueError, match="inductor"):
        BlockCompile(backend="indctor").setup(trainer(), LightningModule(), "fit")


def test_a_selection_of_nothing_is_an_error_at_setup(trainer: Any) -> None:
    with pytest.raises(NoEffect, match="nowhere"):
        trainer(BlockCompile("nowhere", backend="eager")).fit(module(), data())


@pytest.mark.slow
def test_a_target_that_captured_nothing_is_named_though_others_did(trainer: Any) -> None:
    class Both(Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.other(x)

    user = module(kind=Both, other=Hidden())
    with pytest.raises(NoEffect, match="`other \\(Hidden\\)` had no effect"):
        trainer(BlockCompile(backend="eager")).fit(user, data())
    ours = module(kind=Both, other=Hidden())
    edit = BlockCompile(Select(exclude="other"), backend="eager")  # as the error says
    trainer(edit).fit(ours, data())
    assert edit.totals["graphs"] == 1


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_capturing_nothing_is_an_error_in_every_verb(trainer: Any, verb: str) -> None:
    with pytest.raises(NoEffect, match="`net"):
        getattr(trainer(BlockCompile(backend="eager")), verb)(module(Hidden()), data())


def test_a_named_target_that_is_not_called_is_an_error(trainer: Any) -> None:
    user = module(spare=Stack())
    with pytest.raises(NoEffect, match="`spare.layers.0, .* had no effect"):
        trainer(BlockCompile(["net", "spare"], backend="eager")).fit(user, data())


def test_a_network_that_is_not_called_is_told_but_no_error_by_default(trainer: Any) -> None:
    edit = BlockCompile(backend="eager")
    trainer(edit).fit(module(spare=tiny.MLP()), data())
    assert ["spare", "never called", 1, "", ""] in edit.report.rows


def test_a_module_that_calls_nothing_is_an_error(trainer: Any) -> None:
    class Functional(Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.net.weight)

    with pytest.raises(NoEffect, match="did not call it"):
        trainer(BlockCompile(backend="eager")).fit(module(nn.Linear(8, 4), kind=Functional), data())


@pytest.mark.slow
def test_graph_breaks_are_told_with_the_line(trainer: Any) -> None:
    with pytest.warns(UserWarning, match=r"graph break.*test_compilation.py:\d+"):
        trainer(BlockCompile(backend="eager")).fit(module(Branching()), data())
    with pytest.raises(AccelError, match="test_compilation.py"):
        trainer(BlockCompile(backend="eager", on_graph_break="raise")).fit(
            module(Branching()), data()
        )
    torch._dynamo.reset()
    edit = BlockCompile(backend="eager", on_graph_break="ignore")
    trainer(edit).fit(module(Branching()), data())
    assert edit.totals == {"graphs": 2, "graph_breaks": 1, "recompilations": 0, "eager_calls": 0}
    assert [row[1] for row in edit.report.rows] == ["graphs", "graph break"]


def test_graphs_that_an_earlier_fit_left_behind_count_as_an_effect(trainer: Any) -> None:
    for _ in range(2):  # the second finds the graphs of `Branching.forward` in dynamo's cache
        edit = BlockCompile(backend="eager", on_graph_break="ignore")
        trainer(edit).fit(module(Branching()), data())
    assert edit.totals["graphs"] == 0


def test_a_whole_graph_can_be_demanded(trainer: Any) -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        trainer(BlockCompile(backend="eager", fullgraph=True)).fit(module(Branching()), data())


def test_the_table_is_printed_and_numbers_are_logged(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(adapter, "rank_zero_info", said.append)
    logger = CSVLogger(tmp_path)
    trainer(BlockCompile(backend="eager"), logger=logger).fit(module(), data())
    assert any("recompilation" in text or "graphs" in text for text in said)
    logged = (Path(logger.log_dir) / "metrics.csv").read_text()
    for name in ("graphs", "graph_breaks", "recompilations"):
        assert f"compilation/{name}" in logged


def test_what_is_compiled_after_training_is_not_of_the_training(trainer: Any) -> None:
    class Measure(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module(torch.randn(1, 8))

    edit = BlockCompile(backend="eager")
    trainer(Measure(), edit).fit(module(tiny.MLP()), data())
    assert edit.totals["graphs"] == edit.report.rows[0][2] == 1


@pytest.mark.slow
@pytest.mark.parametrize("net", [Stack, tiny.MLP])
def test_a_prune_in_mid_training_compiles_once_more_per_kind(trainer: Any, net: Any) -> None:
    spy, counts = Spy(), []

    class Count(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            counts.append(len(spy.graphs))

    edit = BlockCompile(backend=spy)
    user = module(net())
    before = sum(p.numel() for p in user.parameters())
    trainer(StructuredPruning(0.5, when=[1, 3]), edit, Count(), max_epochs=5).fit(user, data())
    assert sum(p.numel() for p in user.parameters()) < before
    assert counts == [1, 2, 2, 3, 3]
    assert spy.static
    assert edit.totals == {"graphs": 3, "graph_breaks": 0, "recompilations": 0, "eager_calls": 0}


@pytest.mark.slow
def test_a_prune_after_a_graph_break_stays_static_too(trainer: Any) -> None:
    spy = Spy()
    edit = BlockCompile(backend=spy, on_graph_break="ignore")
    trainer(StructuredPruning(0.5, when=1), edit).fit(module(Branching()), data())
    assert len(spy.graphs) == 4
    assert spy.static


@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step")
def test_a_prune_before_the_first_step_is_no_error(trainer: Any) -> None:
    spy = Spy()
    edit = BlockCompile("net", backend=spy)
    trainer(StructuredPruning(0.5, when=0), edit).fit(module(tiny.MLP()), data())
    assert len(spy.graphs) == 1
    assert len(edit.report.rows) == 1


@pytest.mark.slow
def test_a_pruned_checkpoint_is_compiled_in_its_own_shape(trainer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "a")
    edits = [StructuredPruning(0.5, when=1), BlockCompile(backend="eager"), saver]
    user = module(tiny.MLP())
    trainer(*edits, enable_checkpointing=True).fit(user, data())
    spy, used = Spy(), module(tiny.MLP())
    edit = BlockCompile(backend=spy)
    used_trainer = trainer(edit)
    used_trainer.validate(used, data(), verbose=False)  # in the dense shape
    used_trainer.validate(used, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert same(used, user)
    assert len(spy.graphs) == 2
    assert spy.static


def test_a_ragged_last_batch_left_to_dynamo_costs_one_more_graph(trainer: Any) -> None:
    edit = BlockCompile(backend="eager", ragged="ignore")
    trainer(edit, max_epochs=4).fit(module(), data(size=14, batch=4))  # 4 + 4 + 4 + 2
    assert edit.totals["graphs"] == 2


def test_checkpoints_and_averages_are_those_of_the_plain_fit(trainer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "a")
    user, average = module(), EMAWeightAveraging(decay=0.9)
    trainer(BlockCompile(backend="eager"), average, saver, enable_checkpointing=True).fit(
        user, data()
    )
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == module().state_dict().keys()
    loaded = Module.load_from_checkpoint(tmp_path / "a.ckpt")
    assert not captures(loaded)


def test_the_module_stays_compiled_and_a_second_fit_goes_on(trainer: Any) -> None:
    user, spy = module(), Spy()
    run = trainer(BlockCompile(backend=spy))
    run.fit(user, data())
    user(torch.randn(4, 8))
    again = trainer(BlockCompile(backend=spy))
    again.fit(user, data())
    assert len(spy.graphs) == 1


def test_manual_optimization_and_accumulation_work(trainer: Any) -> None:
    class Manual(Module):
        def __init__(self, net: Any = None) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    for kind, kwargs in ((Manual, {}), (Module, {"accumulate_grad_batches": 2})):
        edit = BlockCompile(backend="aot_eager")
        trainer(edit, **kwargs).fit(module(kind=kind), data())
        assert edit.totals["graphs"] == 1


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_compile_and_prune(tmp_path: Path, root: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(
        textwrap.dedent("""
            import json, os
            from test_compilation import Module, Spy, Stack, data
            import torch
            from lightning.pytorch import Trainer
            from lightning_accel import BlockCompile, StructuredPruning
            torch.manual_seed(0)
            user, edit = Module(Stack()), BlockCompile(backend="eager")
            Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=3, logger=False,
                    enable_checkpointing=False, enable_progress_bar=False,
                    callbacks=[StructuredPruning(0.5, when=1), edit]).fit(user, data())
            rank = os.environ.get("LOCAL_RANK", "0")
            total = sum(float(p.detach().double().sum()) for p in user.parameters())
            json.dump([total, edit.totals], open(f"rank{rank}", "w"))
        """)
    )
    status, printed = forks.run_ranks(script, cwd=tmp_path, path=(root / "tests",))
    assert status == 0, printed[-3000:]
    ranks = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert '"graphs": 2' in ranks[0]


@pytest.mark.slow
def test_inductor_trains_to_the_plain_weights(trainer: Any) -> None:
    net = nn.Sequential(tiny.ConvNet())
    ours, plain = module(net), module(copy.deepcopy(net))
    edit = BlockCompile()
    for user, edits in ((ours, [edit]), (plain, [])):
        loader = data(net=tiny.ConvNet)
        user.configure_optimizers = lambda user=user: torch.optim.SGD(user.parameters(), 1e-2)
        trainer(*edits).fit(user, loader, loader)
    assert edit.totals["graphs"] == 2
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_compiled_module_writes_and_reads_its_state(trainer: Any) -> None:
    user = module()
    trainer(BlockCompile(backend="eager")).fit(user, data())
    buffer = io.BytesIO()
    torch.save(user.state_dict(), buffer)
    buffer.seek(0)
    fresh = module()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert same(fresh, user)
