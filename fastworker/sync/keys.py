"""Signing keys of accounts: reading them from DID documents, and checking signatures. The only importer of the curves.

Both curves of the protocol, compressed keys as multikeys (`z...`), signatures as 64 bytes r and s over the SHA-256.
Of the two signatures that mathematics allows only the one with the low s is valid (atproto.com/specs/cryptography).
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from fastworker.errors import ConfigError

try:
    import coincurve
    from coincurve.ecdsa import cdata_to_der, deserialize_compact
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, utils
    from cryptography.hazmat.primitives.hashes import SHA256
except ImportError as error:
    raise ConfigError(
        "Checking signatures needs two more packages: `pip install 'coincurve>=21,<22' 'cryptography>=45,<51'`"
    ) from error

_K256: Final = b"\xe7\x01"
_P256: Final = b"\x80\x24"
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_ALPHABET: Final = {c: n for n, c in enumerate("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")}
_TEXT_MAX: Final = 64  # a multikey has 49 characters


class Key(Protocol):
    def is_signed(self, signature: bytes, message: bytes) -> bool:
        """Whether this key made the signature of the message."""


class _K256Key:
    __slots__ = ("_key",)

    def __init__(self, point: bytes) -> None:
        self._key = coincurve.PublicKey(point)

    def is_signed(self, signature: bytes, message: bytes) -> bool:
        if len(signature) != 64:
            return False
        try:
            return bool(self._key.verify(cdata_to_der(deserialize_compact(signature)), message))  # refuses a high s
        except ValueError:
            return False


class _P256Key:
    __slots__ = ("_key",)

    def __init__(self, point: bytes) -> None:
        self._key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)

    def is_signed(self, signature: bytes, message: bytes) -> bool:
        s = int.from_bytes(signature[32:], "big")
        if len(signature) != 64 or s > _P256_ORDER // 2:
            return False
        try:
            pair = utils.encode_dss_signature(int.from_bytes(signature[:32], "big"), s)
            self._key.verify(pair, message, ec.ECDSA(SHA256()))
        except (InvalidSignature, ValueError):
            return False
        return True


def key_of(multikey: str) -> Key:
    """Raises ValueError where the text is no multikey of the two curves."""
    raw = _base58(multikey[1:]) if multikey.startswith("z") and len(multikey) <= _TEXT_MAX else b""
    kind, point = raw[:2], raw[2:]
    if len(point) != 33 or point[0] not in (2, 3):
        raise ValueError("not a multikey of a compressed key")
    if kind == _K256:
        return _K256Key(point)
    if kind == _P256:
        return _P256Key(point)
    raise ValueError("a multikey of another curve")


def multikey_of(document: dict[str, Any]) -> str | None:
    """The multikey of an account's `#atproto` key, None where its DID document has none."""
    methods = document.get("verificationMethod")
    own = ("#atproto", f"{document.get('id')}#atproto")
    for method in methods if type(methods) is list else ():
        if type(method) is dict and method.get("id") in own and method.get("type") == "Multikey":
            text = method.get("publicKeyMultibase")
            return text if type(text) is str else None
    return None


def _base58(text: str) -> bytes:
    number = 0
    for character in text:
        digit = _ALPHABET.get(character)
        if digit is None:
            return b""
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8, "big")
