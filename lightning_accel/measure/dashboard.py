"""The report on the page of a W&B run: a table, a chart of the gains, the summary that runs are compared by, and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_accel.measure.report import Report
from lightning_accel.measure.table import show


def to_wandb(logger: Any, report: Report, step: int) -> None:
    """Draw and summarise a report; what is withheld is in none of it.

    Args:
        logger: Lightning's `WandbLogger`.
        report: What to show.
        step: Steps trained. All goes through the logger, which writes it down as such: W&B's own step goes up
            with every call (wandb #5913).
    """
    import wandb

    table = report.table()
    rows = [[show(cell) for cell in row] for row in table.rows]
    logger.log_table("report/table", columns=["quantity", *table.columns[1:]], data=rows)
    gains = wandb.Table(
        columns=["quantity", "gain"], data=[list(g) for g in report.gains().items()]
    )
    title = "How many times less or faster than the dense model"
    chart = wandb.plot.bar(gains, "quantity", "gain", title=title)
    logger.log_metrics({"report/gains": chart}, step=step)
    logger.experiment.summary.update(report.flat())


def to_artifact(logger: Any, report: Report, files: Sequence[Path]) -> None:
    """Keep what a fit left as an artifact of its run, with what was done to the network and what it gave.

    Args:
        logger: Lightning's `WandbLogger`.
        report: Its numbers, edits and notes are the metadata.
        files: Files, and folders such as a bundle.
    """
    import wandb

    about = {
        **report.flat(),
        "edits": report.extra.get("edits", []),
        "notes": report.extra.get("notes", []),
    }
    artifact = wandb.Artifact(f"accel-{logger.experiment.id}", "model", metadata=about)
    for path in dict.fromkeys(files):
        if path.is_dir():
            artifact.add_dir(str(path), name=path.name)
        else:
            artifact.add_file(str(path), name=path.name)
    logger.experiment.log_artifact(artifact)
