"""A conversation with a loaded model: history in, streamed text out. No terminal in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from qwen2kit.chat.answer import DECLINED, Answer, PendingCall, Progress
from qwen2kit.chat.engine import ChatEngine
from qwen2kit.errors import ConfigError, Qwen2KitError
from qwen2kit.generate.tool_calls import ToolCall, ToolCallParser
from qwen2kit.tokenizer.chat_template import Message, check_messages

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.chat.tool_functions import Tool
    from qwen2kit.engine.drafting import Drafter
    from qwen2kit.engine.request import Constraint

_MOST_ROUNDS: Final = 16
"""Answers with calls in one turn; a model that asks on and on is stopped."""
_SILENCE: Final = {"role": "assistant", "content": ""}


class ChatSession:
    """Turns of one conversation.

    Control tokens that somebody spells out stay ordinary text (`typed_controls` finds them). A
    model without a chat template gets each text as it stands, without the turns before it. What
    the model has read stays in its cache: a turn costs its own tokens only.

    Args:
        loaded: the model.
        system: system prompt; None leaves the choice to the checkpoint's template.
        drafter: makes a drafter for so many slots of so many tokens.
        grammar: makes what an answer must follow; None is anything.
        sampling: overrides of the checkpoint's generation defaults (fields of `Sampling`).

    Attributes:
        last: what the last `send` produced.

    Raises:
        ConfigError: a sampling value is out of range, or ``system`` is given for a model without
            a chat template.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        system: str | None = None,
        drafter: Callable[[int, int], Drafter] | None = None,
        grammar: Callable[[], Constraint] | None = None,
        **sampling: object,
    ) -> None:
        self.loaded = loaded
        self.sampling = loaded.sampling(**sampling)
        self.last: Answer | None = None
        self._engine = ChatEngine(loaded, drafter)
        self._grammar = grammar
        self._turns: list[dict[str, Any]] = []
        self._tools: dict[str, Tool] = {}
        self._system: str | None = None
        if system is not None:
            self.system = system

    @property
    def is_chat(self) -> bool:
        """Whether the checkpoint has a chat template; if not, `send` completes text."""
        return self.loaded.tokenizer.chat_template is not None

    @property
    def context_limit(self) -> int:
        """Tokens the model takes, answer included."""
        return self.loaded.model.limit

    @property
    def system(self) -> str | None:
        """The system prompt; None is the template's own default. Setting it keeps the turns."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not self.is_chat:
            raise ConfigError("this model has no chat template, so it takes no system prompt")
        self._system = text

    @property
    def tools(self) -> list[Tool]:
        """Functions the model may ask for. Setting them raises ConfigError or TokenizerError if
        the checkpoint's template knows no tools, or two have the same name."""
        return list(self._tools.values())

    @tools.setter
    def tools(self, tools: Sequence[Tool]) -> None:
        named = {tool.name: tool for tool in tools}
        if len(named) != len(tools):
            raise ConfigError("two tools have the same name; rename one of them")
        if named and not self.is_chat:
            raise ConfigError("this model has no chat template, so it takes no tools")
        schemas = [tool.schema for tool in tools]
        if schemas:
            self.loaded.tokenizer.render_chat([{"role": "user", "content": "x"}], tools=schemas)
        self._tools = named

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, system prompt first when one was set (a copy)."""
        head = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*head, *(dict(turn) for turn in self._turns)]

    def load(self, messages: Sequence[Message]) -> None:
        """Go on from a conversation as `messages` gives it.

        Raises:
            TokenizerError: a message has no role or content.
            ConfigError: the model has no chat template.
        """
        if not self.is_chat:
            raise ConfigError("this model has no chat template, so it has no conversation to load")
        check_messages(messages)
        has_system = messages[0]["role"] == "system"
        self._system = messages[0]["content"] if has_system else None
        self._turns = [dict(message) for message in messages[has_system:]]

    def typed_controls(self, text: str) -> list[str]:
        """Control tokens spelled out in ``text``; the model reads them as ordinary text."""
        tokenizer = self.loaded.tokenizer
        names = (tokenizer.decode([token]) for token in sorted(tokenizer.special_ids))
        return [name for name in names if name in text]

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self._turns.clear()

    def save_cache(self, path: Path) -> int:
        """Write what the model has read to a file; how many tokens. See `ChatEngine.save`."""
        return self._engine.save(path)

    def load_cache(self, path: Path) -> int:
        """Take over what `save_cache` wrote: prompts that begin alike are not read again. How many
        tokens; see `ChatEngine.load`."""
        return self._engine.load(path)

    def close(self) -> None:
        """Give the cache's memory back."""
        self._engine.close()

    def send(self, text: str) -> Iterator[str | PendingCall]:
        """Answer ``text`` piece by piece; afterwards `last` holds the statistics.

        Where the model asks for a tool, a `PendingCall` comes out between the pieces; the answer
        goes on with its result. The turn joins the history when the stream ends. Closing the
        stream early keeps what was said so far; closing it before any text leaves the history as
        it was.

        Raises:
            ConfigError: empty text, or a conversation longer than the model's context.
            TokenizerError: text that is not Unicode, or a template that fails.
                The history is unchanged in all cases.
        """
        started = perf_counter()
        if not text:
            raise ConfigError("the prompt is empty; say something")
        turns: list[dict[str, Any]] = [{"role": "user", "content": text}]
        prompt = self._encode(turns)
        progress = Progress(self.context_limit)
        try:
            yield from self._rounds(turns, prompt, progress, started)
        except Qwen2KitError:
            turns.clear()
            raise
        finally:
            self.last = progress.answer()
            if turns and turns[-1] == _SILENCE and self.last.finish_reason == "interrupted":
                turns.pop()
            if self.last.text or self.last.calls or self.last.finish_reason != "interrupted":
                self._turns += turns

    def _rounds(
        self, turns: list[dict[str, Any]], prompt: list[int], progress: Progress, started: float
    ) -> Iterator[str | PendingCall]:
        for _ in range(_MOST_ROUNDS):
            calls: list[ToolCall] = []
            progress.begin(started, len(prompt))
            yield from self._speak(turns, prompt, progress, calls)
            if not calls:
                return
            for call in calls:
                turns.append({"role": "tool", "name": call.name, "content": DECLINED})
            for turn, call in zip(turns[-len(calls) :], calls, strict=True):
                yield from self._call(call, turn, progress)
            started = perf_counter()
            prompt = self._encode(turns)

    def _speak(
        self,
        turns: list[dict[str, Any]],
        prompt: list[int],
        progress: Progress,
        calls: list[ToolCall],
    ) -> Iterator[str]:
        """One answer of the model, which becomes a turn; the calls in it are put into ``calls``."""
        turn: dict[str, Any] = dict(_SILENCE)
        turns.append(turn)
        parser = ToolCallParser() if self._tools else None
        before = self._engine.counts

        def keep(found: tuple[str, list[ToolCall]]) -> Iterator[str]:
            said, asked = found
            if asked:
                calls.extend(asked)
                turn["tool_calls"] = [call.message() for call in calls]
            if said:
                turn["content"] += said
                progress.pieces.append(said)
                yield said

        constraint = None if self._grammar is None else self._grammar()
        for event in self._engine.stream(prompt, self.sampling, constraint):
            progress.add(event)
            yield from keep(parser.push(event.text) if parser else (event.text, []))
        progress.count(before, self._engine.counts)
        if parser:
            yield from keep(parser.finish())

    def _call(
        self, call: ToolCall, turn: dict[str, Any], progress: Progress
    ) -> Iterator[PendingCall]:
        tool = self._tools.get(call.name)
        if tool is None:
            turn["content"] = f"error: no tool {call.name}; there are {', '.join(self._tools)}"
            return
        pending = PendingCall(call, tool)
        progress.calls.append(pending)
        try:
            yield pending
        finally:
            turn["content"] = pending.result

    def _encode(self, turns: Sequence[Message]) -> list[int]:
        tokenizer = self.loaded.tokenizer
        if self.is_chat:
            schemas = [tool.schema for tool in self.tools] or None
            tokens = tokenizer.encode_chat([*self.messages, *turns], tools=schemas)
        else:
            tokens = tokenizer.encode(turns[0]["content"], allow_special=False)
        if len(tokens) >= self.context_limit:
            again = self.is_chat and (self._turns or len(turns) > 1)
            remedy = "start over (/reset) or say less" if again else "shorten it"
            raise ConfigError(
                f"the conversation is {len(tokens)} tokens long, but the model's context holds "
                f"{self.context_limit}, answer included; {remedy}"
            )
        return tokens
