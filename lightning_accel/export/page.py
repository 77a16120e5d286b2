"""What is said of a bundle: the table of its candidates, and the page that lies beside its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_accel.export.schema import Schema
from lightning_accel.measure.table import Table

_USES = {
    "export": "`torch.export.load('model.pt2').module()(...)`, with torch",
    "aoti": "`torch._inductor.aoti_load_package('model.aoti.pt2')(...)`, with this torch, on such a processor",
    "onnx": "`onnxruntime.InferenceSession('model.onnx')`, with ONNX Runtime, in many languages",
}


def table(content: Mapping[str, Any]) -> str:
    """Return the candidates with their numbers, to print."""
    return _table(content).to_text(width=120)


def page(content: Mapping[str, Any]) -> str:
    """Return the README of a bundle."""
    schema, host = Schema.from_dict(content["signature"]), content["host"]
    lines = [
        "# A trained network, ready to run",
        "",
        "```python",
        "from lightning_accel import load_bundle",
        "",
        "bundle = load_bundle('this folder')  # compares size and hash of each file first",
        f"answer = bundle.predict({', '.join(key for key, _ in schema.arguments['dict'])})",
        "```",
        "",
        "In:",
        "",
        *(f"- `{spec}`" for spec in schema.inputs),
        "",
        "Out:",
        "",
        *(f"- `{spec}`" for spec in schema.outputs),
        "",
        "Without this package, each with the inputs in the order above; do not open files from a stranger:",
        "",
        *(f"- `{file}`: {_USES[name]}" for name, file in content["formats"].items()),
        "",
        _table(content).to_markdown(),
        "",
        f"Measured on {host.get('machine')} ({host.get('capability')}), {host.get('threads')} threads, torch "
        f"{host.get('torch')}, Python {host.get('python')}. Every row was compared with the model on the same inputs; "
        "SQNR is the signal by the difference, `gain` time of the model by time of the format, both in one process in turn.",
        "",
    ]
    return "\n".join(lines)


def _table(content: Mapping[str, Any]) -> Table:
    rows = content["candidates"]
    sizes = list(dict.fromkeys(size for row in rows for size in row.get("paces", {})))
    metric = any(row.get("metric") is not None for row in rows)
    columns = ["format", "SQNR (dB)", "largest error", *(["metric"] if metric else [])]
    columns += [column for size in sizes for column in (f"batch {size} (ms)", "gain")]
    columns += ["size (kB)", ""]
    cells = []
    for row in rows:
        line: list[Any] = [row["format"], _decibels(row), row.get("max_abs_error")]
        line += [row.get("metric")] if metric else []
        for size in sizes:
            pace = row.get("paces", {}).get(size)
            gain = None if pace is None or row["format"] == "eager" else f"{pace['gain'][0]:.2f}x"
            line += [None if pace is None else pace["ms"], gain]
        line += [
            None if row.get("bytes") is None else row["bytes"] / 1e3,
            row.get("reason") or row.get("said", ""),
        ]
        cells.append(line)
    refused = [f"{row['format']} was refused: {row['reason']}" for row in rows if row.get("reason")]
    return Table(columns, cells, title=_title(content), notes=[*refused, *content["notes"]])


def _title(content: Mapping[str, Any]) -> str:
    best = content["format"]
    return (
        f"Best here: {best}"
        if content["faster"]
        else f"Nothing is faster than the model here; {best} is kept"
    )


def _decibels(row: Mapping[str, Any]) -> Any:
    if "num_inputs" not in row or row.get("max_abs_error") is None:
        return None
    return (
        "equal" if row.get("sqnr_db") is None and row["max_abs_error"] == 0 else row.get("sqnr_db")
    )
