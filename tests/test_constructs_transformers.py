"""The families of transformers, from tiny configurations: pruned by heads and width without being told how.

The truth is the dense network with the removed elements set to zero, found by value, norms being their affine
part on both sides; and, for language models, that decoding with a cache says what a plain forward says.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lightning_accel.pruning import prune
from lightning_accel.surgery import Structure, follow
from lightning_accel.surgery.call import tensors

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Family(NamedTuple):
    """How to build a tiny model, what it reads, and the shapes that half of all channels leave."""

    build: Callable[[], nn.Module]
    example: Callable[[int], dict[str, Any]]
    shapes: Mapping[str, tuple[int, ...]]
    generates: bool = False
    dtype: torch.dtype = torch.float64  # where the kernels of a family have it


def text(n: int, length: int = 6) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 50, (n, length))}


def padded(n: int) -> dict[str, Any]:
    mask = torch.ones(n, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {**text(n), "attention_mask": mask}


def pictures(n: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(n, 3, 16, 16)}


def two_texts(n: int) -> dict[str, Any]:
    return {**text(n), "decoder_input_ids": torch.randint(3, 50, (n, 4))}


def model(name: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Return what builds `name` anew; sizes that a family does not know are its own business."""

    def build() -> nn.Module:
        built = getattr(transformers, config)(**sizes)
        return getattr(transformers, name)(built)

    return build


PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
QUIET = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}

LLAMA = {
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.1.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.gate_proj.weight": (24, 16),
    "model.layers.1.mlp.down_proj.weight": (16, 24),
    "model.norm.weight": (16,),
    "lm_head.weight": (50, 16),
}

BERT = {
    "encoder.layer.0.attention.self.query.weight": (16, 16),
    "encoder.layer.1.attention.output.dense.weight": (16, 16),
    "encoder.layer.0.intermediate.dense.weight": (24, 16),
    "embeddings.word_embeddings.weight": (50, 16),
}


def under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


FAMILIES = {
    "bert": Family(
        model("BertForSequenceClassification", "BertConfig", num_labels=3, **PLAIN),
        padded,
        under("bert", BERT),
    ),
    "roberta": Family(
        model("RobertaForSequenceClassification", "RobertaConfig", num_labels=3, **PLAIN),
        text,
        under("roberta", BERT),
    ),
    "distilbert": Family(
        model(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            vocab_size=50,
            max_position_embeddings=16,
        ),
        text,
        {"distilbert.transformer.layer.0.attention.q_lin.weight": (16, 16)},
    ),
    "electra": Family(
        model("ElectraForSequenceClassification", "ElectraConfig", embedding_size=16, **PLAIN),
        text,
        {"electra.encoder.layer.0.attention.self.query.weight": (16, 16)},
    ),
    "albert": Family(
        model("AlbertForSequenceClassification", "AlbertConfig", embedding_size=16, **PLAIN),
        text,
        {"albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight": (16, 16)},
    ),
    "gpt2": Family(
        model(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=50,
            n_positions=16,
            **QUIET,
        ),
        text,
        {
            "transformer.h.0.attn.c_attn.weight": (16, 48),
            "transformer.h.0.attn.c_proj.weight": (16, 16),
            "transformer.h.1.mlp.c_fc.weight": (16, 64),
            "transformer.wte.weight": (50, 16),
            "lm_head.weight": (50, 16),
        },
        generates=True,
    ),
    "gpt_neo_x": Family(
        model("GPTNeoXForCausalLM", "GPTNeoXConfig", **PLAIN, **QUIET),
        text,
        {
            "gpt_neox.layers.0.attention.query_key_value.weight": (48, 16),
            "gpt_neox.layers.1.mlp.dense_h_to_4h.weight": (24, 16),
        },
        generates=True,
    ),
    "opt": Family(
        model(
            "OPTForCausalLM",
            "OPTConfig",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            vocab_size=50,
            max_position_embeddings=16,
            word_embed_proj_dim=32,
            **QUIET,
        ),
        text,
        {
            "model.decoder.layers.0.self_attn.q_proj.weight": (16, 16),
            "model.decoder.layers.0.fc1.weight": (24, 16),
        },
        generates=True,
    ),
    "bloom": Family(
        model(
            "BloomForCausalLM",
            "BloomConfig",
            hidden_size=32,
            n_layer=2,
            n_head=4,
            vocab_size=50,
            **QUIET,
        ),
        text,
        {"transformer.h.0.mlp.dense_h_to_4h.weight": (64, 16)},
        generates=True,
    ),
    "falcon": Family(
        model("FalconForCausalLM", "FalconConfig", **{**PLAIN, "ffn_hidden_size": 48}, **QUIET),
        text,
        {"transformer.h.0.mlp.dense_h_to_4h.weight": (24, 16)},
        generates=True,
    ),
    "llama": Family(
        model("LlamaForCausalLM", "LlamaConfig", **GROUPED, **QUIET), text, LLAMA, generates=True
    ),
    "llama_one_layer_wide_heads": Family(
        model("LlamaForCausalLM", "LlamaConfig", **{**GROUPED, "head_dim": 16}, **QUIET),
        text,
        {"model.layers.0.self_attn.q_proj.weight": (32, 16)},
        generates=True,
    ),
    "mistral": Family(
        model("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=4, **QUIET),
        text,
        LLAMA,
        generates=True,
    ),
    "qwen2": Family(
        model("Qwen2ForCausalLM", "Qwen2Config", **GROUPED, **QUIET), text, LLAMA, generates=True
    ),
    "qwen3": Family(
        model("Qwen3ForCausalLM", "Qwen3Config", **{**GROUPED, "head_dim": 8}, **QUIET),
        text,
        LLAMA,
        generates=True,
    ),
    "gemma": Family(
        model("GemmaForCausalLM", "GemmaConfig", **{**GROUPED, "head_dim": 8}, **QUIET),
        text,
        {"model.layers.0.self_attn.q_proj.weight": (16, 16)},
        generates=True,
    ),
    "phi": Family(
        model("PhiForCausalLM", "PhiConfig", **PLAIN, **QUIET),
        text,
        {"model.layers.0.self_attn.q_proj.weight": (16, 16)},
        generates=True,
    ),
    "mixtral": Family(
        model(
            "MixtralForCausalLM",
            "MixtralConfig",
            **GROUPED,
            num_local_experts=3,
            num_experts_per_tok=2,
            **QUIET,
        ),
        text,
        {
            "model.layers.0.self_attn.q_proj.weight": (16, 16),
            "model.layers.0.mlp.experts.gate_up_proj": (3, 48, 16),
            "model.layers.1.mlp.experts.down_proj": (3, 16, 24),
        },
        generates=True,
        dtype=torch.float32,
    ),
    "mamba": Family(
        model(
            "MambaForCausalLM",
            "MambaConfig",
            hidden_size=32,
            num_hidden_layers=2,
            vocab_size=50,
            state_size=4,
            time_step_rank=4,
            **QUIET,
        ),
        text,
        {"backbone.layers.0.mixer.out_proj.weight": (16, 32)},
    ),
    "t5": Family(
        model(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            vocab_size=50,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            **QUIET,
        ),
        two_texts,
        {
            "encoder.block.0.layer.0.SelfAttention.q.weight": (16, 32),
            "encoder.block.1.layer.1.DenseReluDense.wi.weight": (24, 32),
        },
    ),
    "bart": Family(
        model(
            "BartForConditionalGeneration",
            "BartConfig",
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=50,
            max_position_embeddings=16,
            **QUIET,
        ),
        two_texts,
        {
            "model.encoder.layers.0.self_attn.q_proj.weight": (16, 32),
            "model.decoder.layers.0.fc1.weight": (24, 32),
        },
    ),
    "vit": Family(
        model("ViTForImageClassification", "ViTConfig", **IMAGE),
        pictures,
        {"vit.embeddings.patch_embeddings.projection.weight": (16, 3, 4, 4)},
    ),
    "deit": Family(
        model("DeiTForImageClassification", "DeiTConfig", **IMAGE),
        pictures,
        {"deit.embeddings.distillation_token": (1, 1, 16)},
    ),
    "dinov2": Family(
        model("Dinov2ForImageClassification", "Dinov2Config", **IMAGE, mlp_ratio=2),
        pictures,
        {"dinov2.encoder.layer.0.layer_scale1.lambda1": (16,)},
    ),
    "swin": Family(
        model(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=16,
            depths=[2, 1],
            num_heads=[2, 4],
            window_size=4,
            num_labels=5,
        ),
        pictures,
        {"swin.embeddings.patch_embeddings.projection.weight": (8, 3, 2, 2)},
    ),
    "convnext": Family(
        model(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_stages=2,
            patch_size=2,
            image_size=16,
            num_labels=5,
        ),
        pictures,
        {"convnext.encoder.stages.1.layers.0.layer_scale_parameter": (8,)},
    ),
    "resnet": Family(
        model(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            num_labels=5,
        ),
        pictures,
        {"resnet.embedder.embedder.convolution.weight": (4, 3, 7, 7)},
    ),
    "segformer": Family(
        model(
            "SegformerForImageClassification",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            num_labels=5,
        ),
        pictures,
        {},
    ),
}

BROKEN: dict[str, str] = {}


def families(only: Callable[[Family], bool] = lambda family: True) -> list[Any]:
    return [
        pytest.param(n, marks=pytest.mark.xfail(strict=True, reason=BROKEN[n]))
        if n in BROKEN
        else n
        for n, family in FAMILIES.items()
        if only(family)
    ]


def made(name: str) -> nn.Module:
    """Build a family; no two values of a tensor are equal, so that survivors are found by value."""
    net = FAMILIES[name].build().to(FAMILIES[name].dtype)
    for parameter in net.parameters():
        values = torch.linspace(-0.4, 0.4, parameter.numel())[torch.randperm(parameter.numel())]
        parameter.data.copy_(values.view_as(parameter))
    for key, buffer in net.named_buffers():
        if "running_var" in key:
            buffer.uniform_(0.5, 1.5)
    return net


def run(net: nn.Module, example: Mapping[str, Any]) -> list[Tensor]:
    dtype = next(net.parameters()).dtype
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in example.items()}
    outputs = net(**inputs, **({"use_cache": False} if hasattr(net, "generation_config") else {}))
    return [t for t in tensors(outputs) if t.is_floating_point()]


def with_plain_norms(net: nn.Module) -> nn.Module:
    """Replace norms across channels by their affine part, in a copy."""
    net = copy.deepcopy(net)
    for module in net.modules():
        kind = type(module).__name__
        if kind.endswith(("RMSNorm", "LayerNorm", "GroupNorm")) and "Batch" not in kind:
            module.forward = affine_of(module)
    return net


def affine_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    channels_first = getattr(module, "data_format", "") == "channels_first"

    def affine(x: Tensor) -> Tensor:
        for value, verb in ((weight, torch.mul), (bias, torch.add)):
            if value is not None:
                x = verb(x, value[:, None, None] if channels_first else value)
        return x

    return affine


@pytest.mark.parametrize("name", families())
def test_a_family_is_pruned_as_its_masked_twin_and_comes_back(name: str) -> None:
    family, net = FAMILIES[name], made(name).train()
    dense = family.build().to(family.dtype)
    dense.load_state_dict(net.state_dict())
    objects = dict(net.named_parameters(remove_duplicate=False))
    optimizer = torch.optim.SGD(net.parameters(), 0.01, 0.9)
    receipt = prune(net, example=family.example(3), ratio=0.5)

    shapes = {n: tuple(t.shape) for n, t in net.state_dict(keep_vars=True).items()}
    assert {n: shapes[n] for n in family.shapes} == dict(family.shapes), receipt.skipped
    kept = sum(p.numel() for p in net.parameters()) / sum(p.numel() for p in dense.parameters())
    assert kept < 0.6, receipt.skipped
    now = dict(net.named_parameters(remove_duplicate=False))
    assert net.training and all(now[n] is p for n, p in objects.items())

    example = family.example(5)
    original = run(dense.eval(), example)
    for key, tensor in dense.named_parameters():
        alive = torch.isin(tensor.detach(), now[key].detach())
        assert alive.sum() == now[key].numel(), key
        tensor.data.mul_(alive)
    small, wanted = (run(with_plain_norms(m.eval()), example) for m in (net, dense))
    for one, other in zip(small, wanted, strict=True):
        close = 1e-9 if family.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(one, other, rtol=close, atol=close * float(other.abs().max()))
    outputs = run(net, example)
    assert [t.shape for t in outputs] == [t.shape for t in original]

    buffer = io.BytesIO()
    torch.save({"weights": net.state_dict(), "structure": Structure.of(net).to_dict()}, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    fresh = family.build().to(family.dtype)
    structure = Structure.from_dict(stored["structure"])
    structure.check(fresh)
    structure.apply(fresh)
    fresh.load_state_dict(stored["weights"])
    again = run(fresh.eval(), example)
    assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))

    follow(optimizer, receipt)
    sum(t.square().mean() for t in run(net.train(), family.example(2))).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", families(lambda family: family.generates))
def test_a_pruned_language_model_decodes_with_its_cache(name: str) -> None:
    net = made(name).eval()
    for parameter in net.parameters():
        parameter.data.mul_(0.3)
    prune(net, example=text(2), ratio=0.5)
    prompt = text(2)["input_ids"]
    found = net.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    plain = prompt
    with torch.no_grad():
        for _ in range(4):
            logits = net(input_ids=plain, use_cache=False).logits[:, -1]
            logits[:, 1] = -torch.inf  # the end may not come so early
            plain = torch.cat([plain, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, plain)
