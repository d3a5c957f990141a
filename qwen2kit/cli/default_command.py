"""A command group in which one command needs no name: ``eval MODEL`` beside ``eval diff A B``."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

DEFAULT = "run"


class DefaultCommandGroup(TyperGroup):
    """Arguments that begin with no command's name go to the command `DEFAULT`.

    Its help shows the options of that command, then the other commands.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command's name in front where it is left out."""
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Both forms."""
        formatter.write_usage(ctx.command_path, "[OPTIONS] MODEL | COMMAND ...")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The default command's options, then the commands."""
        self.commands[DEFAULT].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)
