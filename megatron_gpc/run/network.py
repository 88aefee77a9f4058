"""Ports and addresses of this machine."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress

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
