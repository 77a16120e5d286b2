"""Modules for tensor parallelism: those of `sharded`, and others whose widths are hard to split."""

from __future__ import annotations

from sharded import CASES as SHARDED
from sharded import Case

CASES: dict[str, Case] = {name: case for name, case in SHARDED.items() if not case.by_ddp and not case.strategy}
