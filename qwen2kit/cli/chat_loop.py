"""The interactive side of ``qwen2kit chat``: reading lines, slash commands, streaming answers."""

from __future__ import annotations

import json
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2kit.cli.output import console
from qwen2kit.errors import Qwen2KitError

if TYPE_CHECKING:
    from collections.abc import Generator

    from qwen2kit.generate.chat_session import Answer, ChatSession

HELP = """\
/reset         forget the conversation (the system prompt stays)
/system TEXT   set the system prompt; without TEXT, show it
/save FILE     write the conversation as JSON messages
/help          this list
/exit          leave (also Ctrl-D); Ctrl-C interrupts an answer"""


def converse(session: ChatSession) -> None:
    """Read, answer, repeat until /exit or end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    _say("Type /help for commands, /exit to leave.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            _say("")
            return
        except KeyboardInterrupt:
            _say("\n(/exit or Ctrl-D leaves)")
            continue
        if not line.strip():
            continue
        if line.startswith("/"):
            if not run_command(session, line):
                return
            continue
        try:
            warn_about_controls(session, line)
            stream_answer(session, line)
        except KeyboardInterrupt:
            _say("\n(interrupted; the conversation goes on)")
        except Qwen2KitError as error:
            _say(f"error: {error}")


def run_command(session: ChatSession, line: str) -> bool:
    """Carry out one slash command; False means leave."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name in ("exit", "quit"):
        return False
    if name == "reset":
        session.reset()
        _say("(conversation forgotten)")
    elif name == "system":
        _system(session, rest)
    elif name == "save":
        _save(session, rest)
    elif name == "help":
        _say(HELP)
    else:
        _say(f"unknown command /{name}\n{HELP}")
    return True


def stream_answer(session: ChatSession, text: str) -> None:
    """Write the answer to stdout as it comes, then the statistics to stderr."""
    stream: Generator[str, None, None] = session.send(text)  # type: ignore[assignment]
    with closing(stream):
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if session.last is not None:
        _say(summary(session.last, session.sampling.max_new_tokens))


def summary(answer: Answer, max_new_tokens: int) -> str:
    """One line: tokens, speed and why the answer ended."""
    speed = f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s"
    start = f"first token after {answer.first_token_seconds:.2f} s"
    if answer.finish_reason == "length":
        why = (
            "stopped because the model's context is full (/reset starts over)"
            if answer.context_full
            else f"stopped at --max-new-tokens {max_new_tokens}"
        )
        return f"[{speed}, {start}; {why}]"
    return f"[{speed}, {start}]"


def warn_about_controls(session: ChatSession, text: str) -> None:
    """Say that spelled-out control tokens are taken as ordinary text."""
    found = session.typed_controls(text)
    if found:
        _say(f"(note: {', '.join(found)} is read as ordinary text, not as a control token)")


def _system(session: ChatSession, text: str) -> None:
    if not text:
        current = session.system
        _say("(the template's default)" if current is None else current)
        return
    try:
        session.system = text
    except Qwen2KitError as error:
        _say(f"error: {error}")
    else:
        _say("(system prompt set; the conversation so far is kept, /reset forgets it)")


def _save(session: ChatSession, name: str) -> None:
    if not name:
        _say("usage: /save FILE")
        return
    document = json.dumps(session.messages, ensure_ascii=False, indent=2) + "\n"
    try:
        Path(name).expanduser().write_text(document, encoding="utf-8")
    except OSError as error:
        _say(f"error: cannot write {name}: {error.strerror}")
    else:
        _say(f"(saved {len(session.messages)} messages to {name})")


def _say(text: str) -> None:
    console().print(text, markup=False, soft_wrap=True)
