"""Folders of runs as fits leave them, made up: what pages are tried on."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any


def report(
    seed: int = 0, *, layers: int = 6, epochs: int = 8, share: float = 0.5
) -> dict[str, Any]:
    """Return the report of a fit that was pruned to a share of its channels before the third epoch."""
    chance = random.Random(seed)
    names = [f"encoder.blocks.{i}.attention.output.dense" for i in range(layers - 1)] + ["head"]
    widths = [
        {
            "layer": name,
            "kind": "Linear",
            "before": 64 * 2 ** (i % 3),
            "after": 64 * 2 ** (i % 3) if name == "head" else int(share * 64 * 2 ** (i % 3)),
            "params_before": 4096,
            "params_after": int(4096 * share**2),
        }
        for i, name in enumerate(names)
    ]
    acc = [1 - 0.6 * math.exp(-0.5 * e) - 0.1 * share * (e == 3) for e in range(1, epochs + 1)]
    slower = 1.0 + chance.random()
    gain = 0.85 / share
    side = {
        "p10_ms": 10 * slower,
        "median_ms": 12.0 * slower,
        "p90_ms": 20 * slower,
        "num_calls": 9,
    }
    faster = {k: v / gain if k.endswith("ms") else v for k, v in side.items()}
    spread = {"dense": side, "final": faster, "ratio_low": gain * 0.9, "ratio_high": gain * 1.1}
    spread |= {"busy": 1.0, "left": 1.0, "spread_ms": 1.0}
    final = acc[-1] - 0.03 / share * chance.random()
    return {
        "dense": {
            "params": 4096 * layers,
            "macs": 10**7,
            "latency_ms": {"1": 1.0, "64": side["p10_ms"]},
            "steps_per_s": 10.0,
            "metrics": {"val/acc": acc[2] if epochs > 2 else acc[-1], "val/loss": 0.4},
        },
        "final": {
            "params": int(4096 * layers * share**2),
            "macs": int(10**7 * share**2),
            "latency_ms": {"1": 1.25, "64": faster["p10_ms"]},
            "steps_per_s": 10.0 / share,
            "metrics": {"val/acc": final, "val/loss": 0.3 + chance.random() / 10},
        },
        "ratios": {
            "params": 1 / share**2,
            "macs": 1 / share**2,
            "latency": {"1": 0.8, "64": gain},
            "steps_per_s": None,
        },
        "dense_metrics_after_epoch": 2,
        "notes": ["the final model is slower here: latency_1, 0.80x (between 0.75x and 0.85x)"],
        "edits": [{"epoch": 2, "step": 40, "num_changes": 3, "notes": [], "params": 9}],
        "world_size": 1,
        "precision": "bf16-mixed",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"kind": "cpu", "name": "AMD EPYC", "num_cores": 2, "fast_dtypes": ["bfloat16"]},
        "num_threads": 2,
        "spread": {
            "latency_64": spread,
            "latency_1": {**spread, "ratio_low": 0.75, "ratio_high": 0.85},
            "training_step": {**spread, "ratio_low": 1.2, "ratio_high": 4.0},
        },
        "schema": 2,
        "finished": "2026-11-30T12:00:00+00:00",
        "fit": {"seconds": 100.0, "epochs": epochs, "steps": 20 * epochs},
        "timeline": [
            {"technique": "AutocastPrecision", "epoch": 0, "step": 0, "settings": {"precision": "bf16-mixed"}},
            {
                "technique": "StructuredPruning",
                "epoch": 2,
                "step": 40,
                "settings": {"ratio": 1 - share, "when": 2},
                "num_changes": len(widths) - 1,
                "did": [f"{w['layer']}: pruned, {w['before']} -> {w['after']}" for w in widths[:-1]],
                "left_alone": ["head: it makes the network's output"],
                "notes": [f"{1 - share:.0%} of the channels are gone"],
            },
        ],
        "history": {
            "val/acc": [[e + 1, v] for e, v in enumerate(acc)],
            "train/acc": [[e + 1, min(1.0, v + 0.02)] for e, v in enumerate(acc)],
            "val/loss": [[e + 1, 2 * (1 - v) + 0.02] for e, v in enumerate(acc)],
            "train/loss": [[e + 1, 2 * (1 - v) + 0.001] for e, v in enumerate(acc)],
        },
        "widths": widths,
        "memory": {"dense_bytes": 4 * 4096 * layers, "final_bytes": 4096 * layers, "host_peak_bytes": 2**30},
        "environment": {"platform": "Linux", "strategy": "SingleDeviceStrategy", "packages": {"lightning": "2.6.6"}},
    }  # fmt: skip


def written(folder: Path, found: Any, overrides: list[str] | None = None) -> Path:
    """Write a run into a folder, as Hydra and `AccelReport` do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(found if isinstance(found, str) else json.dumps(found))
    if overrides is not None:
        (folder / ".hydra").mkdir(exist_ok=True)
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    return folder


def sweep(folder: Path, num: int = 12) -> Path:
    """Write the runs of a sweep over the share that is pruned."""
    for i in range(num):
        share = 0.9 - 0.7 * i / max(1, num - 1)
        words = ["+accel=amp_prune", f"callbacks.pruning.ratio={1 - share:.2f}"]
        written(folder / str(i), report(i, share=share), words)
    return folder
