"""The examples run from any folder, and the data and models are what they say."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data.digits import Digits
from data.pydoc import Pydoc
from forks import run_script
from lightning.pytorch import LightningDataModule, Trainer
from models.gpt import GPT
from models.resnet import ResNet
from models.vit import ViT

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, cwd: Path, script: str = "examples/train.py", **environ: str) -> str:
    """Run a script as a user would, and return what it printed."""
    path = (ROOT,)
    status, printed = run_script(ROOT / script, *arguments, cwd=cwd, path=path, environ=environ)
    assert status == 0, printed[-6000:]
    return printed


WORDLESS = sorted(p for p in (ROOT / "examples").glob("*.py") if p.name != "train.py")


@pytest.mark.parametrize("path", WORDLESS, ids=lambda path: path.stem)
def test_an_example_without_options_refuses_words(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, "callbacks.pruning.ratio=0.3"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    assert "unrecognized arguments: callbacks.pruning.ratio=0.3" in capsys.readouterr().err


# --- data -------------------------------------------------------------------------------------------


def test_digits_are_split_without_overlap_and_stratified() -> None:
    data = Digits()
    data.setup("fit")
    parts = [data.train, data.val, data.test]
    assert [len(part) for part in parts] == [1257, 180, 360]
    everything = torch.cat([part.tensors[0] for part in parts]).flatten(1)
    assert len({tuple(row) for row in everything.tolist()}) == 1797
    for part in parts:
        share = part.tensors[1].bincount().float() / len(part)
        assert (share - 0.1).abs().max() < 0.02


def test_the_split_does_not_depend_on_the_seed() -> None:
    first, second = Digits(seed=0), Digits(seed=1)
    first.setup("fit")
    second.setup("test")
    assert torch.equal(first.test.tensors[0], second.test.tensors[0])


def rows(data: Digits) -> set[tuple[float, ...]]:
    return {tuple(row) for row in data.train.tensors[0].flatten(1).tolist()}


def few(num_train: int | None, seed: int = 0) -> Digits:
    data = Digits(num_train=num_train, seed=seed)
    data.setup("fit")
    return data


@pytest.mark.parametrize("seed", [0, 7])
def test_few_labels_are_as_many_of_each_class_and_part_of_the_training_data(seed: int) -> None:
    everything, hundred, five = few(None), few(100, seed), few(5, seed)
    assert hundred.train.tensors[1].bincount().tolist() == [10] * 10
    assert len(five.train.tensors[1].unique()) == 5
    assert rows(five) < rows(hundred) < rows(everything)
    for part in ("val", "test"):
        assert torch.equal(getattr(hundred, part).tensors[0], getattr(everything, part).tensors[0])


def test_few_labels_depend_on_the_seed_and_belong_to_their_images() -> None:
    first, second = few(100, 0), few(100, 1)
    assert rows(first) != rows(second) and rows(first) == rows(few(100, 0))
    label_of = {
        tuple(x.flatten().tolist()): int(y) for x, y in zip(*few(None).train.tensors, strict=True)
    }
    for x, y in zip(*first.train.tensors, strict=True):
        assert label_of[tuple(x.flatten().tolist())] == int(y)


def test_fewer_images_than_a_batch_still_make_one() -> None:
    batches = list(few(40).train_dataloader())
    assert [len(y) for _, y in batches] == [40]


@pytest.mark.parametrize("data", [Digits(), Pydoc(num_windows=64)], ids=["digits", "pydoc"])
def test_the_order_of_samples_is_a_function_of_seed_and_epoch(data: LightningDataModule) -> None:
    data.setup("fit")

    def epoch(number: int) -> torch.Tensor:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat([batch[0] for batch in loader])

    before = torch.get_rng_state()
    first = epoch(0)
    assert torch.equal(first, epoch(0)), "a new loader repeats the epoch"
    assert not torch.equal(first, epoch(1)), "the next epoch has another order"
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"


def test_each_process_reads_its_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Digits()
    data.setup("fit")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(set(data.train_dataloader().sampler))
    assert len(shares[0] | shares[1]) == 1257
    assert len(shares[0] & shares[1]) <= 1, "one sample fills the last pair"


def test_pydoc_is_real_text_and_targets_are_the_next_bytes() -> None:
    data = Pydoc(num_windows=64)
    data.setup("fit")
    tokens, targets = data.train[0]
    assert torch.equal(tokens[1:], targets[:-1])
    text = b"".join(bytes(data.train[i][0].tolist()) for i in range(64)).decode(errors="ignore")
    assert " the " in text and tokens.shape == (128,)


# --- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("[md]*/*.py")), ids=lambda path: path.stem
)
def test_models_and_data_know_nothing_of_this_package(path: Path) -> None:
    assert "lightning_accel" not in {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _imported(node)
    }


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_the_gpt_ties_its_head_and_looks_back_only() -> None:
    model = GPT(dim=16, context=8).eval()
    assert model.head.weight is model.tokens.weight
    tokens = torch.randint(0, 256, (2, 8))
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :-1], model(changed)[:, :-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ResNet, ViT])
def test_image_models_learn(kind: Any, trainer_kwargs: dict[str, Any]) -> None:
    small = {"widths": (8, 16), "depth": 1} if kind is ResNet else {"dim": 32, "depth": 1}
    trainer = Trainer(**trainer_kwargs | {"max_epochs": 4 if kind is ResNet else 8})
    trainer.fit(kind(**small), Digits())
    assert trainer.callback_metrics["val/acc"] > 0.6


@pytest.mark.slow
def test_the_gpt_learns_more_than_letter_frequencies(trainer_kwargs: dict[str, Any]) -> None:
    trainer = Trainer(**trainer_kwargs | {"max_epochs": 1})
    data = Pydoc(batch_size=16, context=64, num_windows=3200)
    trainer.fit(GPT(dim=48, depth=1, context=64), data)
    counts = data.train.tensors[0].flatten().bincount(minlength=256) + 1.0
    frequencies = (counts / counts.sum()).log2()
    unigram = -frequencies[data.val.tensors[1].flatten()].mean()
    assert trainer.callback_metrics["val/bits_per_byte"] < unigram


# --- train.py ---------------------------------------------------------------------------------------


def test_a_missing_preset_ends_the_run(tmp_path: Path) -> None:
    status, printed = run_script(ROOT / "examples/train.py", "+accel=typo", cwd=tmp_path)
    assert status == 1
    assert "amp_compile_prune" in printed, "the message lists what there is"


def test_a_secret_on_the_command_line_ends_the_run_and_is_not_kept(tmp_path: Path) -> None:
    script = ROOT / "examples/train.py"
    status, printed = run_script(script, "+service.token=c4n4ry", cwd=tmp_path)
    assert status == 1
    assert "does not belong on the command line" in printed
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "overrides.yaml" for path in kept)
    assert not [path for path in kept if b"c4n4ry" in path.read_bytes()]


@pytest.mark.slow
def test_train_runs_as_a_program_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/train.py"), "trainer=fast", "accelerator=cpu"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "test/acc" in done.stdout


def test_train_runs_from_any_folder_and_writes_into_its_own(tmp_path: Path) -> None:
    printed = run("trainer=fast", "logger=csv", "accelerator=cpu", cwd=tmp_path)
    assert "test/acc" in printed
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]
    saved = list(tmp_path.glob("outputs/*/csv/hparams.yaml"))
    assert len(saved) == 1
    assert "!!python" not in saved[0].read_text()


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(tmp_path: Path) -> None:
    keep = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, save_top_k: -1}"
    run("trainer=fast", "logger=csv", f"+callbacks.keep={keep}", cwd=tmp_path)
    first, last = sorted(tmp_path.glob("outputs/*/csv/checkpoints/*.ckpt"))
    overrides = ["trainer=fast", "logger=csv", f"ckpt_path='{first}'", "hydra.run.dir=again"]
    run(*overrides, cwd=tmp_path)
    (again,) = (tmp_path / "again").rglob("*.ckpt")
    expected, found = (torch.load(p, weights_only=True) for p in (last, again))
    assert found["global_step"] == expected["global_step"] == 8
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(tensor, found["state_dict"][name]), name
    assert expected["hyper_parameters"]["widths"] == [64, 128]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "experiment"),
    [
        *((preset, "digits_resnet") for preset in ("amp", "amp_compile_prune")),
        *((preset, "digits_vit") for preset in ("compile", "distill")),
        *((preset, "pydoc_gpt") for preset in ("prune", "amp_prune_distill")),
    ],
)
def test_a_preset_finishes_with_a_true_table(tmp_path: Path, preset: str, experiment: str) -> None:
    chosen = [f"experiment={experiment}", "model.depth=1"]
    if experiment == "digits_resnet":
        chosen = ["model.widths=[32,64]"]
    fast = ["trainer=fast", "trainer.max_epochs=2", "+callbacks.report.budget_s=0.3"]
    if "compile" in preset:  # tests/test_compilation.py runs the code generator
        fast.append("+callbacks.compilation.backend=aot_eager")
    if preset == "distill":
        fast += ["teacher.model.depth=2", "teacher.trainer.max_epochs=1"]
        fast += ["teacher.model.widths=[32,64]"] * (experiment == "digits_resnet")
    run(f"+accel={preset}", *chosen, *fast, cwd=tmp_path)
    (path,) = tmp_path.glob("outputs/**/report.json")
    report = json.loads(path.read_text())
    dense, final, ratios = report["dense"], report["final"], report["ratios"]
    for quantity in ("params", "macs"):
        assert ratios[quantity] == pytest.approx(dense[quantity] / final[quantity], rel=1e-3)
        if "prune" in preset:
            assert ratios[quantity] > 1.3
        else:
            assert ratios[quantity] == pytest.approx(1)
    assert all(gain > 0 for gain in ratios["latency"].values())


@pytest.mark.slow
def test_two_callbacks_give_the_same_without_hydra(tmp_path: Path) -> None:
    """A narrower network in fewer epochs than the script's own, which README's table shows."""
    script = (ROOT / "examples/01_two_callbacks.py").read_text()
    lines = [line for line in script.splitlines() if line.strip()]
    assert len(lines) < 15
    for long, short in {
        "max_epochs=20": "max_epochs=10",
        "ResNet()": "ResNet((16, 32), 1)",
    }.items():
        assert long in script
        script = script.replace(long, short)
    (tmp_path / "narrow.py").write_text(script)
    path = (ROOT, ROOT / "examples")
    status, printed = run_script(tmp_path / "narrow.py", cwd=tmp_path, path=path)
    assert status == 0, printed[-6000:]
    report = json.loads((tmp_path / "outputs" / "report.json").read_text())
    assert report["ratios"]["macs"] > 2
    assert report["final"]["metrics"]["test/acc"] > 0.9


@pytest.mark.slow
def test_the_notebook_shows_receipts_and_reports_and_writes_a_page(tmp_path: Path) -> None:
    script = (ROOT / "examples/05_notebook.py").read_text()
    cells = re.split(r"^# %%.*$", script, flags=re.MULTILINE)[1:]
    assert len(cells) == 8 and all(ast.parse(cell) for cell in cells)
    said = run(cwd=tmp_path, script="examples/05_notebook.py")
    assert "0.weight: pruned, 256x32 -> 128x32" in said and "charts: gains, history-acc" in said
    report = json.loads((tmp_path / "notebook" / "report.json").read_text())
    assert [edit["epoch"] for edit in report["edits"]] == [3] and report["ratios"]["params"] > 2
    assert "StructuredPruning" in (tmp_path / "notebook" / "report.html").read_text()
    assert (tmp_path / "notebook" / "layers.svg").read_text().startswith("<svg ")


# --- distillation -----------------------------------------------------------------------------------

TINY = ["model.widths=[8,16]", "model.depth=1", "teacher.model.widths=[16,32]"]
TINY += ["trainer=fast", "+callbacks.report.budget_s=0.2"]


@pytest.mark.slow
@pytest.mark.parametrize("group", ["logits", "features"])
def test_a_teacher_is_trained_by_the_first_run_and_found_by_the_next(
    tmp_path: Path, group: str
) -> None:
    distill = ["+accel=distill", f"accel/distillation={group}", *TINY]
    first = run(*distill, "seed=0", cwd=tmp_path)
    (teacher,) = (tmp_path / "outputs" / "teachers").iterdir()
    made = teacher.stat().st_mtime_ns
    second = run(*distill, "seed=1", "data.num_train=80", cwd=tmp_path)
    assert "Training the teacher first" in first and "Training the teacher" not in second
    assert [p.stat().st_mtime_ns for p in teacher.parent.iterdir()] == [made]
    assert "distillation/agreement" in first and "distillation/agreement" in second
    assert ("distillation/fitnet" in second) == (group == "features")


@pytest.mark.slow
def test_no_teacher_is_trained_where_none_is_asked_for(tmp_path: Path) -> None:
    run("+accel=amp_prune_distill", *TINY, cwd=tmp_path)
    assert not (tmp_path / "outputs" / "teachers").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["02_distill_image", "03_distill_language"])
def test_a_student_gains_from_its_teacher_in_under_sixty_lines(tmp_path: Path, name: str) -> None:
    """A language takes minutes: that the student gains there is a row of LEDGER.md, and here it only runs."""
    script, environ = f"examples/{name}.py", {}
    assert len((ROOT / script).read_text().splitlines()) < 60
    if name == "03_distill_language":
        environ["PL_TRAINER_LIMIT_TRAIN_BATCHES"] = "10"
    printed = run(cwd=tmp_path, script=script, **environ)
    alone, taught = (
        float(line.split(": ")[1].split()[0])
        for line in printed.splitlines()
        if line.startswith("student ")
    )
    assert environ or taught > alone + 0.03


# --- tuning -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_run_found_out_is_a_preset_for_the_next(tmp_path: Path) -> None:
    fast = ["trainer=fast", "model.widths=[8,16]", "model.depth=1"]
    given = [
        "budget_s=4",
        "budget_share=1000",
        "cache=false",
        "techniques=[precision,fused_optimizer]",
    ]
    searched = run(
        "+accel=auto", *fast, *(f"+callbacks.tuning.{one}" for one in given), cwd=tmp_path
    )
    assert "plain against plain" in searched
    (preset,) = tmp_path.glob("outputs/*/tuned.yaml")
    preset.rename(tmp_path / "tuned.yaml")
    again = run("+accel=./tuned.yaml", *fast, cwd=tmp_path)
    assert "plain against plain" not in again and "test/acc" in again
    bf16 = "AutocastPrecision" in (tmp_path / "tuned.yaml").read_text()
    assert ("Computing in bfloat16" in again) == bf16


@pytest.mark.slow
def test_a_trainer_tunes_itself_in_under_sixty_lines(tmp_path: Path) -> None:
    script = "examples/04_auto_tune.py"
    assert len((ROOT / script).read_text().splitlines()) < 60
    printed = run(cwd=tmp_path, script=script, PL_TRAINER_LIMIT_TRAIN_BATCHES="60")
    assert "one epoch:" in printed and "considered" in printed.lower()
    assert {"tuned.yaml", "tuned.svg"} <= {path.name for path in tmp_path.iterdir()}
