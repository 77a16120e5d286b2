"""Packed compile caches: what goes in comes out, and what is damaged or foreign is a miss."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_accel.compilation import WarmStart, pack, unpack
from lightning_accel.compilation.callbacks import warm_start as adapter
from lightning_accel.compilation.warm import cache
from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.seal import seal

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:The `train_dataloader` does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]

FILES = {
    "ab/cabc.py": b"x = 1",
    "ab/cabc.main.so": b"\x7fELF" + bytes(range(256)) * 40,
    "fxgraph/de/fdef/ghi": b"graph",
    "aotautograd/ajk/lmn": b"",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "cache", FILES)
    return tmp_path


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def read(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def rewrite(path: Path, change: Any) -> None:
    """Change the list of files of a packed cache as its owner could, and leave the rest as it is."""
    with zipfile.ZipFile(path) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(inside["manifest.json"])
    change(manifest, inside)
    inside["manifest.json"] = json.dumps(manifest).encode()
    inside["seal.txt"] = seal(inside["manifest.json"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in inside.items():
            archive.writestr(name, content)


# --- the file -----------------------------------------------------------------------------------


def test_what_goes_in_comes_out_and_nothing_else(folder: Path) -> None:
    extra = {"locks/a.lock": b"", "ab/part.tmp": b"", "pre/x.gch": b"big", ".hidden/x.py": b""}
    write(folder / "cache", extra)
    (folder / "cache/ab/link.py").symlink_to("/etc/passwd")
    packed = pack(folder / "deep/compiled.zip", folder / "cache")
    assert packed.num_files == len(FILES)
    assert packed.num_bytes == (folder / "deep/compiled.zip").stat().st_size
    assert unpack(folder / "deep/compiled.zip", folder / "new").num_files == len(FILES)
    assert read(folder / "new") == FILES
    assert [p.name for p in (folder / "deep").iterdir()] == ["compiled.zip"]


def test_files_that_are_there_already_stay(folder: Path) -> None:
    pack(folder / "a.zip", folder / "cache")
    write(folder / "new", {"ab/cabc.py": b"newer", "zz/other.py": b"y"})
    assert unpack(folder / "a.zip", folder / "new").reason == ""
    assert read(folder / "new") == {**FILES, "ab/cabc.py": b"newer", "zz/other.py": b"y"}


def test_a_new_pack_replaces_the_old_file_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(folder / "a.zip", folder / "cache")
    before = (folder / "a.zip").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_hash", fail)
        with pytest.raises(OSError, match="disk full"):
            pack(folder / "a.zip", folder / "cache")
    assert (folder / "a.zip").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["a.zip", "cache"]
    write(folder / "cache", {"zz/more.py": b"z"})
    assert pack(folder / "a.zip", folder / "cache").num_files == len(FILES) + 1


def test_nothing_and_too_much_are_errors(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(NoEffect, match="empty"):
        pack(folder / "a.zip", folder / "empty")
    with pytest.raises(AccelError, match="too large.*limit_bytes"):
        pack(folder / "a.zip", folder / "cache", limit_bytes=100)
    assert not (folder / "a.zip").exists()
    pack(folder / "a.zip", folder / "cache")
    assert "larger than 100" in unpack(folder / "a.zip", folder / "new", limit_bytes=100).reason
    assert read(folder / "new") == {}


@pytest.mark.parametrize("name", list(cache.key()))
def test_a_file_of_another_machine_or_version_is_a_miss_that_says_why(
    folder: Path, name: str
) -> None:
    pack(folder / "a.zip", folder / "cache")
    rewrite(folder / "a.zip", lambda manifest, _: manifest["key"].update({name: "other"}))
    result = unpack(folder / "a.zip", folder / "new")
    assert result.num_files == 0
    assert f"made elsewhere: {name} 'other' there" in result.reason
    assert read(folder / "new") == {}


def test_every_damage_is_a_miss_and_never_a_crash(folder: Path) -> None:
    pack(folder / "a.zip", folder / "cache")
    whole = (folder / "a.zip").read_bytes()
    bad = folder / "bad.zip"
    cut = [whole[:n] for n in range(0, len(whole), max(1, len(whole) // 40))]
    generator = torch.Generator().manual_seed(0)
    flipped = []
    for _ in range(80):
        at = int(torch.randint(len(whole), (), generator=generator))
        flipped.append(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    for content in [*cut, *flipped, b"PK\x03\x04" + whole, b"no zip at all"]:
        bad.write_bytes(content)
        new = folder / "new"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile on doubled names
            result = unpack(bad, new)
        if result.reason:
            assert read(new) == {} and result.num_files == 0
        else:  # a bit that means nothing, such as a time stamp
            assert read(new) == FILES
        shutil.rmtree(new)
    assert "no file" in unpack(folder / "nowhere.zip", folder / "new").reason
    assert "no file" in unpack(folder / "cache", folder / "new").reason


@pytest.mark.parametrize(
    "name",
    [
        "../evil.py",
        "/evil.py",
        "ab/../../evil.py",
        "ab//evil.py",
        "./evil.py",
        "ab\\..\\evil.py",
        "C:evil.py",
        "",
        ".hidden/evil.py",
        "a\0b",
    ],
)
def test_names_that_lead_elsewhere_are_refused(folder: Path, name: str) -> None:
    pack(folder / "a.zip", folder / "cache")

    def change(manifest: Any, inside: Any) -> None:
        manifest["files"][name] = manifest["files"]["ab/cabc.py"]
        inside["files/" + name] = FILES["ab/cabc.py"]

    rewrite(folder / "a.zip", change)
    result = unpack(folder / "a.zip", folder / "deep/new")
    assert "not allowed" in result.reason
    assert read(folder / "deep") == {}
    assert not (folder / "evil.py").exists() and not Path("/evil.py").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m, _: m.pop("files"),
        lambda m, _: m.update(files=[1]),
        lambda m, _: m.update(files={"a": None}),
        lambda m, _: m.update(files={"a": ["1", "2"]}),
        lambda m, _: m.update(files={"a": [-1, ""]}),
        lambda m, _: m.update(files={"not-there": [0, ""]}),
        lambda m, _: m.update(key=None),
        lambda m, _: m.update(format=2),
        lambda m, _: m.update(artifacts=None),
        lambda m, inside: inside.update({"files/ab/cabc.py": b"x = 2"}),
        lambda m, inside: inside.update({"files/ab/cabc.py": b"x = 1" * 9999}),
    ],
)
def test_a_list_that_does_not_fit_is_damage(folder: Path, change: Any) -> None:
    pack(folder / "a.zip", folder / "cache")
    rewrite(folder / "a.zip", change)
    assert "damaged" in unpack(folder / "a.zip", folder / "new").reason
    assert read(folder / "new") == {}


def test_a_group_of_triton_names_its_members_where_they_are(folder: Path) -> None:
    old = folder / "cache/triton/HASH"
    group = {"child_paths": {"k.cubin": str(old / "k.cubin"), "k.json": str(old / "k.json")}}
    names = {"k.cubin": b"cubin", "k.json": b"{}", "__grp__k.json": json.dumps(group).encode()}
    write(old, names)
    pack(folder / "a.zip", folder / "cache")
    shutil.rmtree(folder / "cache")
    unpack(folder / "a.zip", folder / "new")
    moved = json.loads((folder / "new/triton/HASH/__grp__k.json").read_bytes())["child_paths"]
    assert {name: Path(path).read_bytes() for name, path in moved.items()} == {
        "k.cubin": b"cubin",
        "k.json": b"{}",
    }


@pytest.mark.slow
def test_the_key_is_the_same_in_another_process(root: Path) -> None:
    script = "import json; from lightning_accel.compilation.warm.cache import key; print(json.dumps(key()))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == cache.key()


@pytest.mark.parametrize("path", [3, "", " ", True, float("nan")])
def test_a_path_that_is_none_is_refused(path: Any) -> None:
    with pytest.raises(TypeError, match="Found: .*Do: "):
        WarmStart(path)


# --- in a Trainer -------------------------------------------------------------------------------


class Compile(WarmStart):
    """Stands for a compiler: writes what inductor would, and counts as it does."""

    name = "ab/cabc.py"

    def on_train_batch_end(self, *_: Any) -> None:
        path = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / self.name
        counters = torch._dynamo.utils.counters["inductor"]
        if path.exists():
            counters["fxgraph_cache_hit"] += 1
        else:
            counters["fxgraph_cache_miss"] += 1
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x = 1")


@pytest.fixture
def trainer(trainer_kwargs: dict[str, Any]) -> Any:
    return lambda *callbacks, **kwargs: Trainer(
        **{
            **trainer_kwargs,
            "callbacks": [*callbacks],
            "limit_train_batches": 2,
            "limit_val_batches": 0,
            **kwargs,
        }
    )


def test_a_second_run_starts_with_what_the_first_compiled(trainer: Any, tmp_path: Path) -> None:
    first, second = Compile(tmp_path / "a.zip"), Compile(str(tmp_path / "a.zip"))
    environment = dict(os.environ)
    trainer(first, max_epochs=1).fit(BoringModel())
    assert dict(os.environ) == environment
    assert first.totals == {"loaded": 1, "compiled": 1}
    assert "no file" in first.restored.reason
    trainer(second, max_epochs=1).fit(BoringModel())
    assert second.totals == {"loaded": 2, "compiled": 0}
    assert (second.restored.num_files, second.restored.reason) == (1, "")
    assert first._directory != second._directory
    assert stat.S_IMODE(first._directory.stat().st_mode) == 0o700


def test_nothing_is_written_where_nothing_is_new(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs: list[Path] = []
    monkeypatch.setattr(adapter, "pack", lambda *a: packs.append(a[0]) or pack(*a))
    run = trainer(Compile(tmp_path / "a.zip"), max_epochs=3)
    run.fit(BoringModel())
    run.fit_loop.max_epochs = 5
    run.fit(BoringModel())
    trainer(Compile(tmp_path / "a.zip"), max_epochs=1).fit(BoringModel())
    assert packs == [tmp_path / "a.zip"]
    other = Compile(tmp_path / "a.zip")
    other.name = "cd/other.py"
    trainer(other, max_epochs=1).fit(BoringModel())
    assert len(packs) == 2
    assert unpack(tmp_path / "a.zip", tmp_path / "all").num_files == 2


def test_the_file_lies_beside_the_checkpoints(trainer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "weights")
    trainer(Compile(), saver, enable_checkpointing=True, max_epochs=1).fit(BoringModel())
    assert (tmp_path / "weights" / cache.file_name()).is_file()
    trainer(Compile(), default_root_dir=tmp_path / "root", max_epochs=1).fit(BoringModel())
    assert (tmp_path / "root" / cache.file_name()).is_file()


def test_an_error_in_the_first_epoch_keeps_what_was_compiled(trainer: Any, tmp_path: Path) -> None:
    class Failing(Compile):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            raise RuntimeError("preempted")

    environment = dict(os.environ)
    with pytest.raises(RuntimeError, match="preempted"):
        trainer(Failing(tmp_path / "a.zip")).fit(BoringModel())
    assert dict(os.environ) == environment
    assert unpack(tmp_path / "a.zip", tmp_path / "new").num_files == 1


def test_a_damaged_file_is_told_and_replaced(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(adapter, "rank_zero_info", said.append)
    trainer(Compile(tmp_path / "a.zip"), max_epochs=1).fit(BoringModel())
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[: len(whole) // 2])
    said.clear()
    trainer(Compile(tmp_path / "a.zip"), max_epochs=1).fit(BoringModel())
    assert "damaged" in said[0]
    assert unpack(tmp_path / "a.zip", tmp_path / "new").reason == ""


def test_a_place_that_cannot_be_written_is_a_warning(trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not packed.*Found: .*Do: "):
        trainer(Compile(tmp_path / "file" / "a.zip"), max_epochs=1).fit(BoringModel())


def test_a_run_that_compiles_nothing_is_told(trainer: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="WarmStart had no effect.*BlockCompile"):
        trainer(WarmStart(tmp_path / "a.zip"), max_epochs=1).fit(BoringModel())
    assert not (tmp_path / "a.zip").exists()


# --- for real -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_start_from_what_one_compiled_before_it_died(
    tmp_path: Path, root: Path
) -> None:
    found: dict[str, dict[str, Any]] = {}
    for number, (devices, *more) in enumerate((("1", "ERROR"), ("2",))):
        run = forks.run_script if devices == "1" else forks.run_ranks
        status, printed = run(
            root / "tests" / "scripts" / "ddp_warm.py",
            *(str(tmp_path), devices, *more),
            cwd=tmp_path,
            environ={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"own{number}")},
        )
        assert status == 0, printed[-3000:]
        for path in tmp_path.glob("rank*.json"):
            found[f"{number}{path.stem}"] = json.loads(path.read_text())
    alone, zero, one = found["0rank0"], found["1rank0"], found["1rank1"]
    assert alone["compiled"] > 0 and alone["loaded"] == 0 and alone["restored"] == 0
    for rank in (zero, one):
        assert rank["restored"] > 0
        assert (rank["loaded"], rank["compiled"]) == (alone["compiled"], 0)
        assert rank["elsewhere"] == 0 and rank["undone"]
    assert zero["weights"] == one["weights"]
