"""Where processes meet that train together, on whatever machines of a cluster they were placed."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from tandem.cluster.library import ray

Address = tuple[str, int]
_PATIENCE = timedelta(minutes=30)
_ASK_FOR_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def open_store() -> tuple[dist.Store, Address]:
    """A store at which others meet this process, and where it is: a free port of the address by which the cluster knows
    this machine, and of no other."""
    host = ray().util.get_node_ip_address()
    listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listening.getsockname()[1]
    # Without a listening socket that it is given, or with libuv, torch's store listens on every address.
    store = dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_PATIENCE,
        master_listen_fd=listening.detach(),
        use_libuv=False,
    )
    return store, (host, port)


def store_at(address: Address) -> dist.Store:
    """The store that another process has opened there."""
    host, port = address
    return dist.TCPStore(host, port, is_master=False, timeout=_PATIENCE)


def keep_to_the_cluster() -> None:
    """Let torch's processes talk by the network interface by which the cluster knows this machine, unless the
    environment names another."""
    name = interface_of(ray().util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IPv4 address; None where the system does not say."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(asked.fileno(), _ASK_FOR_ADDRESS, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
