"""One turn of ``qwen2kit chat``: the answer on the screen, leave for tools, figures below."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen2kit.chat.answer import PendingCall
from qwen2kit.cli.chat_render import interruptible, open_screen
from qwen2kit.cli.output import console

if TYPE_CHECKING:
    from collections.abc import Generator

    from qwen2kit.chat.answer import Answer
    from qwen2kit.chat.session import ChatSession

_METER = 12
_LONGEST_RESULT = 200


@dataclass(slots=True)
class Manner:
    """How a chat is shown.

    Attributes:
        markdown: render it, on a terminal.
        yes_tools: run what the model asks for without asking.
    """

    markdown: bool = True
    yes_tools: bool = False


def say(text: str) -> None:
    """A line for people, to stderr."""
    console().print(text, markup=False, soft_wrap=True)


def stream_answer(session: ChatSession, text: str, manner: Manner) -> None:
    """Write the answer to stdout as it comes, then the statistics to stderr."""
    stream: Generator[str | PendingCall, None, None] = session.send(text)  # type: ignore[assignment]
    screen = open_screen(markdown=manner.markdown)
    try:
        with closing(stream):
            for piece in _until_pressed(stream):
                if isinstance(piece, str):
                    screen.write(piece)
                else:
                    screen.pause()
                    decide(piece, manner)
    finally:
        screen.pause()
    if session.last is not None:
        say(summary(session.last, session.sampling.max_new_tokens))


def decide(pending: PendingCall, manner: Manner) -> None:
    """Run the function if the user lets it; what cannot be asked is not run."""
    say(f"[tool] {spelled(pending)}")
    if not manner.yes_tools and not _asked(manner):
        say("[tool] not run" + ("" if sys.stdin.isatty() else "; --yes-tools allows it"))
        return
    run_tool(pending)
    result = " ".join(pending.result.split())
    say(f"[tool] = {result if len(result) <= _LONGEST_RESULT else result[:_LONGEST_RESULT] + '…'}")


def run_tool(pending: PendingCall) -> None:
    """Call the function; what it prints goes to stderr, as stdout is for the answer."""
    with redirect_stdout(sys.stderr):
        pending.run()


def spelled(pending: PendingCall) -> str:
    """The call as one would write it in Python, near enough."""
    arguments = ", ".join(
        f"{name}={json.dumps(value, ensure_ascii=False)}"
        for name, value in pending.call.arguments.items()
    )
    return f"{pending.call.name}({arguments})"


def summary(answer: Answer, max_new_tokens: int) -> str:
    """One line: tokens, speed, how full the context is, and why the answer ended early."""
    parts = [
        f"{answer.tokens} tokens",
        f"{answer.tokens_per_second:.1f} tokens/s",
        f"first token after {answer.first_token_seconds:.2f} s",
    ]
    if answer.drafted:
        parts.append(f"guessed {answer.accepted} of {answer.drafted} right")
    parts.append(f"context {meter(answer.context_tokens, answer.context_limit)}")
    line = ", ".join(parts)
    if answer.finish_reason == "length":
        line += (
            "; stopped because the model's context is full (/reset starts over)"
            if answer.context_full
            else f"; stopped at --max-new-tokens {max_new_tokens}"
        )
    return f"[{line}]"


def meter(used: int, limit: int) -> str:
    """How much of the context is used, as a bar and in tokens."""
    full = min(_METER, -(-_METER * used // limit))
    return f"▕{'█' * full}{'░' * (_METER - full)}▏ {used:,} of {limit:,}"


def warn_about_controls(session: ChatSession, text: str) -> None:
    """Say that spelled-out control tokens are taken as ordinary text."""
    found = session.typed_controls(text)
    if found:
        say(f"(note: {', '.join(found)} is read as ordinary text, not as a control token)")


def _asked(manner: Manner) -> bool:
    """Whether the user says yes; ``a`` means yes from now on, Ctrl-D no."""
    if not sys.stdin.isatty():
        return False
    try:
        reply = console().input("run it? [y/N/a(lways)] ", markup=False).strip().lower()
    except (EOFError, UnicodeDecodeError):
        reply = ""
        say("")
    manner.yes_tools = reply in ("a", "always")
    return reply in ("y", "yes", "a", "always")


def _until_pressed(
    stream: Iterator[str | PendingCall],
) -> Iterator[str | PendingCall]:
    """``stream``, interrupted by Ctrl-C between two steps of the model, not within one: what was
    read stays in the cache."""
    while True:
        with interruptible() as pressed:
            piece = next(stream, None)
        if piece is not None:
            yield piece
        if pressed:
            raise KeyboardInterrupt
        if piece is None:
            return
