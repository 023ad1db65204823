"""Where a request to a host that the network named may go: only to public addresses, over https. Pure.

`refusal` judges a URL before it is asked, each redirect included; `is_public` judges each address that DNS gives for
its host. Connect to the addresses that were judged: a second look-up may give others.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from yarl import URL

from fastworker.event.syntax import is_handle

_RESERVED: Final = ("alt", "arpa", "example", "internal", "invalid", "local", "localhost", "onion")

_UNICAST: Final = IPv6Network("2000::/3")
"""All that is given out of IPv6."""
_CARRIERS: Final = (
    (IPv6Network("::/96"), 0),  # IPv4-compatible
    (IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (IPv6Network("::ffff:0:0:0/96"), 0),  # IPv4-translated (SIIT)
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (IPv6Network("2002::/16"), 80),  # 6to4
)
"""IPv6 networks whose addresses reach an IPv4 host, and how many bits follow its address."""
_NEVER: Final = (
    IPv6Network("64:ff9b:1::/48"),  # NAT64 of one site: the site alone knows where the IPv4 address is in it
    IPv6Network("2001::/23"),  # Teredo and other protocols' own
    IPv6Network("2001:db8::/32"),  # documentation
    IPv6Network("3fff::/20"),  # documentation
)
_ISATAP: Final = (0x0000_5EFE, 0x0200_5EFE)
_NEVER_4: Final = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"))  # protocols' own, relays of 6to4


def is_host(name: str) -> bool:
    """Whether a name may be asked: a handle's syntax, no address, no ending that is reserved."""
    return is_handle(name) and name.rpartition(".")[2].lower() not in _RESERVED


def is_public(address: str) -> bool:
    """Whether an IP address is one of the Internet's, and any IPv4 address inside it, too."""
    try:
        judged = ip_address(address)
    except ValueError:
        return False
    if isinstance(judged, IPv4Address):
        # mutant: private addresses are asked
        return _is_public_4(judged)
    inner = list(_inside(judged))
    if not all(_is_public_4(one) for one in inner):
        return False
    if judged in _UNICAST:
        return judged.scope_id is None and not any(judged in network for network in _NEVER)
    return bool(inner)


def refusal(url: URL) -> str | None:
    """Why this URL may not be asked, None when it may."""
    if url.scheme != "https":
        return f"{url.scheme or 'no scheme'} is not https"
    if url.raw_user is not None or url.raw_password is not None:
        return "it holds a user name"
    if url.port != 443:
        return f"port {url.port} is not 443"
    if not is_host(url.raw_host or ""):
        return f"{url.raw_host or 'nothing'} is not the name of a public host"
    return None


def _is_public_4(address: IPv4Address) -> bool:
    return address.is_global and not address.is_multicast and not any(address in network for network in _NEVER_4)


def _inside(address: IPv6Address) -> Iterator[IPv4Address]:
    for network, after in _CARRIERS:
        if address in network:
            yield IPv4Address(int(address) >> after & 0xFFFF_FFFF)
    if int(address) >> 32 & 0xFFFF_FFFF in _ISATAP:
        yield IPv4Address(int(address) & 0xFFFF_FFFF)
