"""Signing keys of simulated accounts, on both curves, made from a seed. Needs the extra `verify`."""

from __future__ import annotations

import hashlib
from typing import Literal

import coincurve
from coincurve.ecdsa import der_to_cdata, serialize_compact
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

Curve = Literal["k256", "p256"]
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class SigningKey:
    """The same seed gives the same key, and the same key and message the same signature."""

    def __init__(self, seed: str, curve: Curve = "k256") -> None:
        self.curve: Curve = curve
        secret = int.from_bytes(hashlib.sha256(f"key {seed}".encode()).digest(), "big") >> 1 | 1
        self._k256 = coincurve.PrivateKey(secret.to_bytes(32, "big"))
        self._p256 = ec.derive_private_key(secret, ec.SECP256R1())

    def sign(self, message: bytes, *, high_s: bool = False) -> bytes:
        """64 bytes, with the low s; `high_s` (p256 only) gives the other one, which the protocol forbids."""
        if self.curve == "k256":
            return bytes(serialize_compact(der_to_cdata(self._k256.sign(message))))
        r, s = utils.decode_dss_signature(self._p256.sign(message, ec.ECDSA(SHA256(), deterministic_signing=True)))
        if (s > _P256_ORDER // 2) is not high_s:
            s = _P256_ORDER - s
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    @property
    def multikey(self) -> str:
        if self.curve == "k256":
            return _multibase(b"\xe7\x01" + self._k256.public_key.format(compressed=True))
        point = self._p256.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        return _multibase(b"\x80\x24" + point)


def _multibase(raw: bytes) -> str:
    number = int.from_bytes(raw, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _ALPHABET[digit] + digits
    return "z" + digits
