"""The report on the page of a W&B run: a table, a chart of the gains, and the summary that runs are compared by."""

from __future__ import annotations

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
