"""Real architectures by configuration, with random weights: nothing is downloaded.

`build(name)` makes one of `NAMES`, and just as well any other model of timm or torchvision, as in
`build("timm/resnet26t")`. Inputs are small, so that what takes time is the network's structure and not
its arithmetic. `python benchmarks/zoo.py` prints the list; with `--build-all` each is made and run forward
and backward, and what fails or is slow is said.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import zoo_packages
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

CLASSES = 10
VOCABULARY = 96
_BATCH = 2
_SLOW_S = 5.0

# The smallest of each family, with its structure as it is: residual, grouped, dense, attended, norm-free,
# mobile, with patches, perceptrons and recurrences.
_ANY_SIZE = """
    resnet18 resnet50 resnet26t resnet50_gn resnext26ts resnext50_32x4d wide_resnet50_2
    resnetv2_50 resnetv2_50x1_bit resnetblur18 seresnet18 ecaresnet26t gcresnet33ts skresnet18
    resnest14d res2net50_14w_8s res2next50 nf_resnet26 nfnet_l0 eca_nfnet_l0 regnetx_002
    regnety_002 regnetz_005 gernet_s densenet121 rdnet_tiny vovnet39a ese_vovnet19b_dw dpn48b
    dla34 dla46x_c hrnet_w18_small hgnetv2_b0 selecsls42b cspresnet50 cspresnext50 cspdarknet53
    darknet17 cs3darknet_focus_s xception41 legacy_xception tresnet_m mobilenetv1_100
    mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv4_hybrid_medium
    mobileone_s0 efficientnet_b0 efficientnetv2_rw_t tf_efficientnet_lite0 efficientnet_b0_gn
    mixnet_s mnasnet_small semnasnet_050 fbnetc_100 hardcorenas_a tinynet_e lcnet_050 rexnet_100
    ghostnet_050 ghostnetv2_100 repghostnet_050 repvgg_a0 repvit_m0_9 starnet_s050 fasternet_t0
    shvit_s1 convnext_atto convnextv2_atto inception_next_atto poolformer_s12 poolformerv2_s12
    convformer_s18 caformer_s18 focalnet_tiny_srf efficientvit_b0 efficientvit_m0 fastvit_t8
    mambaout_femto pvt_v2_b0 davit_tiny edgenext_xx_small mobilevit_xxs mobilevitv2_050
    tiny_vit_5m_224 swiftformer_xs nextvit_small
"""
# Transformers and others whose image size is an argument.
_BUILT_FOR_64 = """
    mixer_s32_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224 sequencer2d_s vit_tiny_patch16_224
    vit_small_patch32_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224
    vit_small_patch16_dinov3 vit_wee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256
    deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 cait_xxs24_224
    xcit_nano_12_p16_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 twins_svt_small
    twins_pcpvt_small nest_tiny hiera_tiny_224 mvitv2_tiny gcvit_xxtiny tnt_s_patch16_224
    pit_ti_224 pit_ti_distilled_224 volo_d1_224 coat_lite_tiny coat_tiny convit_tiny
    coatnet_nano_rw_224 maxvit_pico_rw_256 maxvit_tiny_tf_224 levit_128s levit_conv_128s
    visformer_tiny
"""
_TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: (64, {}) for name in _ANY_SIZE.split()},
    **{name: (64, {"img_size": 64}) for name in _BUILT_FOR_64.split()},
    "vgg11_bn": (64, {"mlp_ratio": 0.125}),
    "inception_v3": (96, {"aux_logits": False}),
    "inception_v4": (96, {}),
    "inception_resnet_v2": (96, {}),
    "convmixer_1024_20_ks9_p14": (56, {}),
    "vit_small_patch14_reg4_dinov2": (56, {"img_size": 56}),
    "vit_base_patch16_siglip_224": (64, {"img_size": 64, "depth": 4}),
    "beit_base_patch16_224": (64, {"img_size": 64, "depth": 4}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56}),
    "crossvit_tiny_240": (240, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (224, {}),
    "botnet26t_256": (128, {"img_size": 128}),
    "lambda_resnet26t": (128, {}),
    "halonet26t": (256, {}),
}
"""Image size and arguments."""

_TORCHVISION: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "vit_b_32": ((64, 64), {}),
    "resnet18": ((64, 64), {}),
    "resnext50_32x4d": ((64, 64), {}),
    "densenet121": ((64, 64), {}),
    "squeezenet1_1": ((64, 64), {}),
    "shufflenet_v2_x0_5": ((64, 64), {}),
    "mobilenet_v2": ((64, 64), {}),
    "mobilenet_v3_small": ((64, 64), {}),
    "mnasnet0_5": ((64, 64), {}),
    "efficientnet_b0": ((64, 64), {}),
    "regnet_y_400mf": ((64, 64), {}),
    "googlenet": ((64, 64), {"init_weights": False, "aux_logits": False}),
    "inception_v3": ((96, 96), {"init_weights": False, "aux_logits": False}),
    "convnext_tiny": ((64, 64), {}),
    "swin_t": ((64, 64), {}),
    "swin_v2_t": ((64, 64), {}),
    "maxvit_t": ((224, 224), {}),
    "r3d_18": ((4, 32, 32), {}),
    "r2plus1d_18": ((4, 32, 32), {}),
    "mc3_18": ((4, 32, 32), {}),
    "fcn_resnet50": ((64, 64), {"weights_backbone": None}),
    "deeplabv3_mobilenet_v3_large": ((64, 64), {"weights_backbone": None}),
    "lraspp_mobilenet_v3_large": ((64, 64), {"weights_backbone": None}),
}

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_WIDE_TEXT = {**_TEXT, "num_labels": 3, "pad_token_id": 1}
_SMALL_HEADS = {**_TEXT, "head_dim": 16}
_GROUPED = {**_SMALL_HEADS, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_IMAGE = {
    **{key: value for key, value in _TEXT.items() if key != "vocab_size"},
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}

# Class, class of its configuration, what is in that, and the inputs.
_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", {**_TEXT, "num_labels": 3}, "text"),
    "bert_eager": (
        "BertForSequenceClassification",
        "BertConfig",
        {**_TEXT, "num_labels": 3, "attn_implementation": "eager"},
        "text",
    ),
    "bert_masked": ("BertForMaskedLM", "BertConfig", _TEXT, "text and mask"),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _WIDE_TEXT, "text"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
        "text",
    ),
    "albert": (
        "AlbertForSequenceClassification",
        "AlbertConfig",
        {**_TEXT, "embedding_size": 32, "num_labels": 3},
        "text",
    ),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_TEXT, "embedding_size": 32},
        "text",
    ),
    "deberta_v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", _TEXT, "text"),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**_TEXT, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
        "text",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32},
        "text",
    ),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        "text",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, "text"),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 64,
        },
        "text",
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "text",
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", _TEXT, "text"),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "num_key_value_heads": 2},
        "text",
    ),
    "llama_multi_query": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_TEXT, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "text",
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED, "text"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_TEXT, "num_key_value_heads": 2}, "text"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _GROUPED, "text"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_GROUPED, **_EXPERTS}, "text"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GROUPED, "text"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GROUPED, "text"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED, "text"),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_TEXT, "partial_rotary_factor": 0.5}, "text"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_TEXT, "pad_token_id": 0}, "text"),
    "stablelm": (
        "StableLmForCausalLM",
        "StableLmConfig",
        {**_TEXT, "num_key_value_heads": 4},
        "text",
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**_TEXT, "pad_token_id": 0}, "text"),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**_TEXT, "pad_token_id": 0}, "text"),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, "text to text"),
    "t5_encoder": ("T5EncoderModel", "T5Config", _T5, "text"),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART, "text to text"),
    "vit": ("ViTForImageClassification", "ViTConfig", _IMAGE, "image"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _IMAGE, "image"),
    "beit": ("BeitForImageClassification", "BeitConfig", _IMAGE, "image"),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**_IMAGE, "mlp_ratio": 2},
        "image",
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "image_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "num_labels": 5,
        },
        "image",
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 5},
        "image",
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": 5,
        },
        "image",
    ),
    "mobilenet_v2": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.35, "image_size": 32, "num_labels": 5},
        "image",
    ),
    "segformer": (
        "SegformerForImageClassification",
        "SegformerConfig",
        {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_labels": 5},
        "image",
    ),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", _IMAGE, "image"),
    "clip_text": ("CLIPTextModel", "CLIPTextConfig", _TEXT, "text"),
    "siglip_vision": ("SiglipVisionModel", "SiglipVisionConfig", _IMAGE, "image"),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {
            **_TEXT,
            "conv_dim": [32, 32],
            "conv_stride": [5, 4],
            "conv_kernel": [10, 8],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "num_labels": 3,
        },
        "sound",
    ),
    "whisper_encoder": (
        "WhisperEncoder",
        "WhisperConfig",
        {**_BART, "num_mel_bins": 20, "max_source_positions": 32, "pad_token_id": 0},
        "spectrogram",
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        "text",
    ),
}


class Recurrent(nn.Module):
    """Classify a sequence by the last output of torch's own recurrent layers."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.inputs = nn.Linear(16, 32)
        self.recurrent = kind(32, 48, batch_first=True, **options)
        self.hidden = nn.Linear(96 if options.get("bidirectional") else 48, 64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(self.inputs(x).relu())  # (batch, time, features)
        return self.head(self.hidden(states[:, -1]).relu())


class Encoder(nn.Module):
    """Classify a sequence by torch's own transformer layers."""

    def __init__(self, dim: int = 64, depth: int = 2, **options: Any) -> None:
        super().__init__()
        self.inputs = nn.Linear(16, dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.inputs(x)).mean(1))


class Translator(nn.Module):
    """Encode one sequence and decode another by torch's own transformer."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.inputs = nn.Linear(16, dim)
        self.transformer = nn.Transformer(dim, 4, 2, 2, 2 * dim, batch_first=True)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.inputs(source), self.inputs(target)))


_TORCH: dict[str, Callable[[], nn.Module]] = {
    "transformer_encoder": lambda: Encoder(),
    "transformer_encoder_pre_norm": lambda: Encoder(norm_first=True, activation="gelu"),
    "transformer": lambda: Translator(),
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm_two_layers_both_ways": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "gru": lambda: Recurrent(nn.GRU),
    "gru_two_layers": lambda: Recurrent(nn.GRU, num_layers=2),
}

NAMES: tuple[str, ...] = tuple(
    f"{library}/{name}"
    for library, table in {
        "timm": _TIMM,
        "torchvision": _TORCHVISION,
        "transformers": _TRANSFORMERS,
        "torch": _TORCH,
        **zoo_packages.ENTRIES,
    }.items()
    for name in table
)
"""The architectures of the benchmark, as "library/model"."""


def available() -> list[str]:
    """Return those of `NAMES` whose library is installed here."""
    needs = {
        "timm": ("timm", "torchvision"),
        "torch": (),
        "segmentation_models_pytorch": ("segmentation_models_pytorch", "timm", "torchvision"),
    }
    missing = {
        library
        for library in (*_BUILDERS, *zoo_packages.ENTRIES)
        if not all(map(importlib.util.find_spec, needs.get(library, (library,))))
    }
    return [name for name in NAMES if name.partition("/")[0] not in missing]


def build(name: str) -> tuple[nn.Module, Any]:
    """Make a model with random weights in eval mode, and two samples that it takes.

    The example is a tensor, a tuple of arguments, or a dict of keyword arguments. Models of timm and
    torchvision outside `NAMES` are made in their own image size, shrunk where they take another.

    Raises:
        KeyError: There is no such library, or it has no such model.
    """
    library, _, model = name.partition("/")
    torch.manual_seed(0)
    if library in zoo_packages.ENTRIES:
        load_torchvision()
        with torch.no_grad():  # or weights under a norm have a graph, and there is no copy of them
            built, example = zoo_packages.ENTRIES[library][model].build()
    else:
        built, example = _BUILDERS[library](model)
    return built.eval(), example


def other_batch(example: Any, size: int) -> Any:
    """Return an example with `size` samples: its own, repeated where there are too few.

    >>> other_batch((torch.ones(2, 3),), 5)[0].shape
    torch.Size([5, 3])
    """
    if isinstance(example, dict):
        return {key: other_batch(value, size) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(other_batch(value, size) for value in example)
    batched = isinstance(example, Tensor) and example.dim() and len(example) == _BATCH
    return example[torch.arange(size) % _BATCH] if batched else example


def fresh(example: Any) -> Any:
    """Return other numbers in the same places; whole ones only change places, masks stay.

    >>> sorted(fresh(torch.arange(4)).tolist())
    [0, 1, 2, 3]
    """

    def other(tensor: Tensor) -> Tensor:
        if _is_noise(tensor):
            return torch.randn_like(tensor)
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            return tensor
        return tensor.flatten()[torch.randperm(tensor.numel())].view(tensor.shape)

    return tree_map_only(Tensor, other, example)


def other_sizes(example: Any) -> Iterator[Any]:
    """Yield examples of other sizes that a network may take: of images, of sequences, of both.

    >>> [tuple(x.shape) for x in other_sizes(torch.ones(2, 3, 8, 8))]
    [(2, 3, 12, 12), (2, 3, 16, 16), (2, 3, 4, 4)]
    """
    seen = {_shapes(example)}
    for dims in ({**_SPACE, **_TIME}, _SPACE, _TIME, _LAST):
        for factor in (1.5, 2.0, 0.5):
            sized = partial(_sized, dims=dims, factor=factor)
            other = tree_map_only(Tensor, sized, example)
            if _shapes(other) not in seen:
                seen.add(_shapes(other))
                yield other


# Dimensions by the number of them: of pixels or voxels, of tokens, and of samples of sound.
_SPACE = {4: (2, 3), 5: (2, 3, 4)}
_TIME = {2: (1,), 3: (1,)}
_LAST = {3: (2,), 5: (3, 4)}


def _shapes(example: Any) -> tuple[torch.Size, ...]:
    return tuple(t.shape for t in tree_leaves(example) if isinstance(t, Tensor))


def _is_noise(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool((tensor != tensor.round()).any())


def _sized(tensor: Tensor, dims: dict[int, tuple[int, ...]], factor: float) -> Tensor:
    if tensor.dim() == 2 and _is_noise(tensor):
        return tensor  # features, and no tokens
    for dim in dims.get(tensor.dim(), ()):
        size = max(1, int(tensor.shape[dim] * factor))
        tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
    return tensor


def load_torchvision() -> None:
    """Import torchvision, also where its compiled part does not fit torch.

    Without it two operators are missing, which no classifier needs, and the import fails; so they are
    declared first. timm and transformers import torchvision as well; without it they do without.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            _DECLARED.define(operator + arguments)
        importlib.import_module("torchvision")


_DECLARED = torch.library.Library("torchvision", "FRAGMENT")


def _timm(model: str) -> tuple[nn.Module, Any]:
    load_torchvision()
    import timm

    if model in _TIMM:
        size, options = _TIMM[model]
        return timm.create_model(model, num_classes=CLASSES, **options), _images(size, size)
    if not timm.is_model(model):
        raise KeyError(f"timm has no model {model!r}")
    with contextlib.suppress(Exception):
        built = timm.create_model(model, num_classes=CLASSES, img_size=64)
        built.eval()(_images(64, 64))
        return built, _images(64, 64)
    built = timm.create_model(model, num_classes=CLASSES)
    return built, _images(*built.default_cfg["input_size"][1:])


def _torchvision(model: str) -> tuple[nn.Module, Any]:
    load_torchvision()
    from torchvision.models import VisionTransformer, get_model, list_models

    if model == "vit_b_32":  # its builder takes neither a smaller width nor fewer layers
        return VisionTransformer(64, 16, 3, 12, 192, 384, num_classes=CLASSES), _images(64, 64)
    if model not in list_models():
        raise KeyError(f"torchvision has no model {model!r}")
    sizes, options = _TORCHVISION.get(model, ((224, 224), {}))
    return get_model(model, weights=None, num_classes=CLASSES, **options), _images(*sizes)


def _transformers(model: str) -> tuple[nn.Module, Any]:
    load_torchvision()  # transformers imports it, if it is there
    import transformers
    from transformers.models.whisper import modeling_whisper

    kind, configuration, options, inputs = _TRANSFORMERS[model]
    config = getattr(transformers, configuration)(**options)
    make = getattr(transformers, kind, None) or getattr(modeling_whisper, kind)
    for switch in ("use_cache", "return_dict"):
        setattr(config, switch, switch == "return_dict")
    return make(config), _INPUTS[inputs]()


def _torch(model: str) -> tuple[nn.Module, Any]:
    sequence = torch.randn(_BATCH, 7, 16)
    example: Any = (sequence, torch.randn(_BATCH, 5, 16)) if model == "transformer" else sequence
    return _TORCH[model](), example


_BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
    "torch": _torch,
}


def _images(*sizes: int) -> Tensor:
    return torch.randn(_BATCH, 3, *sizes)


def _tokens(length: int = 9) -> Tensor:
    return torch.randint(5, VOCABULARY, (_BATCH, length))


_INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "text": lambda: {"input_ids": _tokens()},
    "text and mask": lambda: {
        "input_ids": _tokens(),
        "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long(),
    },
    "text to text": lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens(6)},
    "image": lambda: {"pixel_values": _images(32, 32)},
    "sound": lambda: {"input_values": torch.randn(_BATCH, 1200)},
    "spectrogram": lambda: {"input_features": torch.randn(_BATCH, 20, 64)},
}


def quiet() -> None:
    """Silence what the libraries say while models are made, and keep them off the network."""
    warnings.simplefilter("ignore")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")


def main() -> int:
    """Print the names, or make and run each; exit status 1 when one fails or is slow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--build-all", action="store_true", help="make and run each")
    parser.add_argument("--only", default="*", help="pattern of names, such as 'timm/vit*'")
    args = parser.parse_args()
    quiet()
    names = [name for name in available() if fnmatchcase(name, args.only)]
    if not args.build_all:
        print("\n".join(names))
        return 0
    torch.set_num_threads(1)
    failures = [failure for name in names for failure in _tried(name)]
    print(f"{len(names) - len(failures)} of {len(names)} work", *failures, sep="\n")
    return int(bool(failures))


def _tried(name: str) -> Iterator[str]:
    from lightning_accel.measure.flops import count_macs
    from lightning_accel.surgery.call import as_call, tensors

    try:
        start = time.perf_counter()
        model, example = build(name)
        made = time.perf_counter()
        call = as_call(example)
        with torch.no_grad():
            model(*call.args, **call.kwargs)
        ran = time.perf_counter()
        outputs = tensors(model.train()(*call.args, **call.kwargs))
        sum(t.float().mean() for t in outputs if t.requires_grad).backward()  # type: ignore[union-attr]
        macs = count_macs(model.requires_grad_(False), call.args, call.kwargs)
    except Exception as error:
        yield f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return
    size = sum(p.numel() for p in model.parameters()) / 1e6
    missed = f", uncounted {', '.join(macs.missed)}" if macs.partial else ""
    print(
        f"{name}: made in {made - start:.1f} s, ran in {ran - made:.2f} s, "
        f"{size:.1f} M parameters, {macs.macs / 1e6:.0f} M multiply-accumulates{missed}",
        flush=True,
    )
    if ran - start > _SLOW_S:
        yield f"{name}: takes {ran - start:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
