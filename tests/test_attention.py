"""The attention kernel that is put first is the one that runs, and the order before comes back."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel.attention import BACKENDS, AttentionBackend, attention_backend, uses_attention

KERNELS = ("flash", "mem_efficient", "cudnn", "math")

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.usefixtures("clean_dynamo"),
]


class Attending(LightningModule):
    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.net, self.seen, self.fail_at = tiny.AttentionNet(), [], fail_at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(kernel())
        if batch_idx == self.fail_at:
            raise RuntimeError("the user's own")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(kernel())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def state() -> tuple[Any, ...]:
    """What the process knows about attention."""
    flags = [getattr(torch.backends.cuda, f"{n}_sdp_enabled")() for n in KERNELS]
    return tuple(torch._C._get_sdp_priority_order()), flags


def kernel() -> SDPBackend:
    """What PyTorch would take now."""
    q = torch.ones(1, 1, 4, 8)
    return SDPBackend(torch._fused_sdp_choice(q, q, q))


def data() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(8, 5, 8), torch.arange(8) % 4), 4)


def test_the_first_kernel_is_the_one_that_runs() -> None:
    assert kernel() == SDPBackend.FLASH_ATTENTION
    with attention_backend("math"):
        assert kernel() == SDPBackend.MATH
    with attention_backend("flash"):
        assert kernel() == SDPBackend.FLASH_ATTENTION


def test_kernels_agree() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 8, 16, dtype=torch.float64) for _ in range(3))
    truth = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
    for name in BACKENDS:
        with attention_backend(name):
            found = F.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(found, truth)


def test_what_the_first_cannot_do_still_runs() -> None:
    """cuDNN has no CPU, and flash no mask that needs a gradient."""
    q = torch.randn(1, 1, 4, 8)
    mask = torch.zeros(4, 4, requires_grad=True)
    for name in BACKENDS:
        with attention_backend(name):
            F.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()
    assert mask.grad is not None


def test_what_was_before_comes_back() -> None:
    before = state()
    with attention_backend("math"):
        inside = state()
        with attention_backend("efficient"):
            assert state() != inside
        assert state()[1] == inside[1] and kernel() == SDPBackend.MATH
    assert state() == before
    with pytest.raises(KeyError, match="mine"), attention_backend("math"):
        raise KeyError("mine")
    assert state() == before
    with sdpa_kernel(SDPBackend.MATH):  # the user's own
        with attention_backend("flash"):
            pass
        assert kernel() == SDPBackend.MATH


@pytest.mark.parametrize("name", [None, "", "Flash", 3, ["flash"], b"flash", float("nan")])
def test_an_unknown_kernel_is_refused_in_three_parts(name: Any) -> None:
    kind = ValueError if isinstance(name, str) else TypeError
    for call in (AttentionBackend, lambda n: attention_backend(n).__enter__()):
        with pytest.raises(kind, match="Found: .* Do: .*'flash'"):
            call(name)


def test_calls_are_found_where_they_hide() -> None:
    x = torch.randn(2, 3, 8)
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    heads = nn.MultiheadAttention(8, 2, batch_first=True)
    assert uses_attention(lambda: tiny.AttentionNet()(torch.randn(4, 5, 8)))
    assert uses_attention(lambda: layer.train()(x))
    assert uses_attention(lambda: heads(x, x, x, need_weights=False))
    assert not uses_attention(lambda: heads(x, x, x))  # weights are asked for: products by hand
    assert not uses_attention(lambda: tiny.MLP()(torch.randn(4, 8)))


def test_the_callback_holds_it_while_the_trainer_runs(trainer_kwargs: dict[str, Any]) -> None:
    before, model = state(), Attending()
    trainer = Trainer(**trainer_kwargs, callbacks=[AttentionBackend("math")])
    trainer.fit(model, data(), data())
    trainer.validate(model, data(), verbose=False)
    assert set(model.seen) == {SDPBackend.MATH} and len(model.seen) == 10
    assert state() == before


def test_a_failed_fit_gives_the_order_back(trainer_kwargs: dict[str, Any]) -> None:
    before = state()
    trainer = Trainer(**trainer_kwargs, callbacks=[AttentionBackend("math")])
    with pytest.raises(RuntimeError, match="own"):
        trainer.fit(Attending(fail_at=1), data())
    assert state() == before
    trainer.fit(Attending(), data())  # the same Trainer again
    assert state() == before


def test_two_fits_in_one_do_not_mix(trainer_kwargs: dict[str, Any]) -> None:
    """A validation that a user starts within a fit ends before the fit does."""
    before, model = state(), Attending()
    inner = Trainer(**trainer_kwargs, callbacks=[AttentionBackend("efficient")])

    class Validates(AttentionBackend):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            inner.validate(Attending(), data(), verbose=False)
            assert kernel() == SDPBackend.MATH

    Trainer(**trainer_kwargs, callbacks=[Validates("math")]).fit(model, data())
    assert state() == before


def test_a_training_without_attention_is_told_once(trainer_kwargs: dict[str, Any]) -> None:
    class Dense(Attending):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append("training_step" in vars(self))
            return self.net.head(batch[0]).square().mean()

    def fit(model: LightningModule) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kwargs = {**trainer_kwargs, "callbacks": [AttentionBackend("math")]}
            Trainer(**kwargs).fit(model, data())
        return [str(w.message) for w in caught if "AttentionBackend" in str(w.message)]

    dense = Dense()
    dense.net.head = nn.Linear(8, 4)
    (said,) = fit(dense)
    assert "no call of `scaled_dot_product_attention` in a step of Dense" in said
    assert "Do: leave it out" in said
    assert dense.seen == [True, False, False, False], "looked at once"
    assert not fit(Attending())
    dense.compiled = torch.compile(lambda x: x, backend="eager")  # where a look would compile anew
    assert not fit(dense)
