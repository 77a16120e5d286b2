"""What compiled blocks do when they would be compiled again, against dynamo's own counts and eager runs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_accel import BlockCompile
from lightning_accel.compilation import captures, compile_blocks
from lightning_accel.compilation.recompile_policy import batch_sizes
from lightning_accel.compilation.region import expect, settle, unsettle
from lightning_accel.errors import AccelError

pytestmark = [
    pytest.mark.usefixtures("clean_dynamo"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


class Count:
    """A backend that runs eagerly and keeps whether each graph had a size of many values."""

    def __init__(self) -> None:
        self.dynamic: list[bool] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sizes = [v for x in inputs for v in (x.shape if isinstance(x, Tensor) else (x,))]
        self.dynamic.append(any(isinstance(v, torch.SymInt) for v in sizes))
        return graph.forward


class Module(LightningModule):
    """The user's, untouched."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net if net is not None else tiny.MLP()

    def step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.step(batch)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Growing(IterableDataset[Any]):
    """Batches whose size is given, the same ones in each epoch or others from a later one on."""

    def __init__(self, *epochs: list[int]) -> None:
        self.epochs, self.epoch = epochs, 0

    def __iter__(self) -> Iterator[Any]:
        sizes = self.epochs[min(self.epoch, len(self.epochs) - 1)]
        self.epoch += 1
        for size in sizes:
            yield torch.randn(size, 8), torch.randint(0, 4, (size,))


def data(size: int, batch: int = 4, **kwargs: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.argmax(1) % 4), batch_size=batch, **kwargs)


def own(*epochs: list[int]) -> DataLoader[Any]:
    return DataLoader(Growing(*epochs), batch_size=None)


def module(net: nn.Module | None = None) -> Module:
    torch.manual_seed(0)
    return Module(net)


@pytest.fixture
def trainer(trainer_kwargs: dict[str, Any]) -> Any:
    return lambda *callbacks, **kwargs: Trainer(
        **{**trainer_kwargs, "callbacks": [*callbacks], **kwargs}
    )


# --- ragged batches -----------------------------------------------------------------------------


@pytest.mark.parametrize(("ragged", "graphs"), [("auto", 2), ("ignore", 4)])
def test_one_graph_serves_a_ragged_last_batch(trainer: Any, ragged: str, graphs: int) -> None:
    spy = Count()
    edit = BlockCompile(backend=spy, ragged=ragged)
    ours, plain = module(), module()
    trainer(edit, num_sanity_val_steps=2).fit(ours, data(14), data(10))
    trainer().fit(plain, data(14), data(10))
    assert edit.totals["graphs"] == len(spy.dynamic) == graphs
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("loader", "kwargs"),
    [
        (data(16), {}),
        (data(14, drop_last=True), {}),
        (data(14), {"limit_train_batches": 3}),
        (data(3), {}),
    ],
    ids=["even", "dropped", "limited", "one small batch"],
)
def test_sizes_stay_static_where_only_one_will_come(
    trainer: Any, loader: Any, kwargs: dict[str, Any]
) -> None:
    spy = Count()
    trainer(BlockCompile(backend=spy), **kwargs).fit(module(), loader)
    assert spy.dynamic == [False]


def test_a_last_batch_of_one_sample_keeps_the_others_static(trainer: Any) -> None:
    spy = Count()
    trainer(BlockCompile(backend=spy)).fit(module(), data(13))
    assert spy.dynamic == [False, False]


@pytest.mark.parametrize("dynamic", [True, False])
def test_who_says_dynamic_or_static_is_heard(trainer: Any, dynamic: bool) -> None:
    spy = Count()
    trainer(BlockCompile(backend=spy, dynamic=dynamic)).fit(module(), data(14))
    assert spy.dynamic == ([True] if dynamic else [False, False])


def test_every_verb_knows_its_ragged_batches(trainer: Any) -> None:
    for verb in ("validate", "test", "predict"):
        spy, user = Count(), module()
        getattr(trainer(BlockCompile(backend=spy)), verb)(user, data(14))
        assert spy.dynamic == [True], verb


def test_two_loaders_of_different_batches_share_one_graph(trainer: Any) -> None:
    spy = Count()
    trainer(BlockCompile(backend=spy)).validate(module(), [data(8), data(12, batch=6)])
    assert spy.dynamic == [True]


def test_marks_are_taken_off_again_and_the_users_stay() -> None:
    net, x, y = tiny.MLP(), torch.randn(4, 8), torch.randn(4, 8)
    torch._dynamo.mark_dynamic(y, 0)
    compile_blocks(net, backend="eager")
    expect(net, training=True, sizes=frozenset({4, 2}))
    net(x), net(y)
    assert vars(x) == {}
    assert y._dynamo_dynamic_indices == {0}


@pytest.mark.slow
def test_sequences_with_the_batch_second_are_marked_there() -> None:
    spy = Count()
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    compile_blocks(net, backend=spy)
    expect(net, training=True, sizes=frozenset({4, 2}))
    net(torch.randn(3, 4, 8)), net(torch.randn(3, 2, 8))
    assert spy.dynamic == [True]


def test_batch_sizes_are_those_that_come() -> None:
    def really(loader: Any) -> set[int]:
        return {len(batch[0]) for batch in loader} - {1}

    for loader in (data(14), data(13), data(12), data(3), data(14, drop_last=True)):
        assert batch_sizes(loader) == really(loader)
    assert batch_sizes([data(14), {"other": data(9, batch=6)}]) == {4, 2, 6, 3}
    assert batch_sizes(own([4, 2])) == batch_sizes(None) == batch_sizes([[1, 2]]) == frozenset()


# --- after the warm-up --------------------------------------------------------------------------


@pytest.mark.slow
def test_after_the_warm_up_a_new_size_runs_eagerly_and_is_told(trainer: Any) -> None:
    spy = Count()
    edit = BlockCompile(backend=spy)
    epochs = [[4, 4, 4, 4], [4, 4, 4, 6]]
    with pytest.warns(UserWarning, match=r"after the warm-up.*Found: .*expected 4, actual 6.*Do: "):
        trainer(edit, max_epochs=4).fit(module(), own(*epochs))
    assert edit.totals == {"graphs": 1, "graph_breaks": 0, "recompilations": 0, "eager_calls": 3}
    assert [row[1:3] for row in edit.report.rows] == [["graphs", 1], ["eager call", 3]]
    assert len(spy.dynamic) == 1


def test_eager_calls_compute_the_same(trainer: Any) -> None:
    batches = [[torch.randn(n, 8), torch.randint(0, 4, (n,))] for n in (4, 4, 4, 6)]

    class Fixed(Growing):
        def __iter__(self) -> Iterator[Any]:
            self.epoch += 1
            yield from batches[:3] if self.epoch == 1 else batches

    ours, plain = module(), module()
    with pytest.warns(UserWarning, match="after the warm-up"):
        trainer(BlockCompile(backend="eager"), max_epochs=3).fit(
            ours, DataLoader(Fixed([]), batch_size=None)
        )
    trainer(max_epochs=3).fit(plain, DataLoader(Fixed([]), batch_size=None))
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_change_that_lasts_is_compiled_after_an_epoch(trainer: Any) -> None:
    edit = BlockCompile(backend="eager")
    with pytest.warns(UserWarning, match="after the warm-up"):
        trainer(edit, max_epochs=5).fit(module(), own([4, 4], [6, 6]))
    assert edit.totals["eager_calls"] == 2  # of the second epoch; the third compiled
    assert edit.totals["graphs"] == 2


def test_recompiling_can_be_allowed_or_refused(trainer: Any) -> None:
    epochs = [[4, 4, 4], [4, 4, 6]]
    edit = BlockCompile(backend="eager", on_recompile="compile")
    trainer(edit).fit(module(), own(*epochs))
    assert (edit.totals["graphs"], edit.totals["eager_calls"]) == (2, 0)
    with pytest.raises(AccelError, match=r"refused.*expected 4, actual 6.*on_recompile='eager'"):
        trainer(BlockCompile(backend="eager", on_recompile="raise")).fit(module(), own(*epochs))


def test_the_warm_up_can_be_a_number_of_steps(trainer: Any) -> None:
    edit = BlockCompile(backend="eager", warmup_steps=3)
    with pytest.warns(UserWarning, match="after the warm-up"):
        trainer(edit, max_epochs=1).fit(module(), own([4, 4, 4, 4, 4, 6, 4, 4]))
    assert (edit.totals["graphs"], edit.totals["eager_calls"]) == (1, 1)
    edit = BlockCompile(backend="eager", warmup_steps=6)
    trainer(edit, max_epochs=1).fit(module(), own([4, 4, 4, 4, 4, 6, 4, 4]))
    assert (edit.totals["graphs"], edit.totals["eager_calls"]) == (2, 0)


def test_a_validation_that_comes_late_is_compiled_all_the_same(trainer: Any) -> None:
    edit = BlockCompile(backend="eager")
    trainer(edit, max_epochs=4, check_val_every_n_epoch=3).fit(module(), data(8), data(8))
    assert (edit.totals["graphs"], edit.totals["eager_calls"]) == (2, 0)


def test_thawed_parameters_are_compiled_at_the_next_epoch(trainer: Any) -> None:
    class Thaw(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net.body.requires_grad_(trainer.current_epoch >= 2)

    edit = BlockCompile(backend="eager")
    trainer(Thaw(), edit, max_epochs=4).fit(module(), data(8))
    assert (edit.totals["graphs"], edit.totals["eager_calls"]) == (2, 0)


def test_the_fit_leaves_blocks_that_compile_again(trainer: Any) -> None:
    class Stop(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("stopped")

    for callbacks in ([], [Stop()]):
        spy, user = Count(), module()
        run = trainer(BlockCompile(backend=spy), *callbacks)
        if callbacks:
            with pytest.raises(RuntimeError, match="stopped"):
                run.fit(user, data(8))
        else:
            run.fit(user, data(8))
        user.train()
        user.net(torch.randn(7, 8))
        assert len(spy.dynamic) == 2


def test_who_measures_after_training_measures_compiled_blocks(trainer: Any) -> None:
    class Measure(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net(torch.randn(7, 8))

    spy = Count()
    edit = BlockCompile(backend=spy)
    trainer(Measure(), edit, max_epochs=3).fit(module(), data(8))
    assert len(spy.dynamic) == 2
    assert (edit.totals["graphs"], edit.totals["eager_calls"]) == (1, 0)


def test_a_settled_block_that_was_never_called_still_compiles() -> None:
    net = tiny.MLP()
    compile_blocks(net, backend="eager")
    settle(net)
    net(torch.randn(4, 8))
    settle(net)
    net(torch.randn(6, 8))
    (capture,) = captures(net)
    assert (capture.graphs, sum(capture.eager.values())) == (1, 1)
    unsettle(net)
    net(torch.randn(6, 8))
    assert (capture.graphs, sum(capture.eager.values())) == (2, 1)


def test_a_stance_of_the_user_is_no_eager_call_of_ours() -> None:
    net = tiny.MLP()
    compile_blocks(net, backend="eager")
    net(torch.randn(4, 8))
    settle(net)
    with torch.compiler.set_stance("force_eager"):
        net(torch.randn(4, 8))
    assert not captures(net)[0].eager
    assert torch._dynamo.eval_frame._stance.stance == "default"


# --- the limit ----------------------------------------------------------------------------------


def test_reaching_the_limit_of_dynamo_is_told_once(trainer: Any) -> None:
    edit = BlockCompile(backend="eager", dynamic=False, on_recompile="compile")
    run = trainer(edit, max_epochs=1)
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.warns(UserWarning, match=r"gave up on compiling `net \(MLP\)`.*limit.*Do: ") as told,
    ):
        run.fit(module(), own([2, 3, 4, 5, 6]))
    assert len([w for w in told if "gave up" in str(w.message)]) == 1
    assert edit.totals["graphs"] == 2
    assert "limit reached" in [row[1] for row in edit.report.rows]


def test_the_limit_is_noticed_in_code_behind_a_graph_break(trainer: Any) -> None:
    class Broken(tiny.MLP):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    edit = BlockCompile(
        backend="eager", dynamic=False, on_recompile="compile", on_graph_break="ignore"
    )
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.warns(UserWarning, match="gave up on compiling"),
    ):
        trainer(edit, max_epochs=1).fit(module(Broken()), own([2, 3, 4, 5, 6]))


# --- CUDA graphs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "marked"), [("reduce-overhead", 4 + 2), (None, 0)])
def test_each_step_begins_anew_for_cuda_graphs(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, mode: str | None, marked: int
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    edit = BlockCompile(backend="eager")
    edit.mode = mode
    monkeypatch.setattr(
        "lightning_accel.compilation.callbacks.block_compile.check", lambda *_: None
    )
    monkeypatch.setattr(
        "lightning_accel.compilation.callbacks.block_compile.compile_blocks",
        lambda model, **kwargs: compile_blocks(model, **{**kwargs, "mode": None}),
    )
    trainer(edit, max_epochs=1).fit(module(), data(16), data(8))
    assert len(begun) == marked


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"on_recompile": "explode"},
        {"on_recompile": None},
        {"ragged": True},
        {"ragged": None},
        {"warmup_steps": 0},
        {"warmup_steps": -1},
        {"warmup_steps": float("nan")},
        {"warmup_steps": "1"},
        {"warmup_steps": True},
    ],
)
def test_bad_arguments_are_refused_at_once(kwargs: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="Found: .*Do: "):
        BlockCompile(**kwargs)


def test_a_guarded_module_still_pickles() -> None:
    net = tiny.MLP()
    compile_blocks(net, backend="eager")
    expect(net, training=True, sizes=frozenset({4, 2}))
    net(torch.randn(4, 8))
    settle(net)
    torch.save(net, io.BytesIO())
