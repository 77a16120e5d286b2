"""What the teacher said, on disk, so that an input row it has seen costs no teacher forward.

An answer is found by the content of the input row (`keys`), so an augmentation, another order or
another batch cannot give a wrong one: what differs by a bit is another row. An answer is kept in
float16 by default, and one that was just computed goes through the same rounding, so a hit and a miss
give the same bits. Large vocabularies keep the `top_k` largest logits and the tail (`topk`).

A folder that others can write is safe to use, and shared by one's own processes alone: see `seal`.

    <folder>/<teacher>/teacher.json          fingerprint and settings, one folder for each teacher
    <folder>/<teacher>/<layout>/meta.json    names, shapes and types of one row
    <folder>/<teacher>/<layout>/rows.sqlite  rows (`row_store`), shared by all processes
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_accel.arguments import one_of, path, share, whole
from lightning_accel.distillation.row_store import SCHEMA, RowStore, bytes_in
from lightning_accel.errors import AccelError, explain
from lightning_accel.seal import own_folder, put, sealed, secret
from lightning_accel.seldom import check_seldom

from .answers import Answer, RowLayout, digest, short_ids
from .checks import EXACT, Checks, alike, try_rows
from .folder import layouts_in, remove_unused
from .keys import row_keys
from .topk import compress

Run = Callable[[tuple[Any, ...], dict[str, Any]], Mapping[str, Tensor]]

StoredIn = Literal["float16", "bfloat16", "float32"]
DTYPES = get_args(StoredIn)
_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_ROUNDING = 2.0**-7
"""Of the shortest type on disk."""


class TeacherCache:
    """Answers of a frozen teacher on disk, found by the content of each input row.

    The teacher must treat rows independently of each other (`eval` mode), and draw no random numbers; both is
    tried now and then, and a cache that may not be used switches itself off with a warning. A tensor argument
    whose first dimension equals the batch is taken to hold one entry for each row.

    Args:
        folder: Where; several processes and several teachers may share it.
        max_bytes: What the whole folder may take; when it is full, new rows replace old ones.
        top_k: Keep this many of the answer "logits" and the tail; all of them when None.
        dtype: What floating-point answers are rounded to: "float16", "bfloat16" or "float32".
        min_hit_rate: Share of rows, 0..1, below which an epoch switches the cache off.
        check_every_n_calls: At how many look-ups the teacher runs all the same, on the whole batch and on a part of it,
            besides the first, second, fourth, eighth ... None for never.

    Raises:
        ValueError: An argument is out of range.

    >>> import tempfile
    >>> teacher = torch.nn.Linear(4, 3)
    >>> cache = TeacherCache(tempfile.mkdtemp())
    >>> cache.open("what identifies the teacher")
    >>> run = lambda args, kwargs: {"logits": teacher(*args)}
    >>> rows = torch.randn(8, 4)
    >>> first, again = (cache.look_up((rows,), {}, run)["logits"] for _ in range(2))
    >>> torch.equal(first, again), cache.hit_rate
    (True, 0.5)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_bytes: int = 4 * 2**30,
        top_k: int | None = None,
        dtype: StoredIn = "float16",
        min_hit_rate: float = 0.05,
        check_every_n_calls: int | None = 1000,
    ) -> None:
        self.folder = path("folder", folder)
        self.max_bytes = whole("max_bytes", max_bytes)
        self.top_k = whole("top_k", top_k, none=True)
        self.dtype = one_of("dtype", dtype, DTYPES)
        self.min_hit_rate = share("min_hit_rate", min_hit_rate)
        self.check_every_n_calls = check_seldom(check_every_n_calls)
        self.hits = 0
        self.rows = 0
        self._enabled = True
        self._epochs = 0
        self._views = 1
        self._temperature, self._tolerance = 1.0, EXACT
        self._checks: Checks | None = None
        self._home: Path | None = None
        self._salt = self._key = b""
        self._stores: dict[RowLayout, RowStore] = {}
        self._known: dict[Any, list[RowLayout]] = {}

    @property
    def enabled(self) -> bool:
        """Whether answers are looked up; False after an error of the disk or too few hits."""
        return self._enabled

    @property
    def hit_rate(self) -> float:
        """The share of this epoch's rows that cost no teacher forward, 0 before the first."""
        return self.hits / self.rows if self.rows else 0.0

    def open(
        self,
        fingerprint: str,
        *,
        temperature: float = 1.0,
        views: int = 1,
        tolerance: float = EXACT,
    ) -> None:
        """Use the answers of one teacher.

        Args:
            fingerprint: What identifies the teacher: its weights, its structure, its taps.
            temperature: Where the loss will compare; matters with `top_k`, whose tail depends on it.
            views: Epochs in which every row may be new, before the hit rate is judged.
            tolerance: How much of its largest number an answer may differ by from one batch to another.
        """
        self.close()
        self._tolerance, self._checks = tolerance, Checks(self.check_every_n_calls)
        self._enabled, self._epochs, self._views = True, 0, views
        self.hits = self.rows = 0
        self._temperature = temperature if self.top_k else 1.0
        try:
            self._key = secret()
        except AccelError as error:
            self._give_up(error)
        about = {
            "schema": SCHEMA,
            "user": sealed(self._key, b"user").hex()[:16],
            "fingerprint": fingerprint,
            "dtype": self.dtype,
            "top_k": self.top_k,
            "temperature": self._temperature,
        }
        self._salt = json.dumps(about, sort_keys=True).encode()
        self._home = self.folder / digest(self._salt)
        if not self._enabled:
            return
        try:
            put(own_folder(self._home) / "teacher.json", self._salt)
            remove_unused(self.folder, self._home, self.max_bytes // 2)
            for layout in layouts_in(self._home, self._seal):
                self._store(layout)
        except OSError as error:
            self._give_up(error)

    def look_up(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], run: Run
    ) -> dict[str, Tensor]:
        """Return the teacher's answers to a call, from the disk where it has seen the row.

        Args:
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.
            run: Runs the teacher on arguments of the same form with fewer rows, and returns tensors
                that have the rows as their first dimension. It is not called when all rows are known.

        Returns:
            The tensors of `run`, detached and on the device of the first argument, floating-point
            ones rounded to `dtype` and given as float32. With `top_k`, "logits" of shape
            (batch, ..., k+1) and "logits_ids" of shape (batch, ..., k), unless there are at most k
            classes.

        Raises:
            AccelError: The cache was not opened.
            TypeError: An argument's content cannot be hashed.
            ValueError: No argument is a tensor, or an answer does not have the rows first.
        """
        if self._home is None:
            raise AccelError("the teacher cache is closed", "", "call `open` before `look_up`")
        args, kwargs = tuple(args), dict(kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        first = next((tensor for tensor in tensors if tensor.dim()), None)
        if first is None:
            raise ValueError(explain("the teacher's rows cannot be counted", "no tensor argument"))
        _refuse_packed(args, kwargs)
        batch = first.shape[0]
        if not self._enabled:
            return Answer.of(self._ask(run, args, kwargs, batch), self._stored).unpack()
        keys = row_keys(args, kwargs, batch=batch, salt=self._salt)
        form = tuple((tuple(t.shape[1:]), t.dtype) for t in tensors)
        layout, found, values = self._read(form, keys)
        self.rows += batch
        self.hits += int(found.sum())
        if self._checks is not None and self._checks.are_due(form, batch):
            return self._look_up_and_try(form, keys, (args, kwargs), run, (layout, found, values))
        if layout is not None and found.all():
            return layout.unpack(torch.from_numpy(values).to(first.device))
        rows, place = _first_of_each(keys, np.flatnonzero(~found))
        answer = Answer.of(
            self._ask(run, *_pick((args, kwargs), rows, batch), len(rows)), self._stored
        )
        if layout not in (None, answer.layout):  # cannot be, as both come from the same call
            answer, found[:] = Answer.of(self._ask(run, args, kwargs, batch), self._stored), False
            rows = place = np.arange(batch)
        self._learn(form, answer, keys[rows])
        return answer.spread(place, found, values)

    def step_aside(self, why: str) -> None:
        """Look nothing up any more, and say why: the teacher is one that no file can stand for."""
        self._enabled = False
        warnings.warn(
            explain(
                "the teacher's answers cannot be cached, so it runs on every row now",
                why,
                "pass a teacher whose answer to a row depends on that row alone, or `cache=None`",
            ),
            stacklevel=4,
        )

    def end_epoch(self) -> str | None:
        """Begin another epoch; return why the cache switched itself off, if it did now."""
        rate, rows = self.hit_rate, self.rows
        self.hits = self.rows = 0
        self._epochs += 1
        if not self._enabled or not rows or self._home is None:
            return None
        try:
            os.utime(self._home / "teacher.json", follow_symlinks=False)
        except OSError as error:
            self._give_up(error)
            return str(error)
        if self._epochs <= self._views or rate >= self.min_hit_rate:
            return None
        self._enabled = False
        size = bytes_in(self.folder) / 2**20
        return explain(
            "the teacher cache switched itself off, as too few rows were known",
            f"{rate:.1%} of {rows} rows in epoch {self._epochs}, {size:.0f} MiB on disk",
            "give each sample a finite number of views (`SeededViews`), give the teacher no argument that differs from "
            "step to step beside its rows, or raise `max_bytes`",
        )

    def close(self) -> None:
        """Let go of all files; what was written stays."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()
        self._known.clear()
        self._home = None

    def __getstate__(self) -> dict[str, Any]:
        names = ("folder", "max_bytes", "top_k", "dtype", "min_hit_rate", "check_every_n_calls")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a copy is configured alike, and closed

    @property
    def _stored(self) -> torch.dtype:
        return _STORED[self.dtype]

    def _look_up_and_try(
        self,
        form: Any,
        keys: np.ndarray,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        run: Run,
        known: tuple[RowLayout | None, np.ndarray, np.ndarray],
    ) -> dict[str, Tensor]:
        """Let the teacher answer the whole batch, and compare: with a part of it, and with what is on disk."""
        layout, found, values = known
        batch = len(keys)
        tried = try_rows(
            lambda rows: _checked(run(*_pick(call, rows, batch)), len(rows)), batch, self._tolerance
        )
        answer = Answer.of(self._ask(lambda *_: tried.answers, *call, batch), self._stored)
        said, doubt = answer.unpack(), tried.doubt
        if doubt is None and layout is not None:
            there = torch.from_numpy(np.flatnonzero(found)).to(answer.packed.device)
            read = layout.unpack(torch.from_numpy(values[found]).to(there.device))
            same = layout == answer.layout and all(
                alike(said[name][there], read[name], self._tolerance + _ROUNDING)
                for name in said
                if said[name].is_floating_point()
            )
            doubt = None if same else f"what is on disk in {self._home} is not what it says"
        if doubt is not None:
            self.step_aside(doubt)
        else:
            self._learn(form, answer, keys)
        return said

    def _ask(
        self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
    ) -> dict[str, Tensor]:
        """Run the teacher, see that every answer has the rows first, and keep the top k."""
        answers = _checked(run(args, kwargs), rows)
        logits = answers.get("logits")
        if self.top_k and logits is not None and logits.shape[-1] > self.top_k:
            classes = logits.shape[-1]
            answers["logits"], ids = compress(logits, self.top_k, self._temperature)
            answers["logits_ids"] = short_ids(ids, classes)
        return answers

    def _read(self, form: Any, keys: np.ndarray) -> tuple[RowLayout | None, np.ndarray, np.ndarray]:
        """Look for rows among the layouts that fit; the form of the input tells which, once known."""
        try:
            for layout in self._known.get(form, list(self._stores)):
                found, values = self._stores[layout].get(keys)
                if found.any():
                    return layout, found, values
        except OSError as error:
            self._give_up(error)
        return None, np.zeros(len(keys), bool), np.empty((len(keys), 0), np.uint8)

    def _learn(self, form: Any, answer: Answer, keys: np.ndarray) -> None:
        """Put the rows of an answer on disk, those that are finite in the stored type."""
        if not self._enabled:
            return
        known = self._known.setdefault(form, [])
        if answer.layout not in known:
            known.append(answer.layout)
        try:
            store = self._store(answer.layout)
            if answer.finite.all():
                store.put(keys, answer.bytes_on_cpu())
            elif answer.finite.any():
                store.put(keys[answer.finite], answer.bytes_on_cpu()[answer.finite])
        except OSError as error:
            self._give_up(error)

    def _store(self, layout: RowLayout) -> RowStore:
        assert self._home is not None
        if layout not in self._stores:
            self._stores[layout] = RowStore(
                self._home / layout.digest,
                value_bytes=layout.row_bytes,
                max_bytes=self.max_bytes,
                about={**layout.about(), "seal": self._seal(layout).hex()},
                counted_in=self.folder,
                key=self._seal(layout),
            )
        return self._stores[layout]

    def _seal(self, layout: RowLayout) -> bytes:
        """Return what proves that a row of this layout, of this teacher, was written by this user."""
        return sealed(self._key, self._salt, layout.digest.encode())

    def _give_up(self, error: Exception) -> None:
        self._enabled = False
        warnings.warn(
            explain(
                f"the teacher cache in {self.folder} cannot be used; the teacher runs on every row now",
                f"{error}",
                "" if "Do: " in str(error) else "free space there or give it another folder",
            ),
            stacklevel=4,
        )


def _refuse_packed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise where an argument holds the rows of all sequences mixed together."""
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda v: isinstance(v, PackedSequence))
    if any(isinstance(leaf, PackedSequence) for leaf in leaves):
        raise TypeError(
            explain(
                "the rows of a packed sequence cannot be told apart, so the teacher's answers cannot be cached",
                "a PackedSequence among its arguments",
                "hand the network padded tensors and lengths and let it pack them, or leave the cache out",
            )
        )


def _checked(answers: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Return answers without their graph, after a look at whether each has the rows first."""
    answers = {name: tensor.detach() for name, tensor in answers.items()}
    wrong = {n: tuple(t.shape) for n, t in answers.items() if not t.dim() or len(t) != rows}
    if wrong or not answers:
        raise ValueError(
            explain(
                f"the teacher's answers must have the {rows} rows as their first dimension",
                ", ".join(f"`{n}` {shape}" for n, shape in wrong.items()) or "no answer",
                "tap what has one entry for each row, or leave the cache out",
            )
        )
    return answers


def _first_of_each(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows without those equal to an earlier one, and for each row its place among them."""
    seen: dict[bytes, int] = {}
    place = [seen.setdefault(keys[row].tobytes(), len(seen)) for row in rows]
    first = np.unique(np.asarray(place, np.int64), return_index=True)[1]
    return rows[first], np.asarray(place, np.int64)


def _pick(
    call: tuple[tuple[Any, ...], dict[str, Any]], rows: np.ndarray, batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the call with those rows alone."""
    if len(rows) == batch and (rows[1:] > rows[:-1]).all():
        return call

    def pick(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return leaf[torch.from_numpy(rows).to(leaf.device)]
        return leaf

    return pytree.tree_map(pick, call)
