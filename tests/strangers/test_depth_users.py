"""What people met who took whole layers out of a network by hand, or with the nearest tools."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning, load_from_checkpoint
from lightning_accel.pruning import Macs, prune
from lightning_accel.surgery import follow
from lightning_accel.surgery.bypass import Bypass


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def resnet() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU())
    blocks = [Basic(4, 4), Basic(4, 8, 2), Basic(8, 8), Basic(8, 8)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_a_resnet_trains_on_as_one_with_identities_in_place_of_its_blocks() -> None:
    """VainF/Torch-Pruning#254: `nn.Identity` in place of a layer, which does not do where sizes change."""
    net, images = resnet(), torch.randn(4, 3, 8, 8)
    sgd = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    step(net, sgd, images)
    by_hand = copy.deepcopy(net)
    receipt = prune(net, example=images, ratio=0.7, depth="only")
    follow(sgd, receipt)
    names = [c.name for c in receipt.changes]
    assert len(names) == 2 and {c.name for c in receipt.skipped} == {"2"}
    for name in names:
        by_hand[int(name)] = nn.Identity()
    theirs = torch.optim.SGD(by_hand.parameters(), 0.05, momentum=0.9)
    for mine, other in zip(net.parameters(), by_hand.parameters(), strict=True):
        theirs.state[other] = copy.deepcopy(sgd.state[mine])
    for _ in range(3):
        step(net, sgd, images)
        step(by_hand, theirs, images)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in by_hand.state_dict().items())


def step(net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(images), torch.arange(4) % 3).backward()
    optimizer.step()


class Attention(nn.Module):
    """Keeps keys and values of earlier tokens in a cache that counts layers."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.qkv, self.out = layer_idx, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: dict[int, Tensor] | None) -> Tensor:
        q, kv = self.qkv(x).split((8, 16), -1)
        if cache is not None:
            kv = cache[self.layer_idx] = (
                torch.cat((cache[self.layer_idx], kv), 1) if self.layer_idx in cache else kv
            )
        k, v = kv.chunk(2, -1)
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask.tril(k.shape[1] - q.shape[1])))


class Decoder(nn.Module):
    def __init__(self, layer_idx: int, attention_type: str) -> None:
        super().__init__()
        self.attn, self.norm = Attention(layer_idx), nn.LayerNorm(8)
        self.attention_type = attention_type

    def forward(
        self, hidden_states: Tensor, scale: Tensor, cache: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        return (hidden_states + scale * self.attn(self.norm(hidden_states), cache),)


class Language(nn.Module):
    """As the decoders of transformers: what a layer gets hangs on its number and on a list of the config."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_types = ["full", "sliding", "full", "sliding"]
        self.embed, self.places = nn.Embedding(16, 8), nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Decoder(n, kind) for n, kind in enumerate(self.layer_types)])
        self.head = nn.Linear(8, 16)

    def forward(self, tokens: Tensor, cache: dict[int, Tensor] | None = None) -> Tensor:
        seen = cache[0].shape[1] if cache else 0
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]) + seen)
        scales = {"full": torch.ones(()), "sliding": torch.full((), 0.5)}
        for kind, layer in zip(self.layer_types, self.layers, strict=True):
            assert layer.attention_type == kind
            (x,) = layer(x, scale=scales[layer.attention_type], cache=cache)
        return self.head(x)


def test_a_cache_that_counts_layers_goes_on() -> None:
    """huggingface/transformers#30508: an index error of the cache; and one that is silently empty for layer 0."""
    net, tokens = Language().eval(), torch.randint(0, 16, (2, 6))
    receipt = prune(net, example=tokens, ratio=0.7, depth="only")
    assert len([c for c in receipt.changes if c.what == "removed"]) == 2
    assert (
        "count their length by this layer" in {c.name: c.what for c in receipt.skipped}["layers.0"]
    )
    cache: dict[int, Tensor] = {}
    with torch.no_grad():
        one_by_one = [net(tokens[:, n : n + 1], cache) for n in range(6)]
        assert torch.allclose(torch.cat(one_by_one, 1), net(tokens), atol=1e-6)


def test_a_list_with_an_entry_per_layer_stays_in_step() -> None:
    """peremartra/optipfair#20: `layer_types` had an entry for each layer that was deleted."""
    net, tokens = Language(), torch.randint(0, 16, (2, 6))
    dense = copy.deepcopy(net)
    prune(net, example=tokens, ratio=0.4, depth="only")
    (gone,) = (n for n, layer in enumerate(net.layers) if isinstance(layer, Bypass))
    x = dense.embed(tokens) + dense.places(torch.arange(6))
    for n, layer in enumerate(dense.layers):
        if n != gone:
            (x,) = layer(x, torch.tensor(1.0 if n % 2 == 0 else 0.5))
    assert torch.allclose(net(tokens), dense.head(x))


class Dropping(nn.Module):
    """LayerDrop: in training each layer is left out at random."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not self.training or float(torch.rand(())) > 0.5:
                x = layer(x)
        return x


class Trained(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Dropping(), nn.Linear(8, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.net(batch[0]).mean(1)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(16, 5, 8), torch.arange(16) % 4), 8)


@pytest.mark.slow
def test_a_restored_network_without_layers_is_pruned_and_saved_again(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """facebookresearch/fairseq#1406, #2507: a file whose layers had been dropped could not be written or read again."""

    def fit(folder: str, ckpt: Path | None, module: Trained, **how: Any) -> Path:
        saving = ModelCheckpoint(tmp_path / folder, filename="last")
        callbacks = [StructuredPruning(when=1, **how), saving]
        given = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": callbacks}
        trainer = Trainer(**{**trainer_kwargs, **given})
        if ckpt is not None:  # a new fit of what the file holds
            module = load_from_checkpoint(Trained, ckpt)
        trainer.fit(module, data())
        return tmp_path / folder / "last.ckpt"

    first = fit("a", None, Trained(), ratio=0.3, depth="only")
    second = fit("b", first, Trained(), target=Macs(0.5), depth=True)
    gone = [
        [n for n, layer in enumerate(loaded.net.layers) if isinstance(layer, Bypass)]
        for loaded in (load_from_checkpoint(Trained, first), load_from_checkpoint(Trained, second))
    ]
    assert len(gone[0]) == 1 and set(gone[0]) < set(gone[1])
    loaded, stored = load_from_checkpoint(Trained, second), torch.load(second, weights_only=True)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in stored["state_dict"].items())


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_layers_of_transformers_go_and_its_cache_goes_on() -> None:
    """huggingface/transformers#30508, with the library itself."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=24,
    )  # fmt: skip
    net, tokens = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 20, (2, 8))
    receipt = prune(net, example={"input_ids": tokens}, ratio=0.7, depth="only")
    assert "2 fewer of its layers' outputs" in receipt.notes[-1]
    with torch.no_grad():
        whole = net(tokens, output_hidden_states=True)
        first = net(tokens[:, :5], use_cache=True)
        rest = net(tokens[:, 5:], past_key_values=first.past_key_values)
    assert len(whole.hidden_states) == 3
    assert torch.allclose(rest.logits, whole.logits[:, 5:], atol=1e-5)
