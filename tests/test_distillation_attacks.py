"""What strangers put into a cache, or in the place of one, and what a path of theirs leads to."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import stat
import struct
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_accel import Distillation, DistillationModule
from lightning_accel.distillation import Teacher, TeacherCache
from lightning_accel.seal import VARIABLE, secret

X = torch.arange(24.0).reshape(4, 6)
MARK = b"the victim's own"


def says(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return {"logits": args[0] * 2}


def opened(folder: Path, **options: Any) -> TeacherCache:
    cache = TeacherCache(folder, dtype="float32", check_every_n_calls=None, **options)
    cache.open("teacher")
    return cache


def filled(folder: Path) -> tuple[Path, Path]:
    """Return the folder of a teacher, and the rows of its answers."""
    cache = opened(folder)
    cache.look_up((X,), {}, says)
    cache.close()
    (rows,) = folder.rglob("*.sqlite")
    return rows.parent.parent, rows


def answers(folder: Path) -> tuple[bool, str]:
    """Tell whether a cache answers rightly, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = opened(folder)
        got = [cache.look_up((X,), {}, says)["logits"] for _ in range(2)]
        cache.close()
    return all(torch.equal(one, X * 2) for one in got), " ".join(str(c.message) for c in caught)


def forge(rows: Path) -> None:
    """Write another answer under each key, with the hash that somebody makes who does not have the key."""
    new = (X[0] * 0 - 1).numpy().tobytes()
    with closing(sqlite3.connect(rows)) as file, file:
        for slot, *key in file.execute("SELECT slot, first, second FROM answer").fetchall():
            made = hashlib.blake2b(struct.pack("<qq", *key) + new, digest_size=8).digest()
            file.execute("UPDATE answer SET value = ? WHERE slot = ?", (made + new, slot))


def test_forged_answers_are_misses(tmp_path: Path) -> None:
    _, rows = filled(tmp_path / "c")
    forge(rows)
    cache = opened(tmp_path / "c")
    assert torch.equal(cache.look_up((X,), {}, says)["logits"], X * 2) and cache.hits == 0
    assert torch.equal(cache.look_up((X,), {}, says)["logits"], X * 2) and cache.hits == 4


def test_answers_of_another_user_are_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "c")
    monkeypatch.setenv(VARIABLE, "another user's" * 3)
    cache = opened(tmp_path / "c")
    cache.look_up((X,), {}, says)
    assert cache.hits == 0


def test_an_answer_of_one_teacher_is_none_of_another(tmp_path: Path) -> None:
    home, rows = filled(tmp_path / "c")
    cache = opened(tmp_path / "c")
    cache.open("another teacher")
    cache.look_up((X,), {}, says)
    (other,) = [p for p in (tmp_path / "c").rglob("*.sqlite") if home not in p.parents]
    cache.close()
    rows.write_bytes(other.read_bytes())  # replayed
    cache = opened(tmp_path / "c")
    cache.look_up((X,), {}, says)
    assert cache.hits == 0


@pytest.mark.parametrize("what", ["rows", "teacher.json", "meta.json"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_a_cache_is_never_followed(tmp_path: Path, what: str, dangling: bool) -> None:
    home, rows = filled(tmp_path / "c")
    victim = tmp_path / "victim"
    path = {"rows": rows, "teacher.json": home / what}.get(what, rows.parent / what)
    victim.write_bytes(MARK if what != "rows" else rows.read_bytes())
    before = victim.read_bytes()
    path.unlink()
    path.symlink_to(victim)
    if dangling:
        victim.unlink()
    right, said = answers(tmp_path / "c")
    assert right and (not dangling or not victim.exists())
    assert dangling or victim.read_bytes() == before
    assert what != "rows" or ("a link" in said and "Do: delete it" in said)


@pytest.mark.parametrize("which", ["teacher", "layout"])
def test_a_link_in_the_place_of_a_folder_is_never_followed(tmp_path: Path, which: str) -> None:
    home, rows = filled(tmp_path / "c")
    folder = home if which == "teacher" else rows.parent
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "marker").write_bytes(MARK)
    folder.rename(tmp_path / "away")
    folder.symlink_to(victim)
    right, said = answers(tmp_path / "c")
    assert right and "a link" in said
    assert [p.name for p in victim.iterdir()] == ["marker"] and folder.is_symlink()


def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = filled(tmp_path / "c")
    before = rows.read_bytes()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)  # to whom nothing here belongs
    right, said = answers(tmp_path / "c")
    assert right and "another user's" in said and "Do: give the cache a folder of your own" in said
    assert rows.read_bytes() == before


def test_room_is_made_by_removing_ones_own_alone(tmp_path: Path) -> None:
    filled(tmp_path / "c")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "teacher.json").write_bytes(MARK)
    os.utime(kept / "teacher.json", (0, 0))
    (tmp_path / "c" / ("0" * 32)).symlink_to(kept)
    named = tmp_path / "c" / "pictures-of-my-children-at-sea-2"
    named.mkdir()
    (named / "teacher.json").write_bytes(MARK)
    os.utime(named / "teacher.json", (0, 0))
    cache = TeacherCache(tmp_path / "c", max_bytes=1)
    cache.open("another")
    assert (kept / "teacher.json").exists() and (named / "teacher.json").exists()


@pytest.mark.parametrize("row", [
    [["logits", [6], "load", "float32"]],
    [["logits", [2**40], "float32", "float32"]],
    [["logits", [-1], "float32", "float32"]],
    "logits",
])  # fmt: skip
def test_a_forged_layout_is_passed_over(tmp_path: Path, row: Any) -> None:
    home, _ = filled(tmp_path / "c")
    text = json.dumps({"row": row}, sort_keys=True).encode()
    folder = home / hashlib.blake2b(text, digest_size=16).hexdigest()
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({"row": row, "seal": "00" * 32}))
    cache = opened(tmp_path / "c")
    cache.look_up((X,), {}, says)
    assert cache.enabled and cache.hits == 4


def test_a_cache_is_for_its_user_alone(tmp_path: Path) -> None:
    home, _ = filled(tmp_path / "c")
    assert stat.S_IMODE(home.stat().st_mode) & 0o077 == 0


# --- the key ------------------------------------------------------------------------------------------


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "lightning_accel" / "key"


def test_a_key_is_made_once_and_read_by_its_user_alone(at_home: Path) -> None:
    assert secret() == secret() and len(secret()) == 32
    assert (
        stat.S_IMODE(at_home.stat().st_mode) == 0o600 and len(list(at_home.parent.iterdir())) == 1
    )


def test_a_key_that_others_know_is_not_used(at_home: Path, tmp_path: Path) -> None:
    secret()
    at_home.chmod(0o644)
    right, said = answers(tmp_path / "c")
    assert right and "others can read it" in said and "chmod 600" in said
    at_home.unlink()
    (tmp_path / "planted").write_bytes(b"k" * 32)
    at_home.symlink_to(tmp_path / "planted")
    right, said = answers(tmp_path / "c")
    assert right and "a link" in said and not (tmp_path / "c").exists()
    at_home.unlink()
    at_home.write_bytes(b"short")
    at_home.chmod(0o600)
    assert "5 bytes" in answers(tmp_path / "c")[1]


# --- addresses ----------------------------------------------------------------------------------------

ADDRESSES = (
    "https://example.com/teacher.ckpt?token=hunter2",
    "http:/example.com/teacher.ckpt",
    "s3://bucket/teacher.ckpt",
    "file:///etc/passwd",
    "hf://who/what",
    "simplecache::https://example.com/teacher.ckpt",
    "//host/share/teacher.ckpt",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_nothing_is_fetched_from_an_address(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "reached"
    monkeypatch.setattr(socket.socket, "connect", lambda *_: marker.write_bytes(MARK))
    net = nn.Linear(2, 2)
    for make in (
        lambda a: Teacher(a),
        lambda a: Teacher(Path(a)),
        lambda a: Teacher(net, checkpoint=a),
        lambda a: Distillation(a),
        lambda a: Distillation([net, a]),
        lambda a: Distillation(net, cache=a),
        lambda a: TeacherCache(a),
        lambda a: DistillationModule(net, a),
    ):
        with pytest.raises(
            ValueError, match=r"nothing is fetched.*Found: .*Do: download"
        ) as refusal:
            make(address)
        assert "hunter2" not in str(refusal.value)
    assert not marker.exists() and not list(tmp_path.iterdir())
