"""A star of connections in which each process gives signs of life, and the end of one is told to all.

Rank 0 holds the star. Every process has a thread of its own for it: a rank that compiles, validates, reads data or
stands in a debugger gives signs as before, and its steps are not touched. What the thread cannot say, since code of C
keeps Python from running, its machine tells: another rank there looks at `/proc`. A process that was killed closes its
connection, so that this is known at once, on any machine; one that is stopped says nothing, and is lost after the timeout.

The store of the default group (`TCPStore`) tells where rank 0 listens. It could carry the signs too, but a client of it
waits without end for a server that is stopped, and mostly rank 0 is the server.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning_accel.errors import explain
from lightning_accel.parallel.watch.lines import (
    Door,
    Line,
    addresses_towards,
    is_loopback,
    reach,
)
from lightning_accel.parallel.watch.processes import Member, Sight, look, member_of
from lightning_accel.parallel.watch.verdict import Lost, Silence, judge

_MOST_INTERVAL_S = 5.0
_SHARE_OF_TIMEOUT = 1 / 12
_RETURN_S = 5.0
"""For how long a process whose connection broke may come back."""
_FAREWELL_S = 1.0
_NAME = "lightning-accel-rank-watch"
_log = logging.getLogger("lightning_accel")
_ENDED = explain(
    "processes are not watched any more",
    "%s: %s",
    "nothing, if the run goes on; a process that stops is then seen after the timeout of the strategy",
)


class Peer:
    """Another process, as this one knows it."""

    def __init__(self, member: Member, line: Line, interval_s: float) -> None:
        self.member = member
        self.line: Line | None = line
        self.where = ""
        self.has_left = False
        self.silence = Silence(2 * interval_s)
        self.away = Silence(2 * interval_s)


class Watch:
    """Gives signs of life of this process, and tells of the first of the others that is lost.

    Args:
        store: Of the group, under a prefix that no other watch uses.
        me: This process.
        count: Processes of the group.
        timeout_s: For how long one may say nothing.
        where: Says where this process is.
        on_lost: Called once, from the thread of the watch.
        master: The address of the group's store.
    """

    def __init__(
        self,
        store: Any,
        me: Member,
        count: int,
        *,
        timeout_s: float,
        where: Callable[[], str],
        on_lost: Callable[[Lost], None],
        master: str = "127.0.0.1",
    ) -> None:
        self.me, self.count, self.timeout_s = me, count, timeout_s
        self.interval_s = min(_MOST_INTERVAL_S, timeout_s * _SHARE_OF_TIMEOUT)
        self.peers: dict[int, Peer] = {}
        self.lost: Lost | None = None
        self._store, self._master = store, master
        self._where, self._on_lost = where, on_lost
        self._token = ""
        self._pause_s = 0.005
        self._door: Door | None = None
        self._neighbour: Member | None = None
        self._told: dict[int, Sight] = {}
        self._farewell: dict[str, str] | None = None
        self._knows = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name=_NAME, daemon=True)

    def start(self) -> None:
        """Begin; others are met as they come."""
        self._thread.start()

    def leave(self, why: str = "", *, may_follow: bool = False) -> None:
        """Take leave of the others, so that nobody misses this process.

        Args:
            why: The error with which it leaves, if it does.
            may_follow: Whether that error is of something that all are about to see, and so no news.
        """
        self._farewell = {"bye": "" if may_follow else why}
        with contextlib.suppress(OSError):  # the thread has ended
            self._wake.send(b".")
        if threading.current_thread() is not self._thread:
            self._thread.join(3 * _FAREWELL_S)

    def wait(self, seconds: float) -> Lost | None:
        """Return who was lost, as soon as that is known."""
        self._knows.wait(seconds)
        return self.lost

    # ---- the thread

    def _run(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        if self.me.rank == 0:
            self._open()
        before = time.monotonic()
        try:
            while self._farewell is None:
                self._answer(self._patience(before))
                now = time.monotonic()
                hurries = any(peer.line is None for peer in self._present())
                if hurries or now - before >= self.interval_s or not self.peers:
                    self._round(now - before)
                    before = now
        except (
            Exception
        ) as error:  # of this thread alone, which must not look like the end of the process
            _log.warning(_ENDED, type(error).__name__, error)
        finally:
            self._part()
            self._close()

    def _patience(self, before: float) -> float:
        if not self.peers:  # most come within a moment, and may be lost in the next
            self._pause_s = min(1.5 * self._pause_s, 1.0, self.interval_s)
            return self._pause_s
        if any(peer.line is None for peer in self._present()):
            return min(0.1, self.interval_s)
        return max(0.0, self.interval_s - (time.monotonic() - before))

    def _present(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if not peer.has_left]

    def _open(self) -> None:
        """Tell where this process listens."""
        is_local = is_loopback(self._master)
        self._door = Door(is_local=is_local)
        self._token = secrets.token_hex(16)
        addresses = ["127.0.0.1"] if is_local else addresses_towards(self._master)
        place = {"addresses": addresses, "port": self._door.port, "token": self._token}
        self._store.set("leader", json.dumps(place))
        self._selector.register(self._door.socket, selectors.EVENT_READ, self._door)

    def _reach(self) -> None:
        """Look for rank 0, which may not be there yet."""
        place = None
        with contextlib.suppress(RuntimeError):  # the store may be gone with its process
            if self._store.check(["leader"]):
                place = json.loads(self._store.get("leader"))
        if place is None:
            return
        line = reach(place["addresses"], place["port"])
        if line is None:
            return
        line.send(hello=place["token"], me=self.me._asdict())
        self._selector.register(line.socket, selectors.EVENT_READ, line)

    def _answer(self, seconds: float) -> None:
        """Take in what comes within some time."""
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, Door):
                if (line := key.data.accept()) is not None:
                    self._selector.register(line.socket, selectors.EVENT_READ, line)
            elif isinstance(key.data, Line):
                self._read(key.data)

    def _read(self, line: Line) -> None:
        try:
            for message in line.read():
                self._take(line, message)
        except (ConnectionError, ValueError, KeyError, TypeError):
            self._drop(line)

    def _drop(self, line: Line) -> None:
        if line.socket.fileno() >= 0:
            self._selector.unregister(line.socket)
        line.close()
        for peer in self.peers.values():
            if peer.line is line:
                peer.line = None

    def _take(self, line: Line, message: dict[str, Any]) -> None:
        """Act on a message; whoever has not greeted is not heard."""
        if "hello" in message:
            self._greet(line, message)
            return
        peer = next((peer for peer in self.peers.values() if peer.line is line), None)
        if peer is None:
            raise ConnectionError("a stranger")
        peer.silence.hear()
        if "beat" in message:
            peer.where = str(message["beat"])[:500]
            if saw := message.get("saw"):
                self._told[int(saw[0])] = Sight(str(saw[1]), float(saw[2]))
        if "look" in message:
            self._neighbour = member_of(message["look"])
        if "lost" in message:
            found = message["lost"]
            self._tell(Lost(**{**found, "member": member_of(found["member"])}))
        if "bye" in message:
            peer.has_left = True
            self._drop(line)
            if why := str(message["bye"])[:500]:
                self._tell(Lost(peer.member, f"left with {why}", peer.where, is_over=False))

    def _greet(self, line: Line, message: dict[str, Any]) -> None:
        """Meet a process that gives the token, or rank 0 that answers to one."""
        member = member_of(message["me"])
        if self.me.rank == 0:
            if not secrets.compare_digest(str(message["hello"]), self._token):
                raise ConnectionError("a stranger")
            line.send(hello="", me=self.me._asdict())
        elif member.rank != 0:
            raise ConnectionError("a stranger")
        self.peers[member.rank] = Peer(member, line, self.interval_s)
        line.send(beat=self._where())
        if self.lost is not None and self.me.rank == 0:
            line.send(lost=self.lost._replace(member=self.lost.member._asdict())._asdict())  # type: ignore[arg-type]
        self._give_neighbours(member)

    def _give_neighbours(self, member: Member) -> None:
        """Let each of another machine look at the next one there: what rank 0 cannot see from here."""
        if self.me.rank != 0 or member.machine == self.me.machine or not member.machine:
            return
        there = [p for p in self._present() if p.member.machine == member.machine]
        there.sort(key=lambda peer: peer.member.rank)
        for peer, other in zip(there, there[1:] + there[:1], strict=True):
            if peer.line is not None and peer is not other:
                peer.line.send(look=other.member._asdict())

    def _round(self, seconds: float) -> None:
        """Give a sign of life, and look at all that are silent."""
        if self.me.rank != 0 and (0 not in self.peers or self.peers[0].line is None):
            self._reach()
        sight = look(self._neighbour) if self._neighbour is not None else None
        saw = [] if sight is None or self._neighbour is None else [self._neighbour.rank, *sight]
        where = self._where()
        for peer in self._present():
            if peer.line is not None:
                peer.line.send(beat=where, saw=saw)
            self._judge(peer, seconds)

    def _judge(self, peer: Peer, seconds: float) -> None:
        sight = look(peer.member) or self._told.get(peer.member.rank)
        peer.silence.grow(seconds, sight)
        how = judge(peer.silence, self.timeout_s)
        if peer.line is not None:
            peer.away.hear()
        else:
            peer.away.grow(seconds, sight)
            if not how and sight is None and peer.away.seconds > min(_RETURN_S, self.timeout_s / 2):
                how = "is gone: its connection closed, and it did not come back"
        if how:
            self._tell(Lost(peer.member, how, peer.where, peer.silence.seconds))

    def _tell(self, lost: Lost) -> None:
        """Tell all of the first that is lost; an end is told even after an error of somebody."""
        if self.lost is not None and (self.lost.is_over or not lost.is_over):
            return
        self.lost = lost
        plain = {**lost._asdict(), "member": lost.member._asdict()}
        for peer in self._present():
            if self.me.rank == 0 and peer.line is not None:
                peer.line.send(lost=plain)
        self._knows.set()
        self._on_lost(lost)

    def _part(self) -> None:
        """Say farewell, and let it be read before the connections close."""
        lines = [peer.line for peer in self._present() if peer.line is not None]
        for line in lines:
            line.send(**(self._farewell or {}))
            line.end()
        end = time.monotonic() + _FAREWELL_S
        while time.monotonic() < end and any(line.socket.fileno() >= 0 for line in lines):
            self._answer(0.05)

    def _close(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, (Line, Door)):
                key.data.close()
        self._selector.close()
        self._wake.close()
        self._woken.close()


def master_address() -> str:
    """Return the address of the group's store, as its processes were told it."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")
