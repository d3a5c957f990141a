"""``qwen2kit data``: tokenise for training, check and look at what a run will be fed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from qwen2kit.config.tree import RunConfig
    from qwen2kit.data.examples import ShownExample
    from qwen2kit.data.shard_format import ShardIndex
    from qwen2kit.data.tokenize_job import TokenizeProgress

data = typer.Typer(
    help="Tokenise training data into shards; verify and show data.",
    rich_markup_mode=None,
)

Recipe = Annotated[
    str, typer.Argument(help="A TOML file or the name of a shipped recipe, as in qwen2kit train.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. data.paths='[\"*.jsonl\"]'."),
]
Directory = Annotated[Path, typer.Argument(help="Directory of token shards.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@data.command()
def tokenize(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="Directory of the shards; begun work goes on.")],
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: one per processor.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Input bytes per shard.")] = "256MB",
    json: Json = False,
) -> None:
    """Write the recipe's data as token shards, for its task and with its tokenizer.

    Interrupt it at any time and run it again: it goes on, and the result is the same, byte for
    byte, whatever the number of workers. Train on it with data.kind=shards data.paths='["OUT"]'.
    """
    from qwen2kit.cli.convert import parse_size
    from qwen2kit.cli.output import emit_json
    from qwen2kit.config.data_tree import FileData
    from qwen2kit.config.load import load_recipe
    from qwen2kit.data.tokenize_job import tokenize as run
    from qwen2kit.errors import ConfigError
    from qwen2kit.train.setup import build_origin

    if workers is not None and workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    size = parse_size(shard_size, option="--shard-size")
    config = load_recipe(recipe, overrides or [])
    source = config.data
    if not isinstance(source, FileData):
        raise ConfigError(
            f"data.kind = {source.kind} has no files to tokenise; name text, jsonl or parquet"
        )
    with _tokenize_progress() as progress:
        index = run(
            source,
            build_origin(config).tokenizer,
            config.task,
            out,
            workers=workers or os.cpu_count() or 1,
            shard_bytes=size,
            progress=progress,
        )
    if json:
        emit_json(_summary(out, index))
    _print_index(out, index)


@data.command()
def verify(
    directory: Directory,
    threads: Annotated[int | None, typer.Option(help="Files read at once.")] = None,
    json: Json = False,
) -> None:
    """Compare every shard's SHA-256 with the index; a damaged shard is named."""
    from qwen2kit.cli.output import console, emit_json
    from qwen2kit.data.shard_format import read_index
    from qwen2kit.data.shard_verify import verify_shards
    from qwen2kit.errors import DataError

    known = read_index(directory)
    total = sum(sum(shard.sizes(known.dtype)[s] for s in shard.sha256) for shard in known.shards)
    with _byte_progress("verifying", total) as progress:
        threads = threads or os.cpu_count() or 1
        index, damages = verify_shards(directory, threads=max(1, threads), progress=progress)
    if json:
        found = [{"file": d.file, "problem": d.problem} for d in damages]
        emit_json(_summary(directory, index) | {"damaged": found})
    for damage in damages[1:]:
        console().print(f"{directory / damage.file} {damage.problem}", markup=False)
    if damages:
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise DataError(
            f"{directory / damages[0].file} {damages[0].problem}{more}; restore it or tokenise "
            "again into another directory"
        )
    count = len(index.shards)
    console().print(f"{count} {'shard is' if count == 1 else 'shards are'} intact", markup=False)


@data.command()
def info(directory: Directory, json: Json = False) -> None:
    """Counts, dtype, tokenizer and origin of a directory of shards."""
    from qwen2kit.cli.output import emit_json
    from qwen2kit.data.shard_format import read_index

    index = read_index(directory)
    if json:
        emit_json(_summary(directory, index))
    _print_index(directory, index)


@data.command()
def show(
    recipe: Recipe,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(help="Examples of every source.")] = 3,
    max_tokens: Annotated[int, typer.Option(help="Tokens shown of one example.")] = 400,
    json: Json = False,
) -> None:
    """Print the first examples of a recipe's data; tokens that carry loss are green."""
    from qwen2kit.cli.output import emit_json
    from qwen2kit.config.load import load_recipe
    from qwen2kit.data.examples import first_examples
    from qwen2kit.errors import ConfigError
    from qwen2kit.train.setup import build_origin

    if count < 1 or max_tokens < 1:
        raise ConfigError("--count and --max-tokens must be at least 1")
    config: RunConfig = load_recipe(recipe, overrides or [])
    tokenizer = build_origin(config).tokenizer
    examples = list(first_examples(config.data, tokenizer, config.task, count))
    if json:
        emit_json([example.to_json(tokenizer) for example in examples])
        return
    for example in examples:
        _print_example(example, tokenizer.decode, max_tokens)


def _print_example(
    example: ShownExample, decode: Callable[[list[int]], str], max_tokens: int
) -> None:
    from rich.text import Text

    from qwen2kit.cli.output import console

    screen = console()
    counts = f"{len(example.tokens)} tokens, {sum(example.supervised)} supervised"
    text = Text(f"{example.place}: {counts}\n", style="bold")
    for tokens, is_supervised in example.runs(max_tokens):
        text.append(decode(tokens), style="not bold green" if is_supervised else "not bold dim")
    if len(example.tokens) > max_tokens:
        text.append(f" ... {len(example.tokens) - max_tokens} more tokens", style="not bold italic")
    screen.print(text)


def _summary(directory: Path, index: ShardIndex) -> dict[str, Any]:
    document = index.to_json()
    return document | {"directory": str(directory), "shards": len(index.shards)}


def _print_index(directory: Path, index: ShardIndex) -> None:
    from rich.table import Table

    from qwen2kit.cli.output import console

    size = sum(sum(s.sizes(index.dtype)[suffix] for suffix in s.sha256) for s in index.shards)
    rows = {
        "task": index.task,
        "documents": f"{index.total('documents'):,}",
        "tokens": f"{index.total('tokens'):,} ({index.dtype})",
        "supervised tokens": f"{index.total('supervised'):,}",
        "empty documents left out": f"{index.total('empty'):,}",
        "shards": f"{len(index.shards):,}, {size / 1e6:,.1f} MB",
        "made from": ", ".join(index.made_from["data"]["paths"]),
        "tokenizer": index.tokenizer[:16],
    }
    table = Table(title=str(directory), show_header=False)
    for key, value in rows.items():
        table.add_row(key, value)
    console().print(table)


@contextmanager
def _byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from qwen2kit.cli.output import console

    columns = (label, BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda size: bar.advance(task, size)


@contextmanager
def _tokenize_progress() -> Iterator[Callable[[TokenizeProgress], None]]:
    from time import perf_counter

    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from qwen2kit.cli.output import console

    columns = (
        TextColumn("{task.fields[shards]} shards"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} % {task.fields[speed]} left"),
        TimeRemainingColumn(),
    )
    started = perf_counter()
    with Progress(*columns, console=console(), transient=True) as bar:
        task = bar.add_task("", total=None, shards="0", speed="")

        def update(done: TokenizeProgress) -> None:
            seconds = max(perf_counter() - started, 1e-9)
            speed = f"{done.documents / seconds:,.0f} docs/s {done.tokens / seconds:,.0f} tokens/s"
            shards = f"{done.shards}/{done.total_shards}"
            bar.update(
                task, total=done.total_bytes, completed=done.bytes, shards=shards, speed=speed
            )

        yield update
