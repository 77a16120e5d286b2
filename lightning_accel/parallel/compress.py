"""Gradients that travel in 16 bits, on any device and backend; torch's own hooks want CUDA and NCCL.

Half of the bytes. The mean is of the short format, like torch's `bf16_compress_hook`: bfloat16 keeps 8 bits of precision.
"""

# Annotations are no strings here: torch reads that of `bucket`.
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def compress(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over all processes in a short format: a communication hook for DDP.

    Args:
        dtype: The format, as the hook's state.
        bucket: Gradients of some weights, in one dimension.
    """
    full = bucket.buffer()
    short = full.to(dtype).div_(dist.get_world_size())
    work: Any = dist.all_reduce(short, async_op=True)

    def widened(_: Any) -> Tensor:
        return full.copy_(short)

    return work.get_future().then(widened)
