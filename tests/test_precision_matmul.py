"""The setting of float32 products: what each does is measured, and every flag of the process comes back."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_accel.precision import MatmulPrecision, matmul, matmul_precision, probe_matmul
from lightning_accel.precision.matmul import MatmulChoice, Probe, choose, read, write

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)

EXACT, SHORT = 3e-7, 3e-4
FLAGS = [(b, "matmul") for b in ("cuda", "mkldnn")] + [
    (b, "all") for b in ("generic", "cuda", "mkldnn")
]


@pytest.fixture(autouse=True)
def _flags() -> Iterator[None]:
    before = read()
    yield
    torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    for backend in ("cuda", "mkldnn"):
        torch._C._set_fp32_precision_setter(backend, "all", "none")
    write(before)


def resolved() -> list[str]:
    """Return every flag as PyTorch resolves it."""
    return [torch._C._get_fp32_precision_getter(*flag) for flag in FLAGS]


def fully() -> tuple[Any, ...]:
    """Return all there is to see of the state: what flags are, and what they become when parents change."""
    seen: list[Any] = [resolved()]
    try:
        seen.append(torch.get_float32_matmul_precision())
    except RuntimeError as error:
        seen.append(str(error)[:60])
    top = torch._C._get_fp32_precision_getter("generic", "all")
    for value in ("ieee", "tf32", "bf16", "none"):
        torch._C._set_fp32_precision_setter("generic", "all", value)
        seen.append(resolved())
    torch._C._set_fp32_precision_setter("generic", "all", top)
    return tuple(map(str, seen))


def _old(name: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(name)


def _whole() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]


def _mixed() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]


def _new() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _backend() -> None:
    torch._C._set_fp32_precision_setter("mkldnn", "all", "bf16")
    torch._C._set_fp32_precision_setter("generic", "all", "tf32")


STATES = {
    "default": lambda: None,
    **{name: _old(name) for name in matmul.PRECISIONS},
    "whole": _whole,
    "mixed": _mixed,
    "new": _new,
    "backend": _backend,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", matmul.PRECISIONS)
def test_every_flag_of_the_process_comes_back(state: str, name: str) -> None:
    STATES[state]()
    before = fully()

    def nested() -> None:
        with matmul_precision(name):
            assert torch.get_float32_matmul_precision() == name
            with matmul_precision("highest"):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == name
            raise KeyError

    with pytest.raises(KeyError):
        nested()
    assert fully() == before


@pytest.mark.parametrize("state", STATES)
def test_reading_changes_nothing(state: str) -> None:
    STATES[state]()
    before = fully()
    assert read() == read()
    assert fully() == before


@pytest.mark.parametrize("old", matmul.PRECISIONS)
def test_an_old_setting_hidden_behind_newer_flags_comes_back_too(old: str) -> None:
    torch.set_float32_matmul_precision(old)
    values = [torch._C._get_fp32_precision_getter(b, "matmul") for b in ("cuda", "mkldnn")]
    others = {"highest": ("tf32", "tf32"), "high": ("ieee", "bf16"), "medium": ("ieee", "tf32")}
    for backend, other in zip(("cuda", "mkldnn"), others[old], strict=True):
        torch._C._set_fp32_precision_setter(backend, "matmul", other)
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    with matmul_precision("medium"):
        pass
    for backend, value in zip(("cuda", "mkldnn"), values, strict=True):
        torch._C._set_fp32_precision_setter(backend, "matmul", value)
    assert torch.get_float32_matmul_precision() == old


def test_convolutions_are_left_alone() -> None:
    flags = [(b, op) for b in ("cuda", "mkldnn") for op in ("conv", "rnn")]
    before = [torch._C._get_fp32_precision_getter(*flag) for flag in flags]
    with matmul_precision("medium"):
        assert [torch._C._get_fp32_precision_getter(*flag) for flag in flags] == before


def test_a_probe_tells_what_the_setting_does_here() -> None:
    state = torch.get_rng_state()
    for name in matmul.PRECISIONS:
        found = probe_matmul(name, "cpu")
        left, right = torch.randn(256, 384), torch.randn(384, 256)
        with matmul_precision(name):
            mine = (left @ right).double()
        truth = left.double() @ right.double()
        error = float((mine - truth).norm() / truth.norm())
        assert error / 4 < found.relative_error < error * 4
        assert found.exact == (error < 1e-5)
        assert found.ratio > 0
    torch.set_rng_state(state)
    matmul._probe.cache_clear()
    probe_matmul("medium")
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_never_takes_what_a_clock_of_its_own_finds_slower() -> None:
    name = choose("auto", "cpu").precision
    assert name == "highest" or probe_matmul(name, "cpu").ratio >= 1.1
    assert name == "highest" or probe_matmul(name, "cpu").exact


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend a device on which the settings have these gains and errors."""

    def pretend(high: tuple[float, float], medium: tuple[float, float]) -> None:
        found = {"high": Probe(*high, EXACT), "medium": Probe(*medium, EXACT)}
        monkeypatch.setattr(matmul, "probe_matmul", lambda name, device: found[name])

    return pretend


@pytest.mark.parametrize(
    ("high", "medium", "exact", "short"),
    [
        ((1.0, EXACT), (2.2, 2 * EXACT), "medium", "medium"),  # AMD: another library, still float32
        ((1.0, EXACT), (4.0, 3e-3), "highest", "medium"),  # AMX: bfloat16
        ((6.0, SHORT), (6.1, SHORT), "highest", "high"),  # TF32, twice the same
        ((1.05, EXACT), (1.02, EXACT), "highest", "highest"),  # a tie
        ((0.5, EXACT), (0.4, EXACT), "highest", "highest"),  # slower
        ((1.5, EXACT), (3.0, SHORT), "high", "medium"),
    ],
)
def test_auto_takes_the_fastest_that_is_still_float32(
    device: Any, high: Any, medium: Any, exact: str, short: str
) -> None:
    device(high, medium)
    assert choose("auto").precision == exact
    assert choose("auto", allow_short=True).precision == short


def test_the_reason_names_what_would_be_faster_and_how_to_get_it(device: Any) -> None:
    device((6.0, SHORT), (6.1, SHORT))
    assert "allow_short=True" in choose("auto").reason and "6.1x" in choose("auto").reason
    assert "a shorter format" in choose("high").reason
    device((1.0, EXACT), (1.0, EXACT))
    assert "not clearly faster here" in choose("medium").reason


class Net(BoringModel):
    """Notes the setting of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.add(torch.get_float32_matmul_precision())
        return super().training_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.add(torch.get_float32_matmul_precision())
        return super().test_step(batch, batch_idx)


@pytest.fixture
def trainer(trainer_kwargs: dict[str, Any]) -> Callable[..., Trainer]:
    return lambda *callbacks, **kwargs: Trainer(
        **{**trainer_kwargs, "max_steps": 2, "max_epochs": -1, "limit_val_batches": 0, **kwargs},
        callbacks=[*callbacks],
    )


def test_the_setting_holds_in_every_stage_and_ends_with_it(trainer: Any) -> None:
    torch.set_float32_matmul_precision("high")
    before = fully()
    callback, net = MatmulPrecision("medium"), Net()
    trainer(callback).fit(net)
    assert fully() == before
    trainer(callback).test(net, verbose=False)
    assert net.seen == {"medium"} and fully() == before


def test_an_exception_restores_too_also_one_before_our_setup(trainer: Any) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyError("now")

    class FailsEarly(Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            raise KeyError("early")

    for callbacks in ([Fails()], [FailsEarly()]):
        before = fully()
        with pytest.raises(KeyError):
            trainer(*callbacks, MatmulPrecision("medium")).fit(Net())
        assert fully() == before


def test_trainers_within_trainers_restore_what_they_found(trainer: Any) -> None:
    shared = MatmulPrecision("medium")
    seen = []

    class Inner(Callback):
        def on_train_start(self, *_: Any) -> None:
            for callback in (MatmulPrecision("high"), shared):
                trainer(callback).fit(Net())
                seen.append(torch.get_float32_matmul_precision())

    before, net = fully(), Net()
    trainer(shared, Inner()).fit(net)
    assert seen == ["medium", "medium"] and net.seen == {"medium"} and fully() == before


def test_the_choice_is_said_once_with_its_reason(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_accel.precision.callbacks import matmul_precision as adapter

    said: list[str] = []
    monkeypatch.setattr(adapter, "rank_zero_info", said.append)
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(
        adapter.matmul, "choose", lambda *_, **__: MatmulChoice("medium", "so it is")
    )
    callback = MatmulPrecision()
    for _ in range(2):
        trainer(callback).fit(Net())
    assert said == ["float32 matrix products: 'medium' (was 'high'): so it is."]


@pytest.mark.parametrize("bad", ["bf16", "", "HIGH", "32"])
def test_an_unknown_setting_is_refused_with_the_known_ones(bad: str) -> None:
    for call in (MatmulPrecision, choose):
        with pytest.raises(ValueError, match="'highest', 'high', 'medium', 'auto'"):
            call(bad)
    with pytest.raises(ValueError, match="'medium'"), matmul_precision(bad):
        pass
    with pytest.raises(ValueError, match="'medium'"):
        probe_matmul(bad)


@pytest.mark.parametrize("bad", [None, 0, -1, float("nan"), True])
def test_a_setting_that_is_no_name_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match="'medium'"):
        MatmulPrecision(bad)
    if bad is not True:
        with pytest.raises(TypeError, match="`allow_short`"):
            MatmulPrecision(allow_short=bad)


def test_auto_is_no_setting_of_the_process() -> None:
    with pytest.raises(ValueError, match="'highest', 'high', 'medium'"), matmul_precision("auto"):
        pass


_DDP = """
    import json, os, sys, warnings
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning_accel.precision import MatmulPrecision, matmul
    from lightning_accel.precision.matmul import MatmulChoice, Probe
    warnings.filterwarnings("ignore")
    rank = int(os.environ.get("LOCAL_RANK", 0))
    short = sys.argv[2] == "short"  # rank 1 is another machine, on which "medium" computes in bfloat16
    matmul.choose = lambda *a, **k: MatmulChoice("medium" if rank == 0 else "high", f"rank {rank}")
    matmul.probe_matmul = lambda *a: Probe(2.0, 3e-3 if short and rank else 3e-7, 3e-7)
    seen = []
    class Net(BoringModel):
        def training_step(self, batch, batch_idx):
            seen.append(torch.get_float32_matmul_precision())
            return super().training_step(batch, batch_idx)
    Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=2, callbacks=[MatmulPrecision()],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0,
            default_root_dir=sys.argv[1]).fit(Net())
    with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as file:
        json.dump([seen, torch.get_float32_matmul_precision()], file)
"""


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize(("case", "expected"), [("equal", "medium"), ("short", "highest")])
def test_ranks_agree_and_none_computes_shorter(
    tmp_path: Path, root: Path, case: str, expected: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(_DDP))
    status, printed = forks.run_ranks(script, str(tmp_path), case, cwd=tmp_path)
    assert status == 0, printed[-3000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [[expected, expected], "highest"]
