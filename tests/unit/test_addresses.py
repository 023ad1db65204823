"""Where a request to a foreign host may go."""

from __future__ import annotations

import pytest
from yarl import URL

from fastworker.sync.addresses import is_host, is_public, refusal

PRIVATE_4 = ["127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1"]
PRIVATE_4 += ["255.255.255.255", "240.0.0.1", "192.0.0.1", "198.18.0.1", "203.0.113.1"]


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *PRIVATE_4,
        *["::", "::1", "fe80::1", "fe80::1%eth0", "2606:4700::1%eth0", "fc00::1", "fec0::1", "ff02::1", "ff0e::1"],
        *["2001:db8::1", "3fff::1", "2001::1", "100::1", "4000::1", "64:ff9b:2::1", "", "localhost", "127.1"],
    ],
)
def test_other_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("form", ["::{}", "::ffff:{}", "::ffff:0:{}", "64:ff9b::{}", "2002:{}::1", "2a00::5efe:{}"])
def test_an_ipv4_address_inside_is_judged(form: str) -> None:
    def inside(address: str) -> str:
        if not form.startswith("2002"):
            return form.format(address)
        a, b, c, d = map(int, address.split("."))
        return form.format(f"{a << 8 | b:x}:{c << 8 | d:x}")

    assert is_public(inside("8.8.8.8"))
    for address in PRIVATE_4:
        assert not is_public(inside(address)), address


@pytest.mark.parametrize(
    "address",
    [
        "64:ff9b:1::7f00:1",  # NAT64 of one site, /96
        "64:ff9b:1:7f00:0:100::",  # the same, /48
        "64:ff9b:1::808:808",
        "2001:0:7f00:1::f7f7:f7f7",  # Teredo, server 127.0.0.1
        "2001:0:808:808::80ff:fffe",  # Teredo, client 127.0.0.1
    ],
)
def test_what_only_a_site_can_read_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://pds.example.com/xrpc/x?y=z", None),
        ("https://PDS.example.com:443/", None),
        ("http://pds.example.com/", "not https"),
        ("ftp://pds.example.com/", "not https"),
        ("//pds.example.com/", "not https"),
        ("https://pds.example.com:8443/", "port"),
        ("https://u@pds.example.com/", "user"),
        ("https://u:p@pds.example.com/", "user"),
        ("https://:p@pds.example.com/", "user"),
        ("https://127.0.0.1/", "127.0.0.1"),
        ("https://127.1/", "127.1"),
        ("https://0x7f000001/", "0x7f000001"),
        ("https://2130706433/", "2130706433"),
        ("https://[::1]/", "::1"),
        ("https://[::ffff:7f00:1]/", "name"),
        ("https://redis/", "redis"),
        ("https://localhost/", "localhost"),
        ("https://a.localhost/", "localhost"),
        ("https://metadata.google.internal/", "internal"),
        ("https://pds.example.com./", "name"),
    ],
)
def test_which_urls_may_be_asked(url: str, why: str | None) -> None:
    found = refusal(URL(url))
    assert found is None if why is None else why in (found or "")


@pytest.mark.parametrize(
    ("name", "may"),
    [
        ("alice.test", True),
        ("xn--bcher-kva.example.com", True),
        ("127.0.0.1", False),
        ("localhost", False),
        ("a.localhost", False),
        ("a.LOCALHOST", False),
        ("a.internal", False),
        ("alice.test:80", False),
        ("alice.test/x", False),
        ("-a.test", False),
        ("a" * 250 + ".test", False),
    ],
)
def test_which_hosts_may_be_asked(name: str, may: bool) -> None:
    assert is_host(name) is may
