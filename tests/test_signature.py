"""Signed bundles: whose they are is told by the key, and by nothing that lies in the folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_accel import Deploy, deploy, load_bundle
from lightning_accel.errors import Unsupported
from lightning_accel.export.manifest import BadBundle


def written(folder: Path, name: str, key: Any) -> tuple[Path, Path]:
    """Return the files of a private key and of its public part."""
    secret, public = folder / f"{name}.pem", folder / f"{name}.pub"
    kinds = pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()
    secret.write_bytes(key.private_bytes(*kinds))
    known = key.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
    public.write_bytes(known)
    return secret, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        written(folder, name, ed25519.Ed25519PrivateKey.generate())
    written(folder, "rsa", rsa.generate_private_key(65537, 2048))
    return folder


@pytest.fixture(scope="module")
def signed(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("bundle") / "net"
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="no format is faster"):
        deploy(
            net,
            torch.randn(4, 6),
            to=to,
            formats="export",
            sign=keys / "mine.pem",
            budget_s=0.01,
            min_speedup=99,
        )
    return to


@pytest.mark.slow
def test_a_signed_bundle_opens_for_its_key_and_for_whoever_asks_no_key(
    signed: Path, keys: Path
) -> None:
    key = pem.load_pem_public_key((keys / "mine.pub").read_bytes())
    key.verify((signed / "manifest.sig").read_bytes(), (signed / "manifest.json").read_bytes())  # type: ignore[call-arg, union-attr]
    for given in (None, keys / "mine.pub", key):
        assert load_bundle(signed, verify=given).predict(torch.randn(2, 6)).shape == (2, 3)


def anothers_file(folder: Path) -> None:
    """Write another network with a right hash, as whoever may write to the folder can."""
    (folder / "model.pt2").write_bytes(b"code")
    about = json.loads((folder / "manifest.json").read_text())
    about["files"]["model.pt2"] = {"size": 4, "sha256": hashlib.sha256(b"code").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(about))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (lambda folder: None, "other.pub", "not that of the key"),
        (anothers_file, "mine.pub", "not that of the key"),
        (lambda folder: (folder / "manifest.sig").unlink(), "mine.pub", "is not signed"),
        (lambda folder: (folder / "manifest.sig").write_bytes(b"short"), "mine.pub", "5 bytes"),
        (lambda folder: (folder / "model.pt2").write_bytes(b""), "mine.pub", "another size"),
    ],
    ids=["another key", "another network", "no signature", "half a signature", "a damaged file"],
)
def test_what_is_not_signed_with_the_key_is_not_opened(
    signed: Path, keys: Path, tmp_path: Path, change: Any, key: str, words: str
) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    change(folder)
    with pytest.raises(BadBundle, match=words):
        load_bundle(folder, verify=keys / key)


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        ("mine.pub", ValueError, "`sign` is a private Ed25519 key"),
        ("rsa.pem", ValueError, "Found: RSAPrivateKey"),
        ("nowhere.pem", FileNotFoundError, "`sign` is the file of a key"),
        (3, TypeError, "`sign`"),
    ],
)
def test_a_wrong_key_is_refused_before_anything_is_built(
    keys: Path, tmp_path: Path, key: Any, error: Any, words: str
) -> None:
    given = keys / key if isinstance(key, str) else key
    with pytest.raises(error, match=words):
        deploy(nn.Linear(2, 2), torch.randn(2, 2), to=tmp_path / "a", sign=given)
    assert not (tmp_path / "a").exists()
    if isinstance(key, str):
        fit = Trainer(logger=False, callbacks=[Deploy(sign=given)])
        with pytest.raises(error, match=words):
            fit.callbacks[0].setup(fit, LightningModule(), "fit")  # type: ignore[attr-defined]


def test_the_extra_is_named_where_it_lacks(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(Unsupported, match=r"lightning-accel\[sign\]"):
        load_bundle(tmp_path, verify=keys / "mine.pub")
