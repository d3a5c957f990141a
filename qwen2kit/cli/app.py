"""The Typer application and the process entry point."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from qwen2kit import __version__
from qwen2kit.cli.bench import bench
from qwen2kit.cli.chat import chat
from qwen2kit.cli.convert import convert
from qwen2kit.cli.data import data
from qwen2kit.cli.demo import demo
from qwen2kit.cli.disk_errors import explain
from qwen2kit.cli.doctor import doctor
from qwen2kit.cli.eval import evaluation
from qwen2kit.cli.inspect import inspect
from qwen2kit.cli.launch import launch
from qwen2kit.cli.output import fail
from qwen2kit.cli.parity import parity
from qwen2kit.cli.plan import plan
from qwen2kit.cli.serve import serve
from qwen2kit.cli.train import train
from qwen2kit.errors import Qwen2KitError

app = typer.Typer(
    name="qwen2kit",
    help="Train, convert, chat with and evaluate Qwen2-family models on PyTorch and MLX.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for _name, _command in (
    ("train", train),
    ("convert", convert),
    ("chat", chat),
    ("bench", bench),
    ("serve", serve),
    ("parity", parity),
    ("inspect", inspect),
    ("plan", plan),
    ("doctor", doctor),
    ("demo", demo),
):
    app.command(_name)(_command)
app.add_typer(evaluation, name="eval")
app.add_typer(data, name="data")
app.add_typer(launch, name="launch")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qwen2kit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """What goes before a command's name."""


def main() -> None:
    """Run the CLI; every user-caused failure becomes one line and a non-zero exit."""
    if sys.stdout is None:  # closed by the caller, who wants to hear nothing
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="qwen2kit", standalone_mode=False)
    except Qwen2KitError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)
    except MemoryError:
        fail("out of memory; use a smaller model, batch or context, or a quantised model", 12)
    except BrokenPipeError:
        os._exit(141)
    except OSError as error:
        _explain(error)
        raise
    except Exception as error:
        said = getattr(error, "format_message", None)  # typer's usage errors, whose base
        if said is None:  # class differs between versions of typer
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "qwen2kit")
        fail(f"{said()} (see {command} --help)", 2)
    else:
        _leave(code)


def _explain(error: OSError) -> None:
    """One line for a failing disk or file; returns if the error is of neither."""
    found = explain(error)
    if found is not None:
        fail(*found)


def _leave(code: object) -> None:
    """Exit with a command's code; typer turns Ctrl-C into 130 and returns it."""
    if code == 130:
        fail("interrupted", 130)
    if isinstance(code, int) and code:
        raise SystemExit(code)
