"""For all tests: nothing leaves the machine."""

from __future__ import annotations

import errno
import sys
from typing import Any

LOOPBACK = ("127.", "::1", "localhost")


def _no_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse connections, datagrams and look-ups of names, unless they stay on this machine (files as sockets, loopback)."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if isinstance(host, str | bytes) and host and not str(host).startswith(LOOPBACK):
        raise OSError(errno.ENETUNREACH, f"a test wanted to reach {host!r}: tests run without a network")


sys.addaudithook(_no_network)
