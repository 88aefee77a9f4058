"""GPUs, network adapters, memory, limits, ports: what one node has."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron_gpc.doctor.finding import Finding
from megatron_gpc.doctor.memory import GIB
from megatron_gpc.run.network import infiniband, interface_to

FREE_SHARE = 0.95
"""Of a GPU's memory that must be free before a run."""
SMI_TIMEOUT_S = 30.0
SHM_GIB = 1.0
OPEN_FILES = 4096


def machine(peer: str, ports: Sequence[int]) -> list[Finding]:
    """Every finding about this node's hardware and limits.

    Args:
        peer: address of another node, or of this one.
        ports: that must be free here.
    """
    return [
        gpus(),
        interface(peer),
        _infiniband(),
        *(port_free(port) for port in ports),
        _memory(),
        _shared_memory(),
        _files(),
    ]


def gpus() -> Finding:
    """Number and free memory; what Slurm says it has given."""
    given = os.environ.get("SLURM_GPUS_ON_NODE")
    if shutil.which("nvidia-smi") is None:
        if given not in (None, "0"):
            advice = "the node's driver is broken, or a container hides it: tell the administrators"
            return Finding("GPUs", "problem", f"Slurm gave {given}, but no nvidia-smi", advice)
        return Finding("GPUs", "note", "none", "small models train on the CPU")
    query = "--query-gpu=index,name,memory.total,memory.used"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=SMI_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        advice = "the driver hangs: leave the node out and tell the administrators"
        return Finding("GPUs", "problem", f"nvidia-smi silent for {SMI_TIMEOUT_S:g} s", advice)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        return Finding("GPUs", "problem", said, "leave the node out and tell the administrators")
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        rows = [row for row in rows if row[0] in visible.split(",")] or rows
    used = [
        f"GPU {index}: {int(taken):,} of {int(total):,} MiB are in use"
        for index, _, total, taken in rows
        if int(taken) > (1 - FREE_SHARE) * int(total)
    ]
    if used:
        advice = "`nvidia-smi` names the processes; end what is yours, or leave the node out"
        return Finding("GPUs", "problem", "; ".join(used), advice)
    if given and given.isdecimal() and int(given) != len(rows):
        advice = "leave the node out and tell the administrators"
        return Finding("GPUs", "problem", f"Slurm gave {given}, {len(rows)} are seen", advice)
    said = f"{len(rows)} x {rows[0][1]}, {int(rows[0][2]) / 1024:.0f} GiB" if rows else "none"
    return Finding("GPUs", "ok", said, same=True)


def interface(peer: str) -> Finding:
    """Which interface leads to `peer`; the one that GLOO_SOCKET_IFNAME should name."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    addresses = psutil.net_if_addrs()
    if chosen is not None and chosen not in addresses:
        advice = f"one of: {', '.join(addresses)}"
        return Finding("interface", "problem", f"GLOO_SOCKET_IFNAME={chosen}: no such", advice)
    try:
        name, own = interface_to(peer)
    except OSError as error:
        advice = "see MASTER_ADDR, and the node's network"
        return Finding("interface", "problem", f"no way to {peer}: {error.strerror}", advice)
    if chosen not in (None, name):
        advice = f"export GLOO_SOCKET_IFNAME={name}, unless you mean it"
        return Finding("interface", "note", f"{chosen} is set, {name} leads to {peer}", advice)
    return Finding("interface", "ok", f"{name} ({own}) leads to {peer}")


def _infiniband() -> Finding:
    ports = infiniband()
    active = [f"{port.adapter} {port.rate}" for port in ports if port.active]
    down = [port.adapter for port in ports if not port.active]
    if down:
        found = f"not active: {', '.join(down)}; active: {', '.join(active) or 'none'}"
        return Finding("InfiniBand", "note", found, "if training should use them, tell the admins")
    if not active:
        return Finding("InfiniBand", "note", "none", "nodes talk over TCP: slow for large models")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY:
        advice = "ulimit -l unlimited: adapters need locked memory"
        return Finding("InfiniBand", "problem", f"locked memory: {limit / 2**20:.0f} MiB", advice)
    return Finding("InfiniBand", "ok", "; ".join(active), same=True)


def port_free(port: int) -> Finding:
    """Whether this node can listen on a port, and whether the kernel might give it away."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        advice = "`ss -ltnp` names who listens there; end it, or choose another port"
        return Finding(f"port {port}", "problem", f"{error.strerror}", advice)
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if port >= first:
        advice = f"choose one below {first}"
        return Finding(f"port {port}", "note", "free, but the kernel may give it away", advice)
    return Finding(f"port {port}", "ok", "free")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    said = f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB available"
    if memory.available < 0.5 * memory.total:
        advice = "something else holds half of it: ask for --exclusive --mem=0"
        return Finding("memory", "note", said, advice)
    return Finding("memory", "ok", said)


def _shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free / GIB
    if free < SHM_GIB:
        advice = "enlarge /dev/shm (of a container: --shm-size=16g); NCCL and SGLang need it"
        return Finding("/dev/shm", "problem", f"{free:.2f} GiB free", advice)
    return Finding("/dev/shm", "ok", f"{free:.0f} GiB free")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        advice = f"ulimit -n {hard if hard != resource.RLIM_INFINITY else 65536}"
        return Finding("open files", "problem", f"at most {soft}", advice)
    return Finding("open files", "ok", f"at most {soft}")
