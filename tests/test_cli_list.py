"""`lightning-accel list`: presets and techniques, and whose they are."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import lightning_accel
from lightning_accel.cli import listing, main


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["list", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)["entries"]


def test_every_preset_is_listed_with_its_first_line(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {e["name"]: e for e in listed(capsys) if e["kind"] in ("preset", "variant")}
    folder = root / "conf" / "accel"
    files = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.yaml")}
    assert found.keys() == files.keys()
    for name, path in files.items():
        lines = [f"# {found[name]['gives']}" == line for line in path.read_text().splitlines()]
        assert any(lines[:2]), name
        assert found[name]["whose"] == "ours"


def test_every_public_name_is_listed_with_what_its_docstring_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {e["name"]: e for e in listed(capsys) if e["kind"] not in ("preset", "variant")}
    assert sorted(found) == sorted(lightning_accel.__all__)
    for name, entry in found.items():
        thing = getattr(lightning_accel, name)
        said = (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")
        assert entry["gives"] == said
        assert (entry["kind"] == "function") == inspect.isfunction(thing)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "conf" / "accel"
    (folder / "pruning").mkdir(parents=True)
    (folder / "mine.yaml").write_text("# What this lab always uses.\naccel:\n  mine: true\n")
    (folder / "amp.yaml").write_text("# @package _global_\n# Our own way of mixed precision.\n")
    (folder / "pruning" / "ours.yaml").write_text("ratio: 0.1\n")
    (folder / "broken.yml").write_bytes(b"\xff\xfe")
    config = tmp_path / "conf" / "config.yaml"
    config.write_text("seed: 0\n")
    return config


def test_presets_of_an_app_stand_beside_ours_and_say_whose_they_are(
    app: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {e["name"]: e for e in listed(capsys, "--config", str(app))}
    assert found["mine"]["whose"] == "yours"
    assert found["mine"]["gives"] == "What this lab always uses."
    assert found["amp"]["whose"] == "yours, in place of ours"
    assert found["amp"]["gives"] == "Our own way of mixed precision."
    assert found["pruning/ours"]["use"] == "+accel/pruning=ours"
    assert "says nothing" in found["pruning/ours"]["gives"]
    assert "cannot be read" in found["broken"]["gives"]
    assert found["prune"]["whose"] == "ours"


def test_the_app_in_the_present_folder_is_found_by_itself(
    app: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(app.parents[1])
    assert main(["list", "mine"]) == 0
    assert "yours" in capsys.readouterr().out


def test_words_choose_rows_and_none_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys, "PRUNING", "quantum")
    assert [e["name"] for e in found] == ["pruning/quantum"]
    assert main(["list", "there is no such thing"]) == 1
    assert main(["list", "--config", "nowhere.yaml"]) == 2
    assert "no such configuration" in capsys.readouterr().err


def test_a_folder_without_presets_lists_ours_alone(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("a: 1\n")
    assert listing.users_folder(config) is None
