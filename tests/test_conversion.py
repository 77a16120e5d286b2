"""Checkpoints that were converted, written in the background, or not written to their end."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from sharded import Adam, Manual, apart, data, made, trainer, weights

from lightning_accel.cli import main
from lightning_accel.errors import AccelError, StructureMismatch
from lightning_accel.parallel import folders
from lightning_accel.parallel.conversion import convert
from lightning_accel.strategies import FSDP2Strategy

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
]


class Decays(Adam):
    """Two groups in another order than the module's, and a schedule."""

    def configure_optimizers(self) -> Any:
        decays = [p for p in self.parameters() if p.dim() > 1]
        rests = [p for p in self.parameters() if p.dim() < 2]
        optimizer = torch.optim.AdamW([{"params": rests, "weight_decay": 0.0}, {"params": decays}])
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def fit(module: LightningModule, sharded: bool, epochs: int, ckpt: Any = None) -> Any:
    strategy = FSDP2Strategy(checkpoints="sharded") if sharded else "auto"
    run = trainer(devices=1, max_epochs=epochs, strategy=strategy)
    run.fit(module, data(0, 1), ckpt_path=ckpt)
    return run


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("make", [Decays, Manual])
def test_a_run_goes_on_from_a_converted_checkpoint_as_from_its_own(
    tmp_path: Path, make: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(made(make), True, 1).save_checkpoint(tmp_path / "shards")
    fit(made(make), False, 1).save_checkpoint(tmp_path / "own.ckpt")
    one = str(tmp_path / "one.ckpt")
    assert main(["checkpoint", "convert", str(tmp_path / "shards"), one, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "file" and said["num_bytes"] == Path(one).stat().st_size
    subject = ["--module", f"test_conversion:{make.__name__}"]
    back = str(tmp_path / "back")
    assert main(["checkpoint", "convert", one, back, *subject]) == 0, capsys.readouterr().err
    ends = {}
    for name, sharded in {
        "own.ckpt": False,
        "one.ckpt": False,
        "shards": True,
        "back": True,
    }.items():
        module = made(make, 7)
        run = fit(module, sharded, 2, tmp_path / name)
        ends[name] = weights(module), run.global_step
    moved = apart(weights(made(make)), ends["own.ckpt"][0])
    assert moved > 1e-4 and len({step for _, step in ends.values()}) == 1
    for name, (found, _) in ends.items():
        assert apart(ends["own.ckpt"][0], found) == 0.0, name
    own, other = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("own", "one"))
    assert own["lr_schedulers"] == other["lr_schedulers"] and own["loops"] == other["loops"]
    assert list(own["state_dict"]) == list(other["state_dict"])


def checkpoint(path: Path, **more: Any) -> Path:
    optimizer = {"state": {0: {"m": torch.ones(2, 3)}}, "param_groups": [{"params": [0]}]}
    state = {"w": torch.ones(2, 3), "v": torch.ones(3, 2)}
    torch.save({"state_dict": state, "optimizer_states": [optimizer], **more}, path)
    return path


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (None, AccelError, "--module"),
        ([["w", "v"]], StructureMismatch, "2 parameters, and 1"),
        ([["v"]], StructureMismatch, "another shape for `v`"),
        ([["u"]], StructureMismatch, "`u`"),
    ],
)
def test_states_that_have_no_clear_names_are_refused(
    tmp_path: Path, names: Any, error: Any, says: str
) -> None:
    file = checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(error, match=says):
        convert(file, tmp_path / "b", names=names)
    assert {p.name for p in tmp_path.iterdir()} == {"a.ckpt"}


def test_nothing_of_the_users_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint(tmp_path / "a.ckpt", optimizer_states=[])
    for source, to, says in (("a.ckpt", "a.ckpt", "already"), ("no.ckpt", "b", "no such")):
        assert main(["checkpoint", "convert", str(tmp_path / source), str(tmp_path / to)]) == 2
        assert says in capsys.readouterr().err
    (tmp_path / "b").mkdir()
    convert(file, tmp_path / "b", overwrite=True)
    (tmp_path / "b" / ".metadata").unlink()
    with pytest.raises(AccelError, match="no index"):
        convert(tmp_path / "b", file, overwrite=True)
    assert file.is_file() and not (tmp_path / "a.ckpt.partial").exists()
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(AccelError, match=r"no checkpoint of a run"):
        convert(tmp_path / "list.ckpt", tmp_path / "c")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        convert(file, tmp_path / "b", overwrite=True)
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:length])
        with pytest.raises(AccelError, match=r"a\.ckpt: .*Do: look whether all of it was copied"):
            convert(file, tmp_path / "d")


class Notes(Callback):
    """The weights at the end of each epoch, when a checkpoint is asked for."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(weights(pl_module))


class Waits(TorchCheckpointIO):
    """Writes nothing before the next step was taken, and the file of a given call not at all."""

    def __init__(self, fails_at: int = -1) -> None:
        self.steps, self.calls, self.fails_at = threading.Semaphore(0), 0, fails_at

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        assert self.steps.acquire(timeout=60)
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError("the disk is full")
        super().save_checkpoint(checkpoint, path, storage_options)


class Lets(Callback):
    """Lets a file be written once weights have changed since."""

    def __init__(self, io: Waits) -> None:
        self.io = io

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch and not trainer.fit_loop.epoch_loop.batch_idx:
            self.io.steps.release()

    def on_train_end(self, *_: Any) -> None:
        self.io.steps.release(9)


@pytest.mark.slow
@pytest.mark.ddp
def test_a_file_written_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    io, notes = Waits(), Notes()
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    run = trainer(
        devices=1, strategy=FSDP2Strategy(), max_epochs=3, enable_checkpointing=True,
        plugins=[AsyncCheckpointIO(io)], callbacks=[notes, Lets(io), saver],
    )  # fmt: skip
    run.fit(made(Adam), data(0, 1))
    for epoch, seen in enumerate(notes.seen):
        file = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert apart(seen, file["state_dict"]) == 0.0
    assert apart(notes.seen[0], notes.seen[1]) > 0


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_that_was_not_written_to_its_end_is_told_and_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    io, notes, path = Waits(fails_at=2), Notes(), tmp_path / "last.ckpt"
    saver = ModelCheckpoint(tmp_path, "last", save_top_k=1, enable_version_counter=False)
    if sharded:
        write = folders.dcp.save

        def save(*given: Any, **more: Any) -> None:
            write(*given, **more)
            if len(notes.seen) == 2:
                raise OSError("the disk is full")

        monkeypatch.setattr(folders.dcp, "save", save)
    kind = {"checkpoints": "sharded"} if sharded else {}
    run = trainer(
        devices=1, strategy=FSDP2Strategy(**kind), max_epochs=3, enable_checkpointing=True,  # type: ignore[arg-type]
        plugins=[] if sharded else [AsyncCheckpointIO(io)], callbacks=[notes, Lets(io), saver],
    )  # fmt: skip
    with pytest.raises(OSError, match="disk is full"):
        run.fit(made(Adam), data(0, 1))
    found = folders.gathered(path) if sharded else torch.load(path, weights_only=True)
    last = found["state_dict"]
    assert apart(notes.seen[found["epoch"]], last) == 0.0
    assert found["epoch"] == 0
    again = trainer(devices=1, strategy=FSDP2Strategy(), max_epochs=3)
    again.fit(made(Adam), data(0, 1), ckpt_path=path)
    io.steps.release(9)  # the thread that still waits
