"""How a process ends whose main thread waits for another one that will never answer."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from lightning_accel.parallel.watch.processes import Member, look

_FOREIGN = (
    *{sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")},
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[2]),
    "<",
)
_EXIT_CODE = 1


def say(text: str) -> None:
    """Write to the error output past all buffers and locks, which a thread that hangs may hold."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def kill(member: Member) -> None:
    """Kill a process of this machine that is lost: it would hold its device for ever, and others wait for its answer."""
    sight = look(member)
    if sight is not None and not sight.is_gone and member.pid != os.getpid():
        with suppress(OSError):
            os.kill(member.pid, signal.SIGKILL)


def end(*, grace_s: float, is_running: Callable[[], bool]) -> None:
    """Let the main thread end what runs by an error of its own, and end the process if it does not.

    Args:
        grace_s: How long to wait for it.
        is_running: Whether the main thread is still within the run; what a script does after it is its own.
    """
    threading.Thread(target=_abort, daemon=True).start()
    threading.Thread(target=_end, args=(grace_s, is_running), daemon=True).start()


def _abort() -> None:
    """Let collectives that wait end with an error, where the backend can."""
    with suppress(RuntimeError, ValueError):
        if dist.is_initialized() and dist.get_backend() != dist.Backend.GLOO:
            dist.distributed_c10d._abort_process_group()


def _end(grace_s: float, is_running: Callable[[], bool]) -> None:
    deadline = time.monotonic() + grace_s
    while is_running():
        if time.monotonic() >= deadline:
            say(f"Process {os.getpid()} waited in {line_of_main_thread()}, and is ended.")
            os._exit(_EXIT_CODE)
        time.sleep(0.05)


def is_within(name: str) -> bool:
    """Whether the main thread is within a function of that name.

    >>> is_within("nowhere")
    False
    """
    return any(frame.f_code.co_name == name for frame in _frames_of_main_thread())


def line_of_main_thread() -> str:
    """Return where the main thread is, by the innermost line of the user's own code, or by the innermost of all."""
    frames = _frames_of_main_thread()
    own = [frame for frame in frames if not frame.f_code.co_filename.startswith(_FOREIGN)]
    for frame in own[:1] or frames[:1]:
        code = frame.f_code
        return f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
    return ""


def _frames_of_main_thread() -> list[FrameType]:
    """Return its frames, the innermost first."""
    found = []
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found
