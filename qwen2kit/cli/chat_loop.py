"""The interactive side of ``qwen2kit chat``: reading lines, slash commands."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qwen2kit.cli.chat_turn import Manner, say, stream_answer, warn_about_controls
from qwen2kit.errors import Qwen2KitError

if TYPE_CHECKING:
    from qwen2kit.chat.session import ChatSession

HELP = """\
/reset         forget the conversation (the system prompt stays)
/system TEXT   set the system prompt; without TEXT, show it
/tools FILE.py offer the functions of a file to the model; without FILE, list them; off: none
/save FILE     write the conversation as JSON messages
/load FILE     go on from such a file
/help          this list
/exit          leave (also Ctrl-D); Ctrl-C interrupts an answer
A line that ends in \\ goes on in the next one. Arrow keys bring back earlier lines."""
_LINES_KEPT: Final = 1000


def converse(session: ChatSession, manner: Manner | None = None) -> None:
    """Read, answer, repeat until /exit or end of input."""
    manner = manner or Manner()
    say("Type /help for commands, /exit to leave.")
    with _line_history():
        while True:
            try:
                line = _read()
            except EOFError:
                say("")
                return
            except KeyboardInterrupt:
                say("\n(/exit or Ctrl-D leaves)")
                continue
            except UnicodeDecodeError:
                say("error: that line is not UTF-8 text")
                continue
            if line.startswith("/"):
                if not run_command(session, line):
                    return
            elif line.strip():
                _answer(session, line, manner)


def run_command(session: ChatSession, line: str) -> bool:
    """Carry out one slash command; False means leave."""
    name, _, rest = line[1:].partition(" ")
    if name in ("exit", "quit"):
        return False
    command = _COMMANDS.get(name)
    if command is None:
        say(f"unknown command /{name}\n{HELP}")
        return True
    try:
        command(session, rest.strip())
    except Qwen2KitError as error:
        say(f"error: {error}")
    return True


def _answer(session: ChatSession, line: str, manner: Manner) -> None:
    try:
        warn_about_controls(session, line)
        stream_answer(session, line, manner)
    except KeyboardInterrupt:
        say("\n(interrupted; the conversation goes on)")
    except Qwen2KitError as error:
        say(f"error: {error}")


def _read() -> str:
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines)


@contextmanager
def _line_history() -> Iterator[None]:
    """Line editing, with the lines of earlier chats; they are kept in the user's state folder."""
    try:
        import readline

        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    except (ImportError, RuntimeError):  # no such library, or a user without a home
        yield
        return
    path = state / "qwen2kit" / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(_LINES_KEPT)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def _reset(session: ChatSession, rest: str) -> None:
    session.reset()
    say("(conversation forgotten)")


def _system(session: ChatSession, text: str) -> None:
    if not text:
        current = session.system
        say("(the template's default)" if current is None else current)
        return
    session.system = text
    say("(system prompt set; the conversation so far is kept, /reset forgets it)")


def _tools(session: ChatSession, name: str) -> None:
    if name == "off":
        session.tools = []
    elif name:
        from qwen2kit.chat.tool_functions import load_tools

        session.tools = load_tools(_path(name))
    offered = ", ".join(tool.name for tool in session.tools)
    say(f"(tools: {offered})" if offered else "(no tools)")


def _save(session: ChatSession, name: str) -> None:
    if not name:
        say("usage: /save FILE")
        return
    document = json.dumps(session.messages, ensure_ascii=False, indent=2) + "\n"
    try:
        _path(name).write_text(document, encoding="utf-8")
    except OSError as error:
        say(f"error: cannot write {name}: {error.strerror}")
    else:
        say(f"(saved {len(session.messages)} messages to {name})")


def _load(session: ChatSession, name: str) -> None:
    if not name:
        say("usage: /load FILE")
        return
    try:
        messages = json.loads(_path(name).read_text(encoding="utf-8"))
    except OSError as error:
        say(f"error: cannot read {name}: {error.strerror}")
        return
    except (ValueError, RecursionError):
        messages = None
    if not isinstance(messages, list):
        say(f"error: {name} holds no list of JSON messages, as /save writes it")
        return
    session.load(messages)
    say(f"(loaded {len(messages)} messages from {name})")


def _path(name: str) -> Path:
    """A file that the user names; ``~`` is their home, if they have one."""
    return Path(os.path.expanduser(name))


def _help(session: ChatSession, rest: str) -> None:
    say(HELP)


_COMMANDS: Final[dict[str, Callable[[ChatSession, str], None]]] = {
    "reset": _reset,
    "system": _system,
    "tools": _tools,
    "save": _save,
    "load": _load,
    "help": _help,
}
