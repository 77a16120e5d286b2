"""Tensor parallelism of networks that know nothing of it, from what the pruner's trace knows of their widths.

A process computes with the network pruned to its own units (channels, heads, groups of queries), and the outputs of the
layers that read them are summed: the column and row pairs of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053), found
in the network in place of being written down for it.
"""

from lightning_accel.parallel.tensor.plan import SplitGroup, TensorPlan, plan_tensor
from lightning_accel.parallel.tensor.split import SplitModel

__all__ = ["SplitGroup", "SplitModel", "TensorPlan", "plan_tensor"]
