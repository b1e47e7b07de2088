"""Having the kernel hold, inside a sandbox's network, the first packet to what its policy does not list.

The gateway refuses within microseconds, and who tried has closed the socket before anybody reads of it. So
the sandbox's own network hands such a packet over before it leaves: the one who tried still has the socket,
and mostly waits for an answer. Somebody looks, and lets it go (attempts.py).

In nft syntax, of which the last two rules are there for both families:

    table inet egressd_attempts {
      set four { typeof ip daddr . @th,0,32; size 1024; flags dynamic,timeout; timeout 30s; }
      chain out {
        type filter hook output priority 0; policy accept;
        tcp flags & (fin|syn|rst|ack) != syn accept
        ip daddr { the synthetic pool, the resolver, networks of cidr rules } accept
        oifname "eth0" ip daddr . @th,0,32 != @four limit rate 20/second burst 20 packets
          add @four { ip daddr . @th,0,32 } queue num 53 bypass
      }
    }

What must not happen is that somebody waits because of this:

- `bypass`: without a reader the kernel holds nothing. NFQA_CFG_F_FAIL_OPEN: nor if the queue is full.
- The sets: what was held once (destination, and both ports) is not held again for 30 s.
- Faster than the limit, packets go on unseen; the gateway counts and logs them all the same.
- No connection tracking: the table of connections is one for the whole machine.

It is written as netlink messages, since `queue` of nft needs a module that the other spelling does not: the
target NFQUEUE of x_tables, which nf_tables runs as well (nft_compat). That is tried first: where nft_queue is
missing, it takes the kernel 13 ms to say so.

Nothing in here is a security property: without it the gateway refuses the same, and nobody says who tried.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network

__all__ = ["NUMBER", "batch", "open_sockets"]

NUMBER = 53  # of the queue, in the sandbox's own network
_TABLE, _CHAIN = "egressd_attempts", "out"
_DEVICE = b"eth0".ljust(16, b"\0")  # IFNAMSIZ
_RATE, _BURST = 20, 20  # packets a second that are held
_REMEMBERED, _FORGOTTEN = 1024, 30_000  # entries of a set; milliseconds
_HELD = 64  # packets at once
_COPIED = 128  # bytes of each: the headers

_NETLINK_SOCK_DIAG, _NETLINK_NETFILTER = 4, 12  # linux/netlink.h
_REQUEST, _ACK, _CREATE, _APPEND = 0x1, 0x4, 0x400, 0x800  # NLM_F_*
_ERROR, _BATCH_BEGIN, _BATCH_END = 2, 16, 17  # NLMSG_ERROR, NFNL_MSG_BATCH_*
_NFTABLES, _QUEUE_CONFIG = 10, 3 << 8 | 2  # NFNL_SUBSYS_NFTABLES; NFNL_SUBSYS_QUEUE, NFQNL_MSG_CONFIG
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE, _NEW_SET = 0, 3, 6, 9  # enum nf_tables_msg_types
_NFPROTO_INET, _NFPROTO_IPV4, _NFPROTO_IPV6 = 1, 2, 10
_OIFNAME, _NFPROTO, _L4PROTO = 7, 15, 16  # enum nft_meta_keys
_NETWORK, _TRANSPORT = 1, 2  # enum nft_payload_bases
_EQ, _NEQ = 0, 1
_REGISTER = 8  # NFT_REG32_00; those after it are four bytes each
_NESTED = 0x8000  # NLA_F_NESTED
_DADDR = {_NFPROTO_IPV4: (16, 4), _NFPROTO_IPV6: (24, 16)}  # offset and length
_SETS = {_NFPROTO_IPV4: ("four", 1), _NFPROTO_IPV6: ("six", 2)}  # name, and number within the batch


# --------------------------------------------------------------------------------------------------
# linux/netfilter/nf_tables.h, as far as it is needed


def _attribute(kind: int, *values: bytes) -> bytes:
    value = b"".join(values)
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _nested(kind: int, *values: bytes) -> bytes:
    return _attribute(kind | _NESTED, *values)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode(), b"\0")


def _u16(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("!H", value))


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("!I", value))


def _u64(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("!Q", value))


def _value(kind: int, value: bytes) -> bytes:
    return _nested(kind, _attribute(1, value))  # NFTA_DATA_VALUE


def _expression(name: str, *data: bytes) -> bytes:
    return _nested(1, _text(1, name), _nested(2, *data))


def _meta(key: int) -> bytes:
    return _expression("meta", _u32(1, _REGISTER), _u32(2, key))


def _payload(base: int, offset: int, length: int, *, register: int = _REGISTER) -> bytes:
    return _expression("payload", _u32(1, register), _u32(2, base), _u32(3, offset), _u32(4, length))


def _masked(mask: bytes) -> bytes:
    length, zero = _u32(3, len(mask)), _value(5, bytes(len(mask)))
    return _expression("bitwise", _u32(1, _REGISTER), _u32(2, _REGISTER), length, _value(4, mask), zero)


def _is(value: bytes, operator: int = _EQ) -> bytes:
    return _expression("cmp", _u32(1, _REGISTER), _u32(2, operator), _value(3, value))


_ACCEPT = _expression(
    "immediate", _u32(1, 0), _nested(2, _nested(2, _u32(1, 1)))
)  # NFT_REG_VERDICT, NF_ACCEPT
# struct xt_NFQ_info_v3: queue, how many, NFQ_FLAG_BYPASS; aligned to eight
_NFQUEUE = _expression(
    "target", _text(1, "NFQUEUE"), _u32(2, 3), _attribute(3, struct.pack("=HHHxx", NUMBER, 1, 1))
)
_QUEUE = _expression("queue", _u16(1, NUMBER), _u16(2, 1), _u16(3, 1))  # NFT_QUEUE_FLAG_BYPASS


# --------------------------------------------------------------------------------------------------
# the table


def _rule(*expressions: bytes) -> tuple[int, bytes]:
    return _NEW_RULE, _text(1, _TABLE) + _text(2, _CHAIN) + _nested(4, *expressions)


def _set(family: int) -> tuple[int, bytes]:
    name, number = _SETS[family]
    length = 4 * (-(-_DADDR[family][1] // 4) + 1)
    body = _text(1, _TABLE) + _text(2, name) + _u32(3, 0x30)  # NFT_SET_TIMEOUT, NFT_SET_EVAL
    body += _u32(4, 0) + _u32(5, length) + _nested(9, _u32(1, _REMEMBERED))
    return _NEW_SET, body + _u32(10, number) + _u64(11, _FORGOTTEN)


def _not_a_beginning() -> tuple[int, bytes]:
    """Of TCP only the first packet: byte 13 of its header, FIN, SYN, RST and ACK."""
    return _rule(
        _meta(_L4PROTO),
        _is(b"\x06"),
        _payload(_TRANSPORT, 13, 1),
        _masked(b"\x17"),
        _is(b"\x02", _NEQ),
        _ACCEPT,
    )


def _known(network: IPv4Network | IPv6Network) -> tuple[int, bytes]:
    family = _NFPROTO_IPV4 if network.version == 4 else _NFPROTO_IPV6
    offset, length = _DADDR[family]
    address, mask = network.network_address.packed, network.netmask.packed
    return _rule(
        *(_meta(_NFPROTO), _is(bytes([family]))),
        *(_payload(_NETWORK, offset, length), _masked(mask), _is(address)),
        _ACCEPT,
    )


def _hold(family: int, end: bytes) -> tuple[int, bytes]:
    offset, length = _DADDR[family]
    name, number = _SETS[family]
    return _rule(
        *(_meta(_NFPROTO), _is(bytes([family])), _meta(_OIFNAME), _is(_DEVICE)),
        _payload(_NETWORK, offset, length),
        _payload(_TRANSPORT, 0, 4, register=_REGISTER + length // 4),  # both ports
        _expression(
            "lookup", _text(1, name), _u32(2, _REGISTER), _u32(4, number), _u32(5, 1)
        ),  # if it is not in
        _expression("limit", _u64(1, _RATE), _u64(2, 1), _u32(3, _BURST), _u32(4, 0)),
        _expression(
            "dynset", _text(1, name), _u32(2, number), _u32(3, 0), _u32(4, _REGISTER), _u64(6, _FORGOTTEN)
        ),
        end,
    )


def batch(known: Iterable[IPv4Network | IPv6Network], *, native: bool = False) -> tuple[bytes, int]:
    """The whole table as one datagram, and how many acknowledgements come back."""
    end = _QUEUE if native else _NFQUEUE
    hook = _nested(4, _u32(1, 3), _u32(2, 0))  # NF_INET_LOCAL_OUT, after the translation of the loopback
    steps = [
        (_NEW_TABLE, _text(1, _TABLE)),
        (_NEW_CHAIN, _text(1, _TABLE) + _text(3, _CHAIN) + hook + _u32(5, 1) + _text(7, "filter")),
        *(_set(family) for family in _SETS),
        _not_a_beginning(),
        *(_known(network) for network in known),
        *(_hold(family, end) for family in _SETS),
    ]
    messages = [
        _message(_NFTABLES << 8 | kind, _NFPROTO_INET, body, number=number)
        for number, (kind, body) in enumerate(steps, 1)
    ]
    begin, finish = (_bare(kind) for kind in (_BATCH_BEGIN, _BATCH_END))
    return b"".join([begin, *messages, finish]), len(steps)


def _message(kind: int, family: int, body: bytes, *, number: int) -> bytes:
    """struct nlmsghdr, struct nfgenmsg, and the body."""
    flags = _REQUEST | _ACK | _CREATE | _APPEND
    return struct.pack("=IHHIIBBH", 20 + len(body), kind, flags, number, 0, family, 0, 0) + body


def _bare(kind: int) -> bytes:
    """The begin or the end of a batch: for which subsystem it is."""
    return struct.pack("=IHHII", 20, kind, _REQUEST, 0, 0) + struct.pack("!BBH", 0, 0, _NFTABLES)


# --------------------------------------------------------------------------------------------------
# inside the namespace


def open_sockets(known: Sequence[str]) -> tuple[int, int]:
    """The queue's descriptor, bound, with rules that lead to it, and one to ask about sockets. To be called
    inside the sandbox's network, with CAP_NET_ADMIN there. OSError if the kernel has no such thing."""
    networks = [ip_network(text) for text in known]
    queue = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
    with queue, asking:
        _exchange(queue, *_configuration())
        _lay(networks)
        asking.connect((0, 0))
        for each in (queue, asking):
            each.setblocking(False)
        return queue.detach(), asking.detach()


def _lay(networks: Sequence[IPv4Network | IPv6Network]) -> None:
    try:
        _say(*batch(networks))
    except FileNotFoundError:  # no such expression, or no such target
        _say(*batch(networks, native=True))


def _say(data: bytes, waiting: int) -> None:
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
    ) as netlink:
        _exchange(netlink, data, waiting)


def _configuration() -> tuple[bytes, int]:
    """Bind the queue; copy the headers; let go what does not fit; do not cut large packets up."""
    flags = 0x1 | 0x4  # NFQA_CFG_F_FAIL_OPEN, NFQA_CFG_F_GSO
    body = _attribute(1, struct.pack("!BxH", 1, 0))  # NFQNL_CFG_CMD_BIND
    body += _attribute(2, struct.pack("!IB", _COPIED, 2))  # NFQNL_COPY_PACKET
    body += _u32(3, _HELD) + _u32(4, flags) + _u32(5, flags)
    header = struct.pack("=IHHII", 20 + len(body), _QUEUE_CONFIG, _REQUEST | _ACK, 0, 0)
    return header + struct.pack("!BBH", 0, 0, NUMBER) + body, 1


def _exchange(netlink: socket.socket, data: bytes, waiting: int) -> None:
    """Send, and read as many acknowledgements. OSError for the first that is none."""
    netlink.settimeout(5)
    netlink.send(data)
    while waiting > 0:
        answer = netlink.recv(1 << 16)
        while len(answer) >= 20:
            length, kind = struct.unpack_from("=IH", answer)
            if kind == _ERROR:
                (code,) = struct.unpack_from("=i", answer, 16)
                if code:
                    raise OSError(-code, os.strerror(-code))
                waiting -= 1
            answer = answer[(length + 3) & ~3 :]
