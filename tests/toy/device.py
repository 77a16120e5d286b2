"""A device that torch did not know before: `toy`, two of them, in C++; and processes of it, which talk by gloo.

Memory is the host's and operators are the CPU's, so that results must be the CPU's to the last bit, while tensors of
the two cannot be mixed. It is the present process's only accelerator from then on: for processes of their own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("toy.cpp")


def build(folder: Path) -> Path:
    """Compile the device, once for each torch and source."""
    text = SOURCE.read_bytes() + torch.__version__.encode()
    path = folder / f"toy-{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}")
        command = ["g++", "-shared", "-fPIC", "-O0", "-std=c++20", "-w", str(SOURCE)]
        command += [f"-I{place}" for place in include_paths()]
        command += [f"-L{place}" for place in library_paths()]
        abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-ltorch_cpu", "-lc10", "-o", str(part)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        shutil.move(part, path)
    return path


def start(library: Path) -> None:
    """Make torch know the device, with the functions that such a device brings."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("toy")
    module: Any = ModuleType("torch.toy")
    module.device_count = lambda: 2
    module.is_available = lambda: True
    module.current_device = torch.accelerator.current_device_index
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module._is_in_bad_fork = lambda: False
    states = [torch.zeros(1), torch.zeros(1)]  # of generators, as the CPU's draw for it
    module.get_rng_state_all = lambda: [state.clone() for state in states]
    module.set_rng_state_all = lambda given: states.__setitem__(slice(None), given)
    module.get_rng_state = lambda device: states[torch.device(device).index].clone()
    module.set_rng_state = lambda state, device: states.__setitem__(
        torch.device(device).index, state
    )
    module.manual_seed_all = lambda seed: [state.fill_(seed) for state in states]
    module.manual_seed = lambda seed: states[torch.accelerator.current_device_index()].fill_(seed)
    module.device = lambda one: torch.accelerator.device_index(torch.device(one).index)
    torch._register_device_module("toy", module)
    torch.utils.generate_methods_for_privateuse1_backend()


class Wires(dist.ProcessGroup):
    """Collectives of toy tensors: by way of the host."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.gloo = gloo

    def getBackendName(self) -> str:
        return "wires"

    def _get_backend(self, device: Any) -> Any:
        return self.gloo

    def allreduce(self, tensors: Any, opts: Any = None, **_: Any) -> Any:
        opts = opts or dist.AllreduceOptions()
        return self._through(tensors, lambda hosts: self.gloo.allreduce(hosts, opts))

    def broadcast(self, tensors: Any, opts: Any = None, **_: Any) -> Any:
        opts = opts or dist.BroadcastOptions()
        return self._through(tensors, lambda hosts: self.gloo.broadcast(hosts, opts))

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, **_: Any) -> Any:
        hosts = [[t.cpu() for t in some] for some in outputs]
        self.gloo.allgather(hosts, [t.cpu() for t in inputs]).wait()
        for some, there in zip(outputs, hosts, strict=True):
            for out, host in zip(some, there, strict=True):
                out.copy_(host)
        return _Done(outputs)

    def barrier(self, opts: Any = None, **_: Any) -> Any:
        self.gloo.barrier().wait()
        return _Done([])

    def _through(self, tensors: Any, call: Any) -> Any:
        hosts = [t.cpu() for t in tensors]
        call(hosts).wait()
        for tensor, host in zip(tensors, hosts, strict=True):
            tensor.copy_(host)
        return _Done(tensors)


class _Done(dist._Work):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.future: Any = torch.futures.Future()
        self.future.set_result(value)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> Any:
        return self.future


def register_wires() -> None:
    """Tell torch that processes of this device talk by `wires`."""

    def make(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return Wires(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)

    dist.Backend.register_backend("wires", make, devices=["toy"])
