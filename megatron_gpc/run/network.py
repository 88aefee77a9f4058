"""Ports, addresses, interfaces and adapters of this machine; batch scripts ask as well:

python -m megatron_gpc.run.network interface PEER
python -m megatron_gpc.run.network adapters
"""

from __future__ import annotations

import os
import random
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine's address `host` that nobody listens on at this moment.

    Not one of those that the kernel gives to outgoing connections (32,768 and above on Linux): a
    connection might have it before whoever it is for listens.  Nor one that a run's seed decides.
    """
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"{host}: none of 100 ports from 20,000 on can be listened on")


def own_address() -> str:
    """Where other hosts find this one: at the interface that GLOO_SOCKET_IFNAME names, as its ranks
    are, or else at what its name stands for."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    for address in psutil.net_if_addrs().get(interface, ()):
        if address.family == socket.AF_INET:
            return address.address
    return socket.gethostbyname(os.environ.get("SLURMD_NODENAME", socket.gethostname()))


def is_here(host: str) -> bool:
    """Whether a name or address is one of this host's: nobody can listen on others."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, UnicodeError), socket.create_server((host, 0), family=family):
            return host != ""
    return False


def interface_to(peer: str) -> tuple[str, str]:
    """(interface that leads to a host, this machine's address there).

    Asks the kernel for the route as `ip route get` does, by a datagram socket that sends nothing.

    Raises:
        OSError: there is no way, or the host's name has no address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        own = probe.getsockname()[0]
    found = psutil.net_if_addrs().items()
    return next((n for n, all_ in found if any(a.address == own for a in all_)), own), own


class AdapterPort(NamedTuple):
    """A port of an InfiniBand adapter."""

    adapter: str
    rate: str
    """Such as `200 Gb/sec (4X HDR)`."""
    active: bool


def infiniband(sysfs: Path = Path("/sys/class/infiniband")) -> list[AdapterPort]:
    """All ports of this machine's adapters."""
    return [
        AdapterPort(
            state.parents[2].name,
            (state.parent / "rate").read_text().strip(),
            "ACTIVE" in state.read_text(),
        )
        for state in sorted(sysfs.glob("*/ports/*/state"))
    ]


def main(asked: list[str]) -> None:
    if asked[0] == "interface":
        print(interface_to(asked[1])[0])
    else:
        print(",".join(dict.fromkeys(port.adapter for port in infiniband() if port.active)))


if __name__ == "__main__":
    main(sys.argv[1:])
