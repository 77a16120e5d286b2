"""One 128-bit key for each row of a call: two rows share a key when they are the same, bit by bit.

The key of row i stands for everything the teacher can see of it: the bytes of row i of every tensor
whose first dimension is the batch, and all the rest of the call (other tensors, scalars, names,
structure), which is the same for all rows and is called the salt. The number of rows is no part of
it, so a row keeps its key in another order, in another batch or in a last, smaller one.

Rows are hashed where they are, on their own device, and 16 bytes of each come to the CPU. Row x is cut
into words of 16 bits, and both halves of its key are sums of word times weight modulo 2^64, with two
sets of random 64-bit weights (Carter and Wegman 1979; the form is that of Lemire and Kaser 2012, arXiv
1202.4961). Words are short for a reason: the product of a weight with 2^63 is 2^63 or 0 whatever the
weight, so with words of 64 bits two flipped signs could cancel and rows of +1 and -1 would collide.
With words of 16 bits any two different rows agree in both sums with a chance of at most 2^-98.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_accel.errors import explain

_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic)
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_WORDS_CPU = 2**16
_WORDS_ELSEWHERE = 2**24
"""Words per step, so that their products stay in the cache of a CPU; elsewhere launches are few."""


def row_keys(
    args: Sequence[Any], kwargs: Mapping[str, Any], *, batch: int, salt: bytes
) -> np.ndarray:
    """Return the keys of the rows of a call, uint64 of shape (batch, 2).

    Args:
        args: Positional arguments, nested as `torch.utils._pytree` understands it.
        kwargs: Keyword arguments; their order does not matter.
        batch: Rows; a tensor with this first dimension is hashed row by row, any other one as a whole.
        salt: What else the answer depends on, such as the fingerprint of the teacher.

    Raises:
        TypeError: An argument is no tensor, number or string, so that its content cannot be hashed.

    >>> keys = row_keys([torch.tensor([[1.0], [2.0], [1.0]])], {}, batch=3, salt=b"teacher")
    >>> keys.shape, bool((keys[0] == keys[2]).all()), bool((keys[0] == keys[1]).any())
    ((3, 2), True, False)
    """
    rest = hashlib.blake2b(salt, digest_size=16)
    sums: Tensor | None = None
    position = 0
    for path, leaf in _leaves({"args": list(args), "kwargs": dict(kwargs)}, ""):
        rest.update(path.encode() + b"\0")
        if not isinstance(leaf, Tensor):
            rest.update(_bytes_of(leaf, path) + b"\0")
            continue
        by_row = leaf.dim() > 0 and leaf.shape[0] == batch
        shape = tuple(leaf.shape[1:]) if by_row else tuple(leaf.shape)
        rest.update(f"{'rows' if by_row else 'whole'} {leaf.dtype} {shape}\0".encode())
        own = _sums(leaf, path, batch if by_row else 1, position)
        position += 1
        if by_row:
            sums = own if sums is None else sums + own.to(sums.device)
        else:
            rest.update(own.cpu().numpy().tobytes())
    rows = np.zeros((batch, 2), np.uint64) if sums is None else sums.cpu().numpy().view(np.uint64)
    return _mix(rows + np.frombuffer(rest.digest(), np.uint64))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield what is nested in `node` with its place; every container yields its kind and length."""
    if type(node) is dict:  # what else is nested has an order of its own, or is refused
        yield path, f"dict of {len(node)}"
        for key in sorted(node, key=repr):
            yield from _leaves(node[key], f"{path}[{key!r}]")
        return
    children, spec = pytree.tree_flatten(node, is_leaf=lambda inner: inner is not node)
    if len(children) == 1 and children[0] is node:
        yield path, node
        return
    yield path, f"{spec.type} {spec.context} of {len(children)}"
    for number, child in enumerate(children):
        yield from _leaves(child, f"{path}[{number}]")


def _bytes_of(leaf: Any, path: str) -> bytes:
    if isinstance(leaf, _PLAIN) or type(leaf) in _NAMED:
        return f"{type(leaf)} {leaf!r}".encode()
    if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
        return f"{leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes()
    raise TypeError(
        explain(
            f"the argument {path} of the teacher cannot be hashed, so its answers cannot be cached",
            f"{type(leaf).__name__}",
            "hand the model tensors, numbers and strings, or leave the cache out",
        )
    )


def _sums(tensor: Tensor, path: str, rows: int, position: int) -> Tensor:
    """Return two sums of word times weight modulo 2^64 for each row, int64 of shape (rows, 2)."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(
            explain(
                f"the tensor {path} cannot be hashed, so the teacher's answers cannot be cached",
                f"{'a meta tensor' if tensor.is_meta else tensor.layout}",
                "hand the model dense tensors, or leave the cache out",
            )
        )
    words = _words(tensor.detach(), rows)
    count = words.shape[1]
    weights = _weights(position, _bucket(count), str(words.device))
    sums = torch.zeros(rows, 2, dtype=torch.int64, device=words.device)
    most = _WORDS_CPU if words.device.type == "cpu" else _WORDS_ELSEWHERE
    step = min(max(64, most // max(rows, 1)), max(count, 1))
    products = sums.new_empty(
        rows, step
    )  # one for all steps: fresh memory costs more than the sums
    for start in range(0, count, step):
        part = words[:, start : start + step]
        product = products[:, : part.shape[1]]
        for half in (0, 1):  # int16 times int64 is int64, and wraps around
            torch.mul(part, weights[half, start : start + part.shape[1]], out=product)
            sums[:, half] += product.sum(1)
    return sums


def _words(tensor: Tensor, rows: int) -> Tensor:
    """Return the bytes of each row, in logical order, as words of 16 bits (8 where the number is odd)."""
    flat = tensor.resolve_conj().resolve_neg().contiguous()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    size = math.prod(flat.shape) // max(rows, 1)
    if not size:
        return torch.zeros(rows, 0, dtype=torch.int8, device=tensor.device)
    even = size * flat.element_size() % 2 == 0
    # a fresh tensor where the storage does not begin at an even byte: a view would not be allowed
    if flat.element_size() == 1 and flat.storage_offset() % 2:
        flat = flat.clone()
    return flat.reshape(rows, size).view(torch.int16 if even else torch.int8)


def _bucket(count: int) -> int:
    """Return the number of weights to make for `count` words: few sizes, so that they are kept."""
    return 1 << max(8, (count - 1).bit_length())


@functools.lru_cache(maxsize=32)
def _weights(position: int, count: int, device: str) -> Tensor:
    """Return the weights of the tensor at `position`, int64 of shape (2, count).

    They come from SHAKE-128 of the position: the same in every process, on every device and in every
    version of the libraries, and a longer row only adds some at the end.
    """
    halves = [
        np.frombuffer(hashlib.shake_128(f"{position} {half}".encode()).digest(8 * count), np.int64)
        for half in (0, 1)
    ]
    return torch.from_numpy(np.stack(halves)).to(device)


def _mix(keys: np.ndarray) -> np.ndarray:
    """Spread each half over all its bits, one to one (the finaliser of SplitMix64, Steele 2014)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
