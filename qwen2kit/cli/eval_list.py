"""``qwen2kit eval --list``: what can be evaluated with the data at hand, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen2kit.cli.output import console, emit_json
from qwen2kit.errors import ConfigError

if TYPE_CHECKING:
    from qwen2kit_evals.listing import SuiteOffer


def list_offers(datasets: Path | None, include_path: Path | None, json_output: bool) -> None:
    """Print suites and tasks; as JSON ``{"suites": [...], "tasks": [...]}``.

    Raises:
        ConfigError: no data directory was given.
    """
    from dataclasses import asdict

    from rich.table import Table

    from qwen2kit_evals.listing import available_tasks, suite_offers
    from qwen2kit_evals.local_data import LocalData
    from qwen2kit_evals.tasks import task_manager

    if datasets is None:
        raise ConfigError("--list shows what a data directory can serve; add --datasets DIR")
    data = LocalData(datasets)
    manager = task_manager(include_path)
    suites = suite_offers(data, manager)
    offers = available_tasks(data, manager)
    if json_output:
        emit_json(
            {
                "suites": [asdict(offer) for offer in suites],
                "tasks": [asdict(offer) for offer in offers],
            }
        )
        return
    for name in dict.fromkeys(offer.suite for offer in suites):
        _print_suite(name, [offer for offer in suites if offer.suite == name])
    table = Table(title=f"Tasks with data in {datasets}", title_justify="left")
    table.add_column("--tasks", no_wrap=True)
    table.add_column("tasks", justify="right")
    table.add_column("data")
    for offer in offers:
        table.add_row(offer.name, str(offer.tasks), ", ".join(offer.data))
    console().print(table)


def _print_suite(name: str, offers: list[SuiteOffer]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"--suite {name}", title_justify="left")
    for column in ("benchmark", "shots", "task", "parser", "data"):
        table.add_column(column, justify="right" if column == "shots" else "left")
    for offer in offers:
        missing = f"missing: {', '.join(offer.missing)}" if offer.missing else "present"
        data = escape(offer.why or missing)
        table.add_row(offer.benchmark, str(offer.shots), offer.task, escape(offer.parser), data)
    console().print(table)
