"""The cache of a teacher's answers: wrong by no damage, no race and no change of a single bit."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_accel.distillation.answers import Answer
from lightning_accel.distillation.cache import TeacherCache
from lightning_accel.distillation.keys import row_keys
from lightning_accel.distillation.row_store import RowStore, bytes_in
from lightning_accel.distillation.topk import coarsen, compress
from lightning_accel.distillation.views import SeededViews
from lightning_accel.errors import AccelError

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def keys_of(*args: Any, batch: int, salt: bytes = b"", **kwargs: Any) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in row_keys(args, kwargs, batch=batch, salt=salt)]


def some(count: int, value_bytes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    keys = draw.integers(0, 2**64, (count, 2), dtype=np.uint64)
    return keys, draw.integers(0, 256, (count, value_bytes), dtype=np.uint8)


class Teacher:
    """A frozen teacher that counts the rows it sees; each row is computed alone, hence bit-equal."""

    def __init__(self, outputs: int = 5, seed: int = 0) -> None:
        self.weight = torch.randn(6, outputs, generator=torch.Generator().manual_seed(seed))
        self.rows = 0

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        x = args[0] if args else kwargs["x"]
        self.rows += len(x)
        return {"logits": torch.stack([(row[..., None] * self.weight).sum(-2) for row in x])}

    def expected(self, x: Tensor) -> Tensor:
        return self((x,), {})["logits"].half().float()


def opened(folder: Path, fingerprint: str = "teacher", **options: Any) -> TeacherCache:
    """Return a cache that believes its teacher; what it tries otherwise is in test_distillation_trust.py."""
    cache = TeacherCache(folder, **{"check_every_n_calls": None, **options})
    cache.open(fingerprint)
    return cache


# ---------------------------------------------------------------------------------------------- keys


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16,
    torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    shape=st.lists(st.integers(1, 5), max_size=3),
    offset=st.integers(0, 3),
    place=st.randoms(use_true_random=False),
)
def test_a_key_changes_with_any_bit_of_its_own_row_and_with_no_other_row(
    dtype: torch.dtype, rows: int, shape: list[int], offset: int, place: random.Random
) -> None:
    size = rows * int(np.prod(shape)) * dtype.itemsize
    raw = torch.tensor([place.randrange(256) for _ in range(size + offset * dtype.itemsize)])
    raw = raw.to(torch.uint8) & (1 if dtype == torch.bool else 255)
    tensor = raw.view(dtype)[offset:].reshape(rows, *shape)
    before = keys_of(tensor, batch=rows)
    row, byte = place.randrange(rows), place.randrange(size // rows)
    bit = 0 if dtype == torch.bool else place.randrange(8)
    raw[offset * dtype.itemsize + row * (size // rows) + byte] ^= 1 << bit
    after = keys_of(tensor, batch=rows)
    assert after[row] != before[row]
    assert all(a != b for a, b in zip(after[row], before[row], strict=True)), "both halves"
    assert after[:row] + after[row + 1 :] == before[:row] + before[row + 1 :]


def test_rows_of_plus_and_minus_one_do_not_collide() -> None:
    # with odd weights and words of 64 bits, two flipped signs in odd places cancel exactly
    signs = torch.tensor([[(i >> j & 1) * 2.0 - 1 for j in range(12)] for i in range(4096)])
    assert len(set(keys_of(signs, batch=4096))) == 4096
    firsts = {first for first, _ in keys_of(signs, batch=4096)}
    assert len(firsts) == 4096, "each half alone tells them apart"


FROZEN = ["278236b01d87215c443c4371a9af8f43", "7f3012268288c8bf00ccb7809c52a7d1"]
"""Keys of (2, 3) numbers; a change makes every cache on every disk cold, so raise `SCHEMA` then."""


def test_keys_are_the_same_as_ever() -> None:
    keys = keys_of(torch.arange(6.0).reshape(2, 3), batch=2, salt=b"s", flag=True)
    assert [f"{a:016x}{b:016x}" for a, b in keys] == FROZEN


@pytest.mark.slow
def test_keys_are_the_same_in_every_process() -> None:
    script = (
        "import torch; from lightning_accel.distillation.keys import row_keys\n"
        "x = torch.arange(6.0).reshape(2, 3)\n"
        "for a, b in row_keys([x], {'flag': True}, batch=2, salt=b's'): print(f'{a:016x}{b:016x}')"
    )
    assert run_child(script).stdout.split() == FROZEN


def test_a_sum_of_a_key_is_the_written_out_sum_of_words_times_weights() -> None:
    from lightning_accel.distillation.keys import _sums, _weights

    x = torch.randn(3, 7, dtype=torch.float64)
    weights = [[int(w) for w in half] for half in _weights(4, 256, "cpu")]
    for row, found in zip(x, _sums(x, "x", 3, 4), strict=True):
        words = np.frombuffer(row.numpy().tobytes(), "<i2")
        for half in (0, 1):
            exact = sum(
                int(word) * weight for word, weight in zip(words, weights[half], strict=False)
            )
            assert (exact - int(found[half])) % 2**64 == 0


def test_long_rows_are_hashed_in_steps_to_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_accel.distillation import keys

    x = torch.randn(4, 1001)
    whole = keys_of(x, batch=4)
    monkeypatch.setattr(keys, "_WORDS_CPU", 300)
    assert keys_of(x, batch=4) == whole


def test_a_row_keeps_its_key_in_another_order_batch_and_memory_format() -> None:
    x = torch.randn(6, 3, 4, 4)
    keys = keys_of(x, batch=6)
    order = torch.randperm(6)
    assert keys_of(x[order], batch=6) == [keys[i] for i in order]
    assert keys_of(x[2:4], batch=2) == keys[2:4]
    assert keys_of(x.to(memory_format=torch.channels_last), batch=6) == keys
    assert keys_of(torch.complex(x, x).conj(), batch=6) == keys_of(torch.complex(x, -x), batch=6)


def test_zeros_of_both_signs_and_nan_are_told_apart_by_their_bits() -> None:
    nan = float("nan")
    assert len(set(keys_of(torch.tensor([0.0, -0.0, nan, 1.0]), batch=4))) == 4
    assert keys_of(torch.tensor([nan]), batch=1) == keys_of(torch.tensor([nan]), batch=1)


def test_all_that_is_no_row_is_part_of_every_key() -> None:
    x, mask = torch.randn(2, 4), torch.ones(3)
    calls: list[Callable[[], list[tuple[int, int]]]] = [
        lambda: keys_of(x, batch=2),
        lambda: keys_of(x, batch=2, salt=b"other"),
        lambda: keys_of(x=x, batch=2),
        lambda: keys_of([x], batch=2),
        lambda: keys_of((x,), batch=2),
        lambda: keys_of({"x": x}, batch=2),
        lambda: keys_of(x, None, batch=2),
        lambda: keys_of(x, [], batch=2),
        lambda: keys_of(x, {}, batch=2),
        lambda: keys_of(x, 1, batch=2),
        lambda: keys_of(x, True, batch=2),
        lambda: keys_of(x, 1.0, batch=2),
        lambda: keys_of(x, "1", batch=2),
        lambda: keys_of(x, b"1", batch=2),
        lambda: keys_of(x, np.arange(3), batch=2),
        lambda: keys_of(x, np.arange(1, 4), batch=2),
        lambda: keys_of(x, torch.float16, batch=2),
        lambda: keys_of(x, mask, batch=2),
        lambda: keys_of(x, mask * 2, batch=2),
        lambda: keys_of(x, mask.bool(), batch=2),
        lambda: keys_of(x.reshape(2, 2, 2), batch=2),
        lambda: keys_of(x.view(torch.int32), batch=2),
        lambda: keys_of(x, x, batch=2),
        lambda: keys_of(x, torch.zeros(2, 4), batch=2),
        lambda: keys_of(torch.zeros(2, 4), x, batch=2),
        lambda: keys_of(x, torch.zeros(()), batch=2),
    ]
    first_rows = [call()[0] for call in calls]
    assert len(set(first_rows)) == len(calls)
    assert [call()[0] for call in calls] == first_rows


def test_the_order_of_keywords_does_not_matter() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert keys_of(batch=2, a=x, b=y) == keys_of(batch=2, b=y, a=x)
    assert keys_of(batch=2, a=x, b=y) != keys_of(batch=2, a=y, b=x)
    assert keys_of({"a": x, "b": 1}, batch=2) == keys_of({"b": 1, "a": x}, batch=2)


def test_what_cannot_be_hashed_is_refused_with_its_place() -> None:
    with pytest.raises(TypeError, match=r"\['hook'\].*Found: object.*Do:"):
        keys_of(torch.zeros(2), batch=2, hook=object())
    with pytest.raises(TypeError, match=r"Found: torch.sparse_coo.*Do:"):
        keys_of(torch.eye(2).to_sparse(), batch=2)
    with pytest.raises(TypeError, match="Found: ndarray"):
        keys_of(torch.zeros(2), np.array([object()]), batch=2)


def test_keys_move_no_random_state() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    keys_of(torch.randn(2, 5000, generator=torch.Generator()), batch=2)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    assert after == before


# --------------------------------------------------------------------------------------------- store


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    value_bytes=st.integers(1, 300),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    seed=st.integers(0, 9),
)
def test_a_store_agrees_with_a_dict(
    tmp_path_factory: pytest.TempPathFactory, value_bytes: int, sizes: list[int], seed: int
) -> None:
    store = RowStore(tmp_path_factory.mktemp("s"), value_bytes=value_bytes, max_bytes=8 * MIB)
    truth: dict[bytes, bytes] = {}
    keys, values = some(sum(sizes), value_bytes, seed)
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        part = slice(end - size, end)
        store.put(keys[part], values[part])
        truth |= {k.tobytes(): v.tobytes() for k, v in zip(keys[part], values[part], strict=True)}
        found, got = store.get(keys)
        assert found.tolist() == [k.tobytes() in truth for k in keys]
        for key, value in zip(keys[found], got[found], strict=True):
            assert truth[key.tobytes()] == value.tobytes()
    store.close()


def test_a_store_of_many_values_keeps_every_one(tmp_path: Path) -> None:
    keys, values = some(20_000, 200)
    store = RowStore(tmp_path / "s", value_bytes=200, max_bytes=64 * MIB)
    for start in range(0, len(keys), 256):
        store.put(keys[start : start + 256], values[start : start + 256])
    found, got = store.get(keys)
    assert found.all() and (got == values).all()
    assert bytes_in(tmp_path) < 1.4 * values.nbytes, "little is lost beside the values"
    again = RowStore(tmp_path / "s", value_bytes=200, max_bytes=64 * MIB)
    assert again.get(keys)[0].all(), "another process finds them as well"


@pytest.mark.parametrize("value_bytes", [1, 200, 70_000, 900_000])
def test_the_size_on_disk_stays_below_the_limit(tmp_path: Path, value_bytes: int) -> None:
    limit = 3 * MIB
    store = RowStore(tmp_path / "s", value_bytes=value_bytes, max_bytes=limit)
    rows = min(3000, 8 * limit // value_bytes)
    for seed in range(3):
        store.put(*some(rows, value_bytes, seed))
    assert 0 < bytes_in(tmp_path) <= limit
    blocks = sum(p.stat().st_blocks * 512 for p in tmp_path.rglob("*.sqlite*"))
    assert blocks <= limit + 64 * 1024
    kept = 0
    for seed in range(3):
        keys, values = some(rows, value_bytes, seed)
        found, got = store.get(keys)
        assert (got[found] == values[found]).all()
        kept += int(found.sum())
    assert kept > 0


_GROWS = """
import sys
sys.path.insert(0, {tests!r})
from test_distillation_cache import some
from lightning_accel.distillation.row_store import RowStore
number = int(sys.argv[1])
store = RowStore({folder!r} + "/" + str(number), value_bytes=20_000, max_bytes={limit}, counted_in={folder!r})
sys.stdin.readline()
for seed in range(12):
    store.put(*some(8, 20_000, 100 * number + seed))
"""


@pytest.mark.slow
def test_two_processes_that_grow_at_once_stay_below_the_limit(tmp_path: Path) -> None:
    limit = MIB
    script = _GROWS.format(tests=str(ROOT / "tests"), folder=str(tmp_path), limit=limit)
    together(script, 2)
    assert limit // 2 < bytes_in(tmp_path) <= limit
    kept = 0
    for number in range(2):
        store = RowStore(tmp_path / str(number), value_bytes=20_000, max_bytes=limit)
        kept += sum(
            int(store.get(some(8, 20_000, 100 * number + seed)[0])[0].sum()) for seed in range(12)
        )
    assert kept > 20


def test_a_value_larger_than_the_limit_is_never_stored(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "s", value_bytes=MIB, max_bytes=MIB)
    store.put(*some(2, MIB))
    assert not store.get(some(2, MIB)[0])[0].any()
    assert bytes_in(tmp_path) == 0


def test_epochs_over_three_times_more_rows_than_fit_still_hit(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "s", value_bytes=1000, max_bytes=MIB)
    keys, values = some(3000, 1000)
    rates = []
    for _ in range(6):
        hits = 0
        for start in range(0, 3000, 50):
            part = slice(start, start + 50)
            found, _got = store.get(keys[part])
            hits += int(found.sum())
            store.put(keys[part][~found], values[part][~found])
        rates.append(hits / 3000)
    assert min(rates[1:]) > 0.2, "always replacing gives 6 %, never replacing 34 %"


def test_new_rows_come_in_when_the_old_ones_are_never_asked_for_again(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "s", value_bytes=1000, max_bytes=MIB)
    store.put(*some(2000, 1000, seed=1))
    keys, values = some(500, 1000, seed=2)
    for _ in range(40):
        missing = ~store.get(keys)[0]
        store.put(keys[missing], values[missing])
    assert store.get(keys)[0].mean() > 0.8


@pytest.mark.parametrize("half", [0, 1])
def test_keys_that_share_a_half_are_told_apart(tmp_path: Path, half: int) -> None:
    store = RowStore(tmp_path / "s", value_bytes=8, max_bytes=64 * MIB)
    keys, values = some(180, 8)
    keys[:, half] = 0
    store.put(keys[:90], values[:90])
    store.put(keys, values)
    found, got = store.get(keys)
    assert found.all() and (got == values).all()


def test_more_keys_at_once_than_one_query_takes(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "s", value_bytes=8, max_bytes=64 * MIB)
    keys, values = some(2501, 8)
    store.put(keys, values)
    found, got = store.get(np.concatenate([keys, keys[:7]]))
    assert found.all() and (got == np.concatenate([values, values[:7]])).all()


def reads(folder: Path, keys: np.ndarray, values: np.ndarray) -> bool:
    """See that a damaged file gives no wrong value and is healed by writing again; tell whether it was read."""
    store = RowStore(folder, value_bytes=16, max_bytes=MIB)
    found, got = store.get(keys)
    assert (got[found] == values[found]).all()
    store.put(keys, values)
    again, got = store.get(keys)
    assert again.all() and (got == values).all()
    store.close()
    return bool(found.all())


@pytest.mark.slow
def test_a_flipped_bit_is_a_miss_or_harmless_and_is_healed_by_writing_again(tmp_path: Path) -> None:
    keys, values = some(3, 16)
    store = RowStore(tmp_path / "s", value_bytes=16, max_bytes=MIB)
    store.put(keys, values)
    store.close()
    (path,) = (tmp_path / "s").glob("*.sqlite")
    whole = path.read_bytes()
    used = [i for i, byte in enumerate(whole) if byte]
    places = {near for i in used for near in (i - 1, i, i + 1) if 0 <= near < len(whole)}
    at = whole.index(values[1].tobytes())
    for place in sorted(places):
        for bit in (1, 128):
            damaged = bytearray(whole)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            read = reads(tmp_path / "s", keys, values)
            assert not (read and at - 16 <= place < at + 16), (
                place,
                bit,
            )  # second half, hash, value


@pytest.mark.parametrize("size", [0, 10, 4096, 8192, 20_000, -1])
def test_a_file_of_another_length_gives_no_wrong_value(tmp_path: Path, size: int) -> None:
    keys, values = some(3, 16)
    store = RowStore(tmp_path / "s", value_bytes=16, max_bytes=MIB)
    store.put(keys, values)
    store.close()
    (path,) = (tmp_path / "s").glob("*.sqlite")
    os.truncate(path, size if size >= 0 else path.stat().st_size + 1)
    assert reads(tmp_path / "s", keys, values) == (size < 0)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7])
def test_a_file_that_shrinks_while_it_is_open_is_no_signal(tmp_path: Path, kept: float) -> None:
    keys, values = some(3000, 16)
    store = RowStore(tmp_path / "s", value_bytes=16, max_bytes=MIB)
    store.put(keys, values)
    assert store.get(keys[:5])[0].all()
    (path,) = (tmp_path / "s").glob("*.sqlite")
    os.truncate(path, int(path.stat().st_size * kept))
    for _ in range(2):
        found, got = store.get(keys)
        assert (got[found] == values[found]).all()
        store.put(keys, values)
    found, got = store.get(keys)
    assert found.all() and (got == values).all()


def test_a_file_removed_by_another_process_is_made_anew(tmp_path: Path) -> None:
    keys, values = some(9, 16)
    one = RowStore(tmp_path / "s", value_bytes=16, max_bytes=MIB)
    one.put(keys[:3], values[:3])
    next((tmp_path / "s").glob("*.sqlite")).unlink()
    other = RowStore(tmp_path / "s", value_bytes=16, max_bytes=MIB)
    other.put(keys[3:6], values[3:6])
    one.put(keys[6:], values[6:])
    found, got = other.get(keys)
    assert found.tolist() == [False] * 3 + [True] * 6 and (got[found] == values[found]).all()


def test_a_folder_of_another_content_is_set_aside_with_a_warning(tmp_path: Path) -> None:
    keys, values = some(3, 16)
    RowStore(tmp_path / "s", value_bytes=16, max_bytes=MIB).put(keys, values)
    with pytest.warns(UserWarning, match=r"does not describe.*Found: .*Do: delete .*aside"):
        other = RowStore(tmp_path / "s", value_bytes=8, max_bytes=MIB)
    assert not other.get(keys)[0].any()
    assert len(list(tmp_path.glob("s.aside-*/rows.sqlite"))) == 1


def test_every_flipped_byte_of_the_meta_file_is_noticed(tmp_path: Path) -> None:
    keys, values = some(1, 16)
    RowStore(tmp_path / "s", value_bytes=16, max_bytes=MIB).put(keys, values)
    text = (tmp_path / "s" / "meta.json").read_bytes()
    assert json.loads(text) == {"schema": 3, "value_bytes": 16}
    for place in range(len(text)):
        meta = tmp_path / "s" / "meta.json"
        meta.write_bytes(text[:place] + bytes([text[place] ^ 4]) + text[place + 1 :])
        with pytest.warns(UserWarning, match="does not describe"):
            store = RowStore(tmp_path / "s", value_bytes=16, max_bytes=MIB)
        assert not store.get(keys)[0].any()
        store.put(keys, values)


def test_a_row_of_another_process_is_found_while_both_run(tmp_path: Path) -> None:
    one, other = (RowStore(tmp_path / "s", value_bytes=16, max_bytes=MIB) for _ in range(2))
    keys, values = some(9, 16)
    one.put(keys[:5], values[:5])
    assert other.get(keys)[0].tolist() == [True] * 5 + [False] * 4
    other.put(keys[5:], values[5:])
    found, got = one.get(keys)
    assert found.all() and (got == values).all()
    assert [p.name for p in (tmp_path / "s").glob("*.sqlite")] == ["rows.sqlite"]


_CHILD = """
import resource, signal, sys
import numpy as np
sys.path.insert(0, {tests!r})
from test_distillation_cache import some
from lightning_accel.distillation.row_store import RowStore
keys, values = some(64, 5000)
store = RowStore({folder!r}, value_bytes=5000, max_bytes=2**22)
store.put(keys[:32], values[:32])
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a write beyond the limit ends the process in its middle
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
store.put(keys[16:], values[16:] ^ 1)
"""


def run_child(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=900,
        **options,
    )


def together(script: str, processes: int) -> list[str]:
    """Run a script in several processes that begin at once; each gets its number, and all end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], env=environment, **pipes)
        for i in range(processes)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=900)[0] for process in running]
    assert all(process.returncode == 0 for process in running)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 9_000, 60_000, 250_000, 300_000, 400_000])
def test_a_writer_killed_in_the_middle_leaves_only_whole_values(tmp_path: Path, limit: int) -> None:
    # small limits end it in the journal, large ones where the file itself has been written in part
    script = _CHILD.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "s"), limit=limit)
    assert run_child(script).returncode == -signal.SIGXFSZ
    assert limit < 2 or (tmp_path / "s" / "rows.sqlite-journal").stat().st_size > 512
    keys, values = some(64, 5000)
    store = RowStore(tmp_path / "s", value_bytes=5000, max_bytes=2**22)
    found, got = store.get(keys)
    assert found.tolist() == [True] * 32 + [False] * 32, "what was there before, and no more"
    assert (got[found] == values[found]).all()
    store.put(keys, values)
    found, got = store.get(keys)
    assert found.all() and (got == values).all()


_AT_ANY_MOMENT = """
import sys
sys.path.insert(0, {tests!r})
from test_distillation_cache import some
from lightning_accel.distillation.row_store import RowStore
store = RowStore({folder!r}, value_bytes=2000, max_bytes=2**20)
print("ready", flush=True)
for seed in range(10_000):
    store.put(*some(16, 2000, seed % 50))
"""


@pytest.mark.slow
def test_writers_killed_at_any_moment_leave_only_whole_values(tmp_path: Path) -> None:
    script = _AT_ANY_MOMENT.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "s"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for wait_s in (0.01, 0.05, 0.13):
        child = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        with child.stdout:
            child.stdout.readline()
            time.sleep(wait_s)
            child.kill()
            child.wait()
        store = RowStore(tmp_path / "s", value_bytes=2000, max_bytes=2**20)
        kept = 0
        for seed in range(50):
            keys, values = some(16, 2000, seed)
            found, got = store.get(keys)
            assert (got[found] == values[found]).all()
            kept += int(found.sum())
        assert kept >= 16
        store.close()


# --------------------------------------------------------------------------------------------- top-k


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 * KL summed over everything, from probabilities."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
def test_the_buckets_have_the_probabilities_of_all_classes(temperature: float) -> None:
    logits = torch.randn(3, 5, 50, dtype=torch.float64) * 3
    buckets, ids = compress(logits, 7, temperature)
    assert buckets.shape == (3, 5, 8) and ids.shape == (3, 5, 7)
    order = logits.argsort(-1, descending=True)
    assert torch.equal(ids, order[..., :7])
    truth = (logits / temperature).softmax(-1).gather(-1, order)
    expected = torch.cat([truth[..., :7], truth[..., 7:].sum(-1, keepdim=True)], -1)
    torch.testing.assert_close((buckets / temperature).softmax(-1), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_over_buckets_has_the_gradient_of_full_kl_for_the_kept_logits(
    temperature: float,
) -> None:
    teacher, student = torch.randn(2, 4, 30, dtype=torch.float64)
    student.requires_grad_()
    buckets, ids = compress(teacher, 6, temperature)
    (found,) = torch.autograd.grad(
        kl(buckets, coarsen(student, ids, temperature), temperature), student
    )
    p, q = (teacher / temperature).softmax(-1), (student.detach() / temperature).softmax(-1)
    expected = temperature * (q - p)
    torch.testing.assert_close(found.gather(-1, ids), expected.gather(-1, ids))
    torch.testing.assert_close(found.sum(-1), torch.zeros(4, dtype=torch.float64))


def test_the_tail_bucket_is_unbiased_where_renormalised_top_k_is_not() -> None:
    teacher = torch.randn(4, 100, dtype=torch.float64)
    student = teacher.clone().requires_grad_()
    buckets, ids = compress(teacher, 10)
    (ours,) = torch.autograd.grad(kl(buckets, coarsen(student, ids), 1.0), student)
    assert ours.abs().max() < 1e-14
    # the usual form: the teacher's top k renormalised, against the student's whole softmax
    p = teacher.gather(-1, ids).softmax(-1)
    log_q = student.log_softmax(-1).gather(-1, ids)
    (naive,) = torch.autograd.grad((p * (p.log() - log_q)).sum(), student)
    rest = torch.ones_like(naive).scatter(-1, ids, 0).bool()
    assert (naive[rest] > 1e-4).all(), "pushes every class of the tail down"
    assert (naive.gather(-1, ids) < -1e-4).all(), "and every kept one up, though all is right"


def test_buckets_are_finite_at_extremes_and_in_half_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.tensor([[1e4, -1e4, 0.0, 1e4, -1e4]]).to(dtype)
        student = logits.flip(-1).clone().requires_grad_()
        buckets, ids = compress(logits, 2)
        coarse = coarsen(student, ids)
        assert buckets.dtype == coarse.dtype == torch.float32
        assert buckets.isfinite().all() and coarse.isfinite().all()
        loss = F.kl_div(
            coarse.log_softmax(-1), buckets.log_softmax(-1), reduction="sum", log_target=True
        )
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.isfinite().all()


def test_top_k_says_what_it_needs() -> None:
    for k in (0, 5, 9):
        with pytest.raises(ValueError, match=r"`k` must be.*Found: k=\d, 5 classes.*Do:"):
            compress(torch.zeros(2, 5), k)
    with pytest.raises(ValueError, match="temperature"):
        compress(torch.zeros(2, 5), 2, 0.0)
    with pytest.raises(ValueError, match=r"Found: logits \(2, 5\), ids \(3, 2\)"):
        coarsen(torch.zeros(2, 5), torch.zeros(3, 2, dtype=torch.int64))


# --------------------------------------------------------------------------------------------- cache


def test_known_rows_cost_no_teacher_forward_and_give_the_same_bits(tmp_path: Path) -> None:
    cache, teacher = opened(tmp_path / "c"), Teacher()
    x = torch.randn(16, 6)
    expected = teacher.expected(x)
    teacher.rows = 0
    first = cache.look_up((x,), {}, teacher)["logits"]
    assert torch.equal(first, expected) and first.dtype == torch.float32 and teacher.rows == 16
    order = torch.randperm(16)
    assert torch.equal(cache.look_up((x[order],), {}, teacher)["logits"], expected[order])
    assert teacher.rows == 16 and cache.hits == 16 and cache.rows == 32 and cache.hit_rate == 0.5
    later = opened(tmp_path / "c")
    assert torch.equal(later.look_up((x[3:5],), {}, teacher)["logits"], expected[3:5])
    assert teacher.rows == 16, "another process, another batch size"


def test_only_missing_rows_are_run_and_each_once(tmp_path: Path) -> None:
    cache, teacher = opened(tmp_path / "c"), Teacher()
    x = torch.randn(8, 6)
    cache.look_up((x[:4],), {}, teacher)
    seen: list[Tensor] = []

    def spy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        seen.append(args[0])
        assert kwargs["scale"].shape == (3,) and len(kwargs["rows"]) == len(args[0])
        return teacher(args, kwargs)

    mixed = torch.stack([x[5], x[0], x[6], x[5], x[5]])
    extra: dict[str, Any] = {"scale": torch.ones(3), "rows": torch.zeros(5, 2)}
    assert torch.equal(cache.look_up((mixed,), extra, spy)["logits"], teacher.expected(mixed))
    assert torch.equal(seen[0], torch.stack([x[5], x[0], x[6]])), "keywords are part of the key"
    mixed = torch.stack([x[7], x[6], x[7], x[1], x[0]])
    assert torch.equal(cache.look_up((mixed,), extra, spy)["logits"], teacher.expected(mixed))
    assert torch.equal(seen[1], torch.stack([x[7], x[1]]))


def test_one_changed_bit_another_teacher_and_other_settings_are_misses(tmp_path: Path) -> None:
    teacher, x = Teacher(), torch.randn(4, 6)
    opened(tmp_path / "c").look_up((x,), {}, teacher)
    changed = x.clone()
    changed.view(torch.int32)[2, 3] ^= 1
    teacher.rows = 0
    opened(tmp_path / "c").look_up((changed,), {}, teacher)
    assert teacher.rows == 1
    for fingerprint, options in (
        ("another", {}),
        ("teacher", {"dtype": "float32"}),
        ("teacher", {"top_k": 2}),
    ):
        teacher.rows = 0
        opened(tmp_path / "c", fingerprint, **options).look_up((x,), {}, teacher)
        assert teacher.rows == 4, (fingerprint, options)
    cache = TeacherCache(tmp_path / "c", top_k=2, check_every_n_calls=None)
    cache.open("teacher", temperature=4.0)
    teacher.rows = 0
    cache.look_up((x,), {}, teacher)
    assert teacher.rows == 4, "the tail belongs to a temperature"
    cache = TeacherCache(tmp_path / "c", check_every_n_calls=None)
    cache.open("teacher", temperature=4.0)
    teacher.rows = 0
    cache.look_up((x,), {}, teacher)
    assert teacher.rows == 0, "without a tail the temperature does not matter"


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES[:-1]), min_size=4, max_size=4),
    stored=st.sampled_from(["float16", "bfloat16", "float32"]),
    batch=st.integers(1, 6),
)
def test_answers_of_any_shape_and_type_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[list[int]],
    dtypes: list[torch.dtype],
    stored: str,
    batch: int,
) -> None:
    draw = torch.Generator().manual_seed(batch)
    truth = {
        f"tap.{i}": (torch.randn(batch, *shape, generator=draw) * 9).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    x = torch.arange(float(batch))
    cache = opened(tmp_path_factory.mktemp("c"), dtype=stored, max_bytes=2 * MIB)
    rows = lambda args, kwargs: {n: t[args[0].long()] for n, t in truth.items()}  # noqa: E731
    cache.look_up((x[: batch // 2],), {}, rows) if batch > 1 else None
    for answer in (cache.look_up((x,), {}, rows), cache.look_up((x,), {}, rows)):
        assert answer.keys() == truth.keys()
        for name, tensor in truth.items():
            rounded = (
                tensor.to(getattr(torch, stored)).float() if tensor.is_floating_point() else tensor
            )
            assert torch.equal(answer[name], rounded) and answer[name].dtype == rounded.dtype
    if any(tensor.numel() for tensor in truth.values()):
        assert cache.hits >= batch


@pytest.mark.parametrize("classes", [20, 40_000, 70_000])
def test_with_top_k_a_hit_gives_buckets_and_classes(tmp_path: Path, classes: int) -> None:
    cache = TeacherCache(tmp_path / "c", top_k=4)
    cache.open("teacher", temperature=2.0)
    logits = torch.randn(3, 2, classes)
    run = lambda args, kwargs: {"logits": logits[args[0]]}  # noqa: E731
    rows = torch.arange(3)
    buckets, ids = compress(logits, 4, 2.0)
    for _ in range(2):
        answer = cache.look_up((rows,), {}, run)
        assert torch.equal(answer["logits"], buckets.half().float())
        assert torch.equal(answer["logits_ids"], ids) and answer["logits_ids"].dtype == torch.int64
    assert cache.hit_rate == 0.5


def test_top_k_of_few_classes_keeps_all_logits(tmp_path: Path) -> None:
    cache, teacher = opened(tmp_path / "c", top_k=5), Teacher(outputs=5)
    answer = cache.look_up((torch.randn(2, 6),), {}, teacher)
    assert answer.keys() == {"logits"} and answer["logits"].shape == (2, 5)


def test_rows_that_float16_cannot_hold_are_used_as_they_are_and_not_stored(tmp_path: Path) -> None:
    cache, asked = opened(tmp_path / "c"), []
    logits = torch.tensor([[1.0, 2.0], [70_000.25, 0.1], [float("inf"), 0.0], [0.1, 0.2]])

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        asked.append(args[0].tolist())
        return {"logits": logits[args[0]]}

    expected = logits.clone()
    expected[3] = expected[3].half().float()
    for _ in range(2):
        assert torch.equal(cache.look_up((torch.arange(4),), {}, run)["logits"], expected)
    assert asked == [[0, 1, 2, 3], [1, 2]]


def test_shorter_sequences_have_a_store_of_their_own(tmp_path: Path) -> None:
    cache, teacher = opened(tmp_path / "c"), Teacher()
    batches = [torch.randn(3, length, 6) for length in (4, 7, 4, 2)]
    for x in batches:
        cache.look_up((x,), {}, teacher)
    teacher.rows = 0
    for one in (cache, opened(tmp_path / "c")):
        for x in batches:
            assert torch.equal(one.look_up((x,), {}, teacher)["logits"], Teacher().expected(x))
    assert teacher.rows == 0
    assert len(list(tmp_path.rglob("meta.json"))) == 3


def test_answers_whose_form_depends_on_a_flag_are_kept_apart(tmp_path: Path) -> None:
    cache = opened(tmp_path / "c")
    x, runs = torch.randn(3, 6), []

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        runs.append(kwargs)
        return {"logits": args[0].sum(1)} | ({"tap": args[0]} if kwargs["taps"] else {})

    for _ in range(2):
        for taps in (True, False):
            answer = cache.look_up((x,), {"taps": taps}, run)
            assert ("tap" in answer) == taps
    assert len(runs) == 2


def test_the_cache_gives_the_device_and_no_gradient(tmp_path: Path) -> None:
    cache = opened(tmp_path / "c")
    x = torch.randn(3, 6, requires_grad=True)
    for _ in range(2):
        answer = cache.look_up((x,), {}, Teacher())["logits"]
        assert not answer.requires_grad and answer.device == x.device


def test_a_hit_rate_below_the_minimum_after_the_first_views_switches_it_off(tmp_path: Path) -> None:
    cache, teacher = (
        TeacherCache(tmp_path / "c", min_hit_rate=0.5, check_every_n_calls=None),
        Teacher(),
    )
    cache.open("teacher", views=2)
    for _ in range(2):
        cache.look_up((torch.randn(4, 6),), {}, teacher)
        assert cache.end_epoch() is None and cache.rows == cache.hits == 0
    x = torch.randn(4, 6)
    cache.look_up((x,), {}, teacher)
    cache.look_up((x,), {}, teacher)
    assert cache.end_epoch() is None and cache.enabled, "0.5 is not below 0.5"
    cache.look_up((torch.randn(4, 6),), {}, teacher)
    reason = cache.end_epoch()
    assert reason is not None and "Found: 0.0% of 4 rows in epoch 4" in reason and "Do:" in reason
    assert not cache.enabled and cache.end_epoch() is None
    teacher.rows = 0
    assert torch.equal(cache.look_up((x,), {}, teacher)["logits"], Teacher().expected(x))
    assert teacher.rows == 4 and cache.rows == 0
    cache.open("teacher")
    assert cache.enabled


def test_an_epoch_without_rows_is_not_judged(tmp_path: Path) -> None:
    cache = opened(tmp_path / "c")
    assert [cache.end_epoch() for _ in range(5)] == [None] * 5
    assert cache.enabled


def fill(teacher: Teacher, folder: Path) -> list[str]:
    """Look rows up, some twice, in a cache whose disk fails; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = opened(folder)
        for seed in (1, 2, 1, 3):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(cache.look_up((x,), {}, teacher)["logits"], teacher.expected(x))
        assert not cache.enabled and cache.end_epoch() is None
        cache.close()
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("name", ["connect", "replace", "makedirs"])
def test_an_error_of_the_disk_is_one_warning_and_right_answers_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*args: Any, **options: Any) -> None:
        if name == "connect":
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        raise OSError(errno.ENOSPC, "No space left on device")

    if name == "makedirs":
        (tmp_path / "c").write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(sqlite3 if name == "connect" else os, name, full)
    (message,) = fill(Teacher(), tmp_path / "c")
    assert (
        "cannot be used" in message and "Found: [Errno" in message and "Do: free space" in message
    )
    assert not list(tmp_path.rglob("*.sqlite"))


def test_a_disk_that_fills_up_in_mid_training_is_one_warning(tmp_path: Path) -> None:
    cache, teacher = opened(tmp_path / "c"), Teacher()
    x = torch.randn(8, 6)
    cache.look_up((x,), {}, teacher)
    (store,) = cache._stores.values()
    assert store._file is not None
    store._file.execute("PRAGMA max_page_count = 1").fetchall()  # what SQLite has is all it gets
    y = torch.randn(2000, 6)
    with pytest.warns(UserWarning, match=r"cannot be used.*No space left.*Do:"):
        answer = cache.look_up((y,), {}, teacher)["logits"]
    assert torch.equal(answer, teacher.expected(y)) and not cache.enabled


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux"
    or subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0,
    reason="no disk of one's own may be mounted here",
)
def test_a_real_disk_that_is_full_is_one_warning(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from test_distillation_cache import Teacher, fill
print(*fill(Teacher(), Path({str(tmp_path / "disk/c")!r})), sep="|")
"""
    (tmp_path / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=24k tmpfs "$1" && exec "$2" -c "$3"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "-", str(tmp_path / "disk"), sys.executable, script],
        capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be used") == 1 and "No space left" in done.stdout


@pytest.mark.slow
def test_a_real_limit_of_the_file_size_is_one_warning_and_no_signal(tmp_path: Path) -> None:
    script = f"""
import resource, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from test_distillation_cache import Teacher, fill
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
print(*fill(Teacher(), Path({str(tmp_path / "c")!r})), sep="|")
"""
    done = run_child(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be used") == 1 and "disk I/O error" in done.stdout


_WORKER = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_distillation_cache import Teacher, opened
torch.set_num_threads(1)
cache, teacher, number = opened(Path({folder!r}), max_bytes={limit}), Teacher(), int(sys.argv[1])
draw = torch.Generator().manual_seed(number)
x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
truth = teacher.expected(x)
teacher.rows = 0
sys.stdin.readline()
for step in range(60):
    rows = torch.randint(0, 400, (32,), generator=draw)
    assert torch.equal(cache.look_up((x[rows],), {{}}, teacher)["logits"], truth[rows]), step
assert cache.enabled
print(teacher.rows)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "limit"), [(2, 70_000), (4, MIB)])
def test_processes_on_one_cache_at_once_get_the_bits_of_the_teacher(
    tmp_path: Path, processes: int, limit: int
) -> None:
    script = _WORKER.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "c"), limit=limit)
    counts = [int(text) for text in together(script, processes)]
    assert bytes_in(tmp_path) <= limit
    if limit == MIB:
        assert sum(counts) < 400 * processes, "they learned from each other"
        later, teacher = opened(tmp_path / "c"), Teacher()
        x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
        later.look_up((x,), {}, teacher)
        assert teacher.rows < 20


def test_answers_of_teachers_long_unused_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        opened(tmp_path, f"teacher {number}").look_up((torch.randn(4, 6),), {}, Teacher())
    limit = bytes_in(tmp_path)
    marks = {json.loads(p.read_text())["fingerprint"]: p for p in tmp_path.glob("*/teacher.json")}
    for age, number in ((90_000, 1), (100_000, 0)):
        os.utime(marks[f"teacher {number}"], (time.time() - age,) * 2)
    stranger = tmp_path / "notes"
    stranger.mkdir()
    (stranger / "teacher.json").write_text("not ours")
    os.utime(stranger / "teacher.json", (0, 0))
    opened(tmp_path, "new", max_bytes=limit)
    assert not marks["teacher 0"].exists() and not marks["teacher 1"].exists()
    assert marks["teacher 2"].exists() and marks["teacher 3"].exists(), "in use within a day"
    assert stranger.exists()
    assert bytes_in(tmp_path) <= limit


def test_a_damaged_layout_on_disk_is_not_believed(tmp_path: Path) -> None:
    cache, teacher, x = opened(tmp_path / "c"), Teacher(), torch.randn(3, 6)
    cache.look_up((x,), {}, teacher)
    cache.close()
    (meta,) = (tmp_path / "c").rglob("meta.json")
    meta.write_text(meta.read_text().replace("float16", "bfloat16"))
    teacher.rows = 0
    cache = opened(tmp_path / "c")
    assert len(list(tmp_path.rglob("meta.json"))) == 1
    with pytest.warns(UserWarning, match="does not describe"):
        answer = cache.look_up((x,), {}, teacher)["logits"]
    assert torch.equal(answer, Teacher().expected(x)) and teacher.rows == 3
    assert torch.equal(cache.look_up((x,), {}, teacher)["logits"], answer) and cache.hits == 3


def test_a_copy_of_a_cache_is_configured_alike_and_closed(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "c", max_bytes=MIB, top_k=3, dtype="bfloat16", min_hit_rate=0.5)
    for _ in range(2):
        through_torch = io.BytesIO()
        torch.save(cache, through_torch)
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):  # noqa: S301
            assert vars(twin) == vars(TeacherCache(tmp_path / "c", **{
                name: getattr(cache, name)
                for name in ("max_bytes", "top_k", "dtype", "min_hit_rate", "check_every_n_calls")
            }))  # fmt: skip
        cache.open("teacher")
        cache.look_up((torch.randn(2, 6),), {}, Teacher())
    with pytest.raises(AccelError, match="closed.*Do: call `open`"):
        twin.look_up((torch.randn(2, 6),), {}, Teacher())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_bytes": 0}, "`max_bytes`"),
        ({"top_k": 0}, "`top_k`"),
        ({"dtype": "int8"}, r"`dtype`.*Found: 'int8'.*float16"),
        ({"min_hit_rate": 5}, "`min_hit_rate`.*Found: 5.*Do: pass one"),
    ],
)
def test_bad_settings_are_refused_with_what_to_do(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TeacherCache("c", **options)


def test_answers_without_the_rows_first_are_refused(tmp_path: Path) -> None:
    cache, x = opened(tmp_path / "c"), torch.randn(3, 6)
    for bad in ({"loss": torch.zeros(())}, {"logits": torch.zeros(2, 3)}, {}):
        with pytest.raises(ValueError, match=r"3 rows as their first dimension.*Found:.*Do:"):
            cache.look_up((x,), {}, lambda args, kwargs, bad=bad: bad)  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"rows cannot be counted"):
        cache.look_up((3, "a"), {}, Teacher())


def test_a_packed_answer_marks_rows_by_the_type_on_disk() -> None:
    tensors = {"a": torch.tensor([[1e5], [1.0]]), "b": torch.tensor([[1], [2]])}
    assert Answer.of(tensors, torch.float16).finite.tolist() == [False, True]
    assert Answer.of(tensors, torch.bfloat16).finite.tolist() == [True, True]


# --------------------------------------------------------------------------------------------- views


class Noise(Dataset):
    """Ten items of pure chance from all three generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index % 10, random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_sample_has_a_finite_number_of_views_that_come_again() -> None:
    data = SeededViews(Noise(), 3, seed=1)
    seen = []
    for epoch in range(6):
        data.set_epoch(epoch)
        seen.append([data[i] for i in range(10)])
    assert seen[:3] == seen[3:]
    flat = [draw for epoch in seen[:3] for item in epoch for draw in item[1:]]
    assert len(set(flat)) == 90, "all draws differ between items, epochs and generators"
    assert data[-1] == data[9]
    assert SeededViews(Noise(), 3, seed=2)[0] != SeededViews(Noise(), 3, seed=1)[0]


def test_drawing_a_view_leaves_the_random_states_as_they_were() -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draws() + draws()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    found = draws()
    SeededViews(Noise(), 2)[3]

    class Broken(Noise):
        def __getitem__(self, index: int) -> Any:
            draws()
            raise KeyError(index)

    with pytest.raises(KeyError):
        SeededViews(Broken(), 2)[3]
    assert found + draws() == expected


@pytest.mark.slow
def test_workers_that_live_on_see_the_epoch() -> None:
    data = SeededViews(Noise(), 2)
    loader = DataLoader(data, batch_size=5, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in range(3):
        data.set_epoch(epoch)
        epochs.append([batch[3].tolist() for batch in loader])
    assert epochs[0] == epochs[2] != epochs[1]
    data.set_epoch(0)
    assert epochs[0] == [[data[i][3] for i in part] for part in (range(5), range(5, 10))]


def test_seeded_views_give_the_cache_its_hits(tmp_path: Path) -> None:
    class Crops(Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Tensor:
            return torch.arange(6.0) + index + torch.rand(6)

    data, cache, teacher = SeededViews(Crops(), 2), opened(tmp_path / "c"), Teacher()
    cache.open("teacher", views=2)
    rates = []
    for epoch in range(5):
        data.set_epoch(epoch)
        for batch in DataLoader(data, batch_size=3, shuffle=True):
            cache.look_up((batch,), {}, teacher)
        rates.append(cache.hit_rate)
        assert cache.end_epoch() is None
    assert rates == [0, 0, 1, 1, 1] and teacher.rows == 16


def test_seeded_views_refuse_what_has_no_items() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([])

        def __len__(self) -> int:
            return 0

    with pytest.raises(TypeError, match=r"Found: Stream.*Do:"):
        SeededViews(Stream(), 2)
    with pytest.raises(ValueError, match="`views`"):
        SeededViews(Noise(), 0)


def test_tiny_features_are_never_rounded_to_nothing(tmp_path: Path) -> None:
    rows = torch.randn(6, 5)
    rows[:3] *= 1e-8  # below what float16 can tell from zero
    rows[0] = 0.0
    cache = TeacherCache(tmp_path)
    cache.open("teacher")
    for known in (0, 4):  # zeros and what float16 holds
        cache.hits = 0
        found = cache.look_up((rows,), {}, lambda args, kwargs: {"0:body": args[0]})["0:body"]
        torch.testing.assert_close(found, rows, rtol=1e-3, atol=0.0)
        assert cache.hits == known
