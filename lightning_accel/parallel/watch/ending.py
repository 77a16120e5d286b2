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
_PAUSE_S = 0.5


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


def end(*, grace_s: float, run: str, why: str, left_s: Callable[[], float | None]) -> None:
    """Let the main thread end what runs by an error of its own, and end the process if it waits without hope.

    Args:
        grace_s: How long to wait for it.
        run: The function whose present call is meant; what a script does after it is its own, another call as well.
        why: What to say of it to those who still wait then.
        left_s: Seconds that it has once nobody will answer any more; `None` before that.
    """
    call = call_of(run)
    if call is not None:
        threading.Thread(target=_end, args=(grace_s, call, why, left_s), daemon=True).start()


def _abort() -> None:
    """Let collectives that wait end with an error, where the backend can."""
    with suppress(RuntimeError, ValueError):
        if dist.is_initialized() and dist.get_backend() != dist.Backend.GLOO:
            dist.distributed_c10d._abort_process_group()


def _end(grace_s: float, call: FrameType, why: str, left_s: Callable[[], float | None]) -> None:
    deadline = time.monotonic() + grace_s
    while (left := left_s()) is None:
        if returns(call, _PAUSE_S):  # this one may have failed as another did
            return
        if time.monotonic() >= deadline:
            break
    waits = f"Process {os.getpid()} waits in {line_of_main_thread()}"
    if left is None:
        say(f"{why}\n{waits} until that one ends.")
    threading.Thread(target=_abort, daemon=True).start()
    while left is None and (left := left_s()) is None:
        if returns(call, _PAUSE_S):
            return
    if not returns(call, left or 0.0):
        say(f"{why}\n{waits}, and is ended.")
        os._exit(_EXIT_CODE)


def call_of(name: str) -> FrameType | None:
    """Return the outermost call of a function in the main thread, `None` if there is none."""
    found = [frame for frame in _frames_of_main_thread() if frame.f_code.co_name == name]
    return found[-1] if found else None


def returns(call: FrameType, seconds: float) -> bool:
    """Whether the main thread comes back from a call within some time."""
    deadline = time.monotonic() + seconds
    while any(frame is call for frame in _frames_of_main_thread()):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


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
