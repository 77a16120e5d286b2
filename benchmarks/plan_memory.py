"""What `lightning-accel plan --devices` says a device needs, beside what a CPU allocator gave: on one process and two.

    python benchmarks/plan_memory.py [--llama]

Both run the same step (AdamW, third step). The allocator's numbers are those of the profiler's memory events, scratch of
kernels included, which no plan sees. Two processes talk over gloo; the larger of the two counts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from lightning_accel.parallel.planning import Option, Workload, estimate
from lightning_accel.parallel.sharding import shard
from lightning_accel.parallel.units import find_units


def loss(model: Any, batch: Any) -> Any:
    logits, targets = model(batch[0]), batch[1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def gpt() -> tuple[Callable[[], Any], Callable[[], Any]]:
    from models.gpt import GPT

    tokens = lambda: torch.randint(0, 512, (8, 128))  # noqa: E731
    make = lambda: GPT(vocabulary=512, context=128, dim=128, depth=4, num_heads=4)  # noqa: E731
    return make, lambda: (tokens(), tokens())


def vit() -> tuple[Callable[[], Any], Callable[[], Any]]:
    from models.vit import ViT

    return lambda: ViT(dim=128, depth=4), lambda: (
        torch.randn(64, 1, 8, 8),
        torch.randint(0, 10, (64,)),
    )


def resnet() -> tuple[Callable[[], Any], Callable[[], Any]]:
    from models.resnet import ResNet

    return ResNet, lambda: (torch.randn(32, 1, 32, 32), torch.randint(0, 10, (32,)))


NETS = {"GPT": gpt, "ViT": vit, "ResNet": resnet}


def work(name: str) -> Workload:
    make, batch = NETS[name]()
    return Workload(make, batch, loss, lambda m: torch.optim.AdamW(m.parameters(), foreach=False))


def planned(name: str, count: int) -> int:
    option = Option("fsdp", count) if count > 1 else Option("single")
    peak = estimate(work(name), option).peak
    assert peak is not None
    return peak


def measured(name: str, rank: int, count: int, port: int, results: Any) -> None:
    """Put the largest number of allocated bytes in the third step."""
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.set_num_threads(1)
    if count > 1:
        os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=count)
    one = work(name)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = one.make()
        if count > 1:
            mesh = dist.device_mesh.init_device_mesh("cpu", (count,))
            shard(model, find_units(model).names, mesh)
        batch, optimizer = one.batch(), one.optimizer(model)
        for index in range(3):
            with record_function(f"step {index}"):
                optimizer.zero_grad()
                one.step(model, batch).backward()
                optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    begins = next(e["ts"] for e in events if e.get("name") == "step 2")
    seen = [e for e in events if e.get("name") == "[memory]" and e["ts"] >= begins]
    results.put(max(e["args"]["Total Allocated"] for e in seen))
    if count > 1:
        dist.destroy_process_group()


def run(name: str, count: int) -> int:
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.Queue()
    given = [(name, rank, count, port, results) for rank in range(count)]
    processes = [context.Process(target=measured, args=arguments) for arguments in given]
    for process in processes:
        process.start()
    found = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    return max(found)


def llama() -> None:
    """Plan Llama-70B for 256 devices of 80 GiB, from its configuration; needs transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    one = Workload(
        lambda: LlamaForCausalLM(config),
        lambda: torch.zeros(1, 4096, dtype=torch.int64),
        lambda model, tokens: model(tokens).logits.float().mean(),
        lambda model: torch.optim.AdamW(model.parameters(), foreach=False),
        torch.bfloat16,
    )
    start = time.perf_counter()
    for option in (Option("fsdp", 256), Option("fsdp", 256, checkpointing=True)):
        peak = estimate(one, option, limit=72 * 2**30).peak
        print(f"{option.name}: {'too large' if peak is None else f'{peak / 2**30:.2f} GiB'}")
    print(f"Llama-70B on 256 devices: planned in {time.perf_counter() - start:.0f} s")


def main() -> None:
    if "--llama" in sys.argv[1:]:
        return llama()
    for name in NETS:
        for count in (1, 2):
            real, plan = run(name, count), planned(name, count)
            print(
                f"{name}, {count} process(es): measured {real / 2**20:.2f} MiB, planned {plan / 2**20:.2f}, {plan / real - 1:+.1%}"
            )


if __name__ == "__main__":
    main()
