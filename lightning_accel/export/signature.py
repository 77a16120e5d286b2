"""Whose a bundle is: the manifest signed with Ed25519, which binds all files by the hashes that it holds.

The signature lies beside the manifest, 64 bytes of its own, and is checked on the very bytes that are then read. Keys
are PEM files, as `openssl genpkey -algorithm ed25519` makes them, or objects of the package `cryptography`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_accel.arguments import path as as_path
from lightning_accel.errors import Unsupported, explain

NAME = "manifest.sig"
LENGTH = 64


def private_key(sign: Any) -> Any:
    """Return the key to sign with.

    Raises:
        Unsupported: `cryptography` is not installed.
        ValueError: The file holds no such key.
        TypeError: It is neither a path nor a key.
        FileNotFoundError: There is no such file.
    """
    return _key("sign", sign, private=True)


def public_key(verify: Any) -> Any:
    """Return the key to verify with; raises as `private_key` does."""
    return _key("verify", verify, private=False)


def write(folder: Path, name: str, key: Any) -> None:
    """Sign a file of a folder."""
    (folder / NAME).write_bytes(key.sign((folder / name).read_bytes()))


def why_not(signed: bytes, signature: bytes, key: Any) -> str:
    """Return why a signature is not that of a key, or nothing."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return "it is signed with another key, or was changed after it was signed"
    return ""


def _key(name: str, given: Any, *, private: bool) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        do = "pip install 'lightning-accel[sign]'"
        raise Unsupported("signatures need the package `cryptography`", "none", do) from None
    kind: Any = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    if isinstance(given, kind):
        return given
    path = as_path(name, given)
    if not path.is_file():
        do = "pass the path of a PEM file"
        raise FileNotFoundError(explain(f"`{name}` is the file of a key", str(path), do))
    word = "private" if private else "public"
    try:
        text = path.read_bytes()
        found = (
            serialization.load_pem_private_key(text, password=None)
            if private
            else serialization.load_pem_public_key(text)
        )
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(name, word, str(error).splitlines()[0][:100]) from None
    if not isinstance(found, kind):
        raise _no_key(name, word, type(found).__name__)
    return found


def _no_key(name: str, word: str, found: str) -> ValueError:
    do = "make one by `openssl genpkey -algorithm ed25519 -out key.pem`"
    do += "" if word == "private" else ", and its public part by `openssl pkey -in key.pem -pubout`"
    return ValueError(explain(f"`{name}` is a {word} Ed25519 key in PEM, not encrypted", found, do))
