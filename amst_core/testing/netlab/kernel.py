"""What a lab asks of the Linux kernel: network namespaces, TUN devices, addresses. No program is needed for it.

Everything works on the network namespace of the calling thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

TUN: Final = "/dev/net/tun"

_CLONE_NEWNET: Final = 0x40000000
_PR_SET_TIMERSLACK: Final = 29

# linux/if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_CSUM, _TSO4, _TSO6, _TSO_ECN, _USO4, _USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
_NLMSG_ERROR: Final = 2
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE, _NLM_F_EXCL = 0x1, 0x4, 0x400, 0x200
_RTM_NEWLINK, _RTM_NEWADDR = 16, 20
_IFLA_MTU, _IFLA_TXQLEN = 4, 13
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD: Final = 0x02
_IFF_UP, _IFF_MULTICAST = 0x1, 0x1000

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: int) -> None:
    if getattr(_libc, name)(*args):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def current_namespace() -> int:
    """A descriptor of the calling thread's network namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def new_namespace() -> None:
    """Move the calling thread into a network namespace of its own, which lives while somebody is in it or holds it."""
    _call("unshare", _CLONE_NEWNET)


def enter(namespace: int) -> None:
    """Move the calling thread into the network namespace of the descriptor."""
    _call("setns", namespace, _CLONE_NEWNET)


@contextlib.contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Have the calling thread be in that namespace during the block: sockets and processes made in it belong there."""
    before = current_namespace()
    try:
        enter(namespace)
        try:
            yield
        finally:
            enter(before)
    finally:
        os.close(before)


def exact_timers() -> None:
    """Have the calling thread's sleeps end within microseconds, not the usual 50 more."""
    _libc.prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)


def open_tun(name: str, *, offload: bool) -> int:
    """A new TUN device of that name, not persistent, whose packets carry a virtio_net_hdr of 10 bytes.

    With ``offload`` the kernel hands over TCP and UDP super-packets up to 64 KiB and leaves checksums to be
    completed; without it, single packets with all their checksums. The descriptor does not block.
    """
    fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
        tso = _CSUM | _TSO4 | _TSO6 | _TSO_ECN
        wanted = (tso | _USO4 | _USO6, tso) if offload else (0,)  # USO came with Linux 6.2
        for attempt in wanted:
            try:
                fcntl.ioctl(fd, _TUNSETOFFLOAD, attempt)
                break
            except OSError:
                if attempt == wanted[-1]:
                    raise
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_sysctl(name: str, value: str) -> None:
    """Write one, in dots (``net.ipv4.tcp_rmem``)."""
    with open(f"/proc/sys/{name.replace('.', '/')}", "w") as file:
        file.write(value)


def get_sysctl(name: str) -> str:
    """Read one, its fields separated by single blanks."""
    with open(f"/proc/sys/{name.replace('.', '/')}") as file:
        return " ".join(file.read().split())


def set_up(name: str, *, mtu: int | None = None, queue: int | None = None) -> None:
    """Bring a device up, as one that does no multicast; ``queue``: packets that may wait for its reader."""
    flags = _IFF_UP
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(name), flags, _IFF_UP | _IFF_MULTICAST)
    if mtu is not None:
        body += _attribute(_IFLA_MTU, struct.pack("=I", mtu))
    if queue is not None:
        body += _attribute(_IFLA_TXQLEN, struct.pack("=I", queue))
    _request(_RTM_NEWLINK, 0, body)


def add_address(name: str, interface: str) -> None:
    """Give a device an address and the route to its network (``10.99.0.1/24``)."""
    address = ipaddress.ip_interface(interface)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    index = socket.if_nametoindex(name)
    body = struct.pack("=BBBBI", family, address.network.prefixlen, _IFA_F_NODAD, 0, index)
    body += _attribute(_IFA_LOCAL, address.packed) + _attribute(_IFA_ADDRESS, address.packed)
    _request(_RTM_NEWADDR, _NLM_F_CREATE | _NLM_F_EXCL, body)


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _request(kind: int, flags: int, body: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        header = struct.pack("=IHHII", 16 + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK | flags, 1, 0)
        netlink.send(header + body)
        answer = netlink.recv(65536)
    _, got, _, _, _, error = struct.unpack_from("=IHHIIi", answer)
    if got != _NLMSG_ERROR or error:
        raise OSError(-error, f"netlink request {kind}: {os.strerror(-error)}")


def processes_in(namespaces: list[int]) -> list[int]:
    """Ids of the processes that are in one of these namespaces (descriptors)."""
    wanted = {(about.st_dev, about.st_ino) for about in map(os.fstat, namespaces)}
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                about = os.stat(f"/proc/{entry}/ns/net")
                if (about.st_dev, about.st_ino) in wanted:
                    found.append(int(entry))
    return found
