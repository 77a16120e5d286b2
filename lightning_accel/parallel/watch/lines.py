"""Connections that carry one JSON object a line, never wait, and stay with the process that made them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

_LONGEST = 64 * 1024
"""Bytes of one message; whoever sends more is not of ours."""
_OPEN: WeakSet[Any] = WeakSet()


class Line:
    """One end of a connection.

    >>> one, other = (Line(end) for end in socket.socketpair())
    >>> one.send(beat="step 3")
    >>> other.read()
    [{'beat': 'step 3'}]
    >>> one.close(), other.close()
    (None, None)
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self._rest = b""
        _OPEN.add(self)

    def send(self, **message: Any) -> None:
        """Send a message; one that the other end has no room for, or is not there for, is lost."""
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the messages that have come.

        Raises:
            ConnectionError: There will be no more, or what came is none.
        """
        try:
            found = self.socket.recv(_LONGEST)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ConnectionError(str(error)) from None
        *whole, self._rest = (self._rest + found).split(b"\n")
        messages = [_message(text) for text in whole]
        if len(self._rest) > _LONGEST or (not found and not messages):
            raise ConnectionError("the other end has closed, or says too much")
        return messages

    def end(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of it."""
        _OPEN.discard(self)
        self.socket.close()


class Door:
    """Where others come in.

    Args:
        is_local: Whether all others are on this machine.
    """

    def __init__(self, *, is_local: bool) -> None:
        if is_local:
            self.socket = socket.create_server(("127.0.0.1", 0))
        elif socket.has_dualstack_ipv6():
            self.socket = socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        else:
            self.socket = socket.create_server(("", 0), backlog=1024)
        self.socket.setblocking(False)
        self.port = int(self.socket.getsockname()[1])
        _OPEN.add(self)

    def accept(self) -> Line | None:
        """Return who came in."""
        try:
            return Line(self.socket.accept()[0])
        except OSError:  # it went away again, or there is no room for more
            return None

    def close(self) -> None:
        """Let nobody in any more."""
        _OPEN.discard(self)
        self.socket.close()


def reach(addresses: Sequence[str], port: int, patience_s: float = 2.0) -> Line | None:
    """Return a connection to the first address that takes one, `None` if none does."""
    for address in addresses:
        try:
            return Line(socket.create_connection((address, port), patience_s))
        except OSError:
            continue
    return None


def addresses_towards(host: str) -> list[str]:
    """Return by which addresses others that reach a host may reach this machine.

    >>> addresses_towards("127.0.0.1")[0]
    '127.0.0.1'
    """
    found = []
    with contextlib.suppress(OSError):
        family, kind, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of datagrams: nothing is sent, the way is looked up
            found.append(str(probe.getsockname()[0]))
    return list(dict.fromkeys([*found, host, socket.gethostname()]))


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine only.

    >>> is_loopback("localhost"), is_loopback("10.0.0.1")
    (True, False)
    """
    return host in ("localhost", "::1") or host.startswith("127.")


def _message(text: bytes) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise ConnectionError("what came is no message")
    return message


def _let_go() -> None:
    """Close all in a child that was forked: while it held them, nobody could see the end of this process."""
    for held in list(_OPEN):
        held.socket.close()
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
