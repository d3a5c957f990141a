"""What `qwen2kit bench` found, as one JSON document and as tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from qwen2kit.bench.measure import Decode, Prefill, Throughput
    from qwen2kit.bench.roof import Roof


def prefill_entry(found: Prefill, roof: Roof | None) -> dict[str, Any]:
    """One prompt length with its tokens per second, and those of the roof."""
    return {
        **asdict(found),
        "tokens_per_second": found.tokens / found.seconds,
        **_beside(found.seconds, None if roof is None else roof.prefill(found.tokens)),
    }


def decode_entry(found: Decode, roof: Roof | None) -> dict[str, Any]:
    """One context length; the roof is that of a token half way through the answer."""
    middle = found.context + found.new / 2
    seconds = 1 / found.tokens_per_second
    return {**asdict(found), **_beside(seconds, None if roof is None else roof.decode(middle))}


def throughput_entry(found: Throughput, roof: Roof | None) -> dict[str, Any]:
    """One number of streams; the roof is that of decoding, all streams half way."""
    middle = found.prompt + found.new / 2
    rate = found.decode_tokens_per_second
    limit = None if roof is None or rate is None else roof.decode(middle, found.streams)
    beside = _beside(0.0 if rate is None else found.streams / rate, limit)
    percentiles = ("p50", "p90", "p99")
    return {
        **asdict(found),
        "first_token": dict(zip(percentiles, found.first_token, strict=True)),
        "between_tokens": dict(zip(percentiles, found.between_tokens, strict=True)),
        **beside,
    }


def _beside(seconds: float, least: float | None) -> dict[str, Any]:
    """The roof in seconds, and the share of it that was reached (None without a roof)."""
    if least is None:
        return {"roof_seconds": None, "roof_share": None}
    return {"roof_seconds": least, "roof_share": least / seconds}


def show(document: dict[str, Any], screen: Console) -> None:
    """Tables of a document made by `qwen2kit.bench.run.bench`."""
    for line in _heading(document):
        screen.print(line, markup=False, soft_wrap=True)
    if document["prefill"]:
        screen.print(_prefill(document["prefill"]))
    if document["decode"]:
        screen.print(_decode(document["decode"]))
    if document["throughput"]:
        screen.print(_throughput(document["throughput"]))


def _heading(document: dict[str, Any]) -> list[str]:
    device, load, memory = document["device"], document["load"], document["memory"]
    lines = [
        f"{document['model']}: {document['parameters'] / 1e6:,.1f} M parameters, "
        f"{document['backend']} {document['dtype'] or ''} on {device['kind']} ({device['name']})",
        f"loaded in {load['seconds']:.2f} s ({load['bytes'] / 1e9:.2f} GB)",
    ]
    if document["roof"] is not None:
        roof = document["roof"]
        lines.append(
            f"measured: copies {roof['copy_bandwidth'] / 1e9:,.0f} GB/s, "
            f"products {roof['matmul_flops'] / 1e12:,.2f} TFLOP/s"
        )
    if memory["peak_bytes"] is not None:
        lines.append(f"peak memory {memory['peak_bytes'] / 1e9:.2f} GB")
    return lines


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _prefill(entries: Sequence[dict[str, Any]]) -> Table:
    table = _table("prefill", "prompt", "seconds", "tokens/s", "of roof")
    for entry in entries:
        table.add_row(
            f"{entry['tokens']:,}",
            f"{entry['seconds']:.3f}",
            f"{entry['tokens_per_second']:,.0f}",
            _share(entry),
        )
    return table


def _decode(entries: Sequence[dict[str, Any]]) -> Table:
    guesses = any(entry["drafted"] for entry in entries)
    columns = ["context", "new", "tokens/s", "of roof", *(["guesses right"] * guesses)]
    table = _table("decoding, one stream", *columns)
    for entry in entries:
        right = f"{entry['accepted']:,} of {entry['drafted']:,}"
        table.add_row(
            f"{entry['context']:,}",
            f"{entry['new']:,}",
            f"{entry['tokens_per_second']:,.1f}",
            _share(entry),
            *([right] * guesses),
        )
    return table


def _throughput(entries: Sequence[dict[str, Any]]) -> Table:
    table = _table(
        "many streams (ms to the first token and between tokens: p50, p99)",
        "streams", "tokens/s", "decoding", "of roof", "first", "between",
    )  # fmt: skip
    for entry in entries:
        rate = entry["decode_tokens_per_second"]
        table.add_row(
            f"{entry['streams']:,}",
            f"{entry['tokens_per_second']:,.1f}",
            "-" if rate is None else f"{rate:,.1f}",
            _share(entry),
            _milliseconds(entry["first_token"]),
            _milliseconds(entry["between_tokens"]),
        )
    return table


def _share(entry: dict[str, Any]) -> str:
    return "-" if entry["roof_share"] is None else f"{entry['roof_share']:.0%}"


def _milliseconds(percentiles: dict[str, float]) -> str:
    return " / ".join(_three_digits(1000 * percentiles[name]) for name in ("p50", "p99"))


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
