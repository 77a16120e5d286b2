"""Files that are there whole or not at all, whoever looks and whatever fails."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lightning_accel.places import replace, written_whole


def test_who_reads_sees_the_old_file_to_its_end(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with target.open() as reader:
        with written_whole(target) as part:
            part.write_text("new, and longer")
            assert target.read_text() == "old"
        assert reader.read() == "old" and target.read_text() == "new, and longer"


@pytest.mark.parametrize("there", [True, False])
def test_what_fails_changes_nothing(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "a.txt"
    if there:
        target.write_text("old")

    def fail() -> None:
        with written_whole(target) as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"] * there


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "a.txt").symlink_to(tmp_path / "theirs")
    replace(tmp_path / "a.txt", "mine")
    assert (tmp_path / "theirs").read_text() == "precious"
    assert not (tmp_path / "a.txt").is_symlink() and (tmp_path / "a.txt").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix", reason="modes of posix")
@pytest.mark.parametrize(("mode", "expected"), [(0o666, 0o640), (0o600, 0o600)])
def test_others_may_read_what_they_may_read_of_any_new_file(
    tmp_path: Path, mode: int, expected: int
) -> None:
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "a.txt", mode) as part:
            part.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == expected


def test_a_writer_that_makes_the_file_anew_is_fine(tmp_path: Path) -> None:
    """As Lightning's checkpoints do, by a name of their own and a rename."""
    with written_whole(tmp_path / "new" / "a.txt") as part:
        (part.parent / "other").write_text("x")
        (part.parent / "other").rename(part)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
