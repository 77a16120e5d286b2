"""Every construct that real networks are made of, as a tiny net, by kind: the laws are in test_constructs.py."""

from constructs import (
    attention,
    attention_of_torch,
    blocks,
    blocks_of_context,
    convolutions,
    forwards,
    gates,
    norms,
    recurrent,
    traps,
    vision,
    weights,
)
from constructs.build import BROKEN, CONSTRUCTS, Construct

__all__ = [
    "BROKEN",
    "CONSTRUCTS",
    "Construct",
    "attention",
    "attention_of_torch",
    "blocks",
    "blocks_of_context",
    "convolutions",
    "forwards",
    "gates",
    "norms",
    "recurrent",
    "traps",
    "vision",
    "weights",
]
