"""Output that must match a grammar: JSON schema, JSON object, regular expression, Lark, tool calls.

llguidance (arXiv 2502.05111 describes the problem) parses and says which tokens may come next;
here it learns our tokenizer and its masks become those of `qwen2kit.backend.slots.Edit`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from qwen2kit.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher
    from numpy.typing import NDArray

    from qwen2kit.tokenizer.bpe import Tokenizer

_LONGEST_REASON: Final = 300
_BLANKS: Final = r"[ \t\n\r]{0,40}"
"""Between JSON tokens: room to indent, but a model cannot go on with blanks for ever."""


class GrammarConstraint:
    """Where one answer stands in its grammar (`qwen2kit.engine.request.Constraint`).

    Args:
        matcher: at the beginning of a valid grammar.
        words: length of the masks, ``ceil(V / 32)``.
    """

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        self._matcher = matcher
        self._words = words

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete and nothing but a stop id may follow."""
        return self._matcher.is_stopped()

    def mask(self) -> NDArray[np.uint32]:
        """Ids that may come next, packed uint32 ``[words]``; stop ids where the answer may end.

        Raises:
            ConfigError: the grammar grew too complex to be followed.
        """
        import numpy as np

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype="<u4")
        if self._matcher.is_error():
            raise ConfigError(f"the output grammar cannot be followed: {self._reason()}")
        packed = np.zeros(self._words, dtype=np.uint32)
        shared = min(len(bits), self._words)
        packed[:shared] = bits[:shared]
        return packed

    def accept(self, token: int) -> None:
        """Go on past ``token``. Raises ConfigError if the mask forbids it."""
        if not self._matcher.consume_token(token):
            raise ConfigError(f"token {token} does not fit the output grammar: {self._reason()}")

    def forced(self) -> tuple[int, ...]:
        """Ids that must come next whatever the model thinks; the masks allow nothing else."""
        return tuple(self._matcher.compute_ff_tokens())

    def _reason(self) -> str:
        """What llguidance says, without the state it was in."""
        reason = self._matcher.get_error().partition("<state>")[0]
        if reason.startswith("NoExtension"):
            return "nothing can come next; does it refer to itself without an end?"
        return _one_line(reason)


class ConstraintCompiler:
    """Makes constraints for one tokenizer; building it takes half a second, so keep it.

    Args:
        tokenizer: spells the tokens.
        vocab_size: V, rows of the model's logits.
        stop_ids: ids that end an answer; allowed exactly where the grammar may end.

    Raises:
        MissingExtra: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise MissingExtra("constrained", "llguidance") from None
        self._words = (vocab_size + 31) // 32
        ends = list(stop_ids) or [tokenizer.eos_id]
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=ends)

    def json_schema(self, schema: Mapping[str, Any] | bool | str) -> GrammarConstraint:
        """JSON of a schema (draft 2020-12), with free but bounded blanks between its tokens.

        Raises:
            ConfigError: the schema is no JSON, contradicts itself or uses a keyword that cannot be
                enforced.
        """
        from llguidance import LLMatcher

        text = schema if isinstance(schema, str) else json.dumps(schema)
        blanks: Any = {"whitespace_pattern": _BLANKS}
        try:
            if not isinstance(json.loads(text), dict | bool):
                raise ConfigError("the JSON schema must be an object or a boolean")
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=blanks)
        except ConfigError:
            raise
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the JSON schema is not JSON: {_one_line(str(error))}") from None
        return self._constraint(grammar, "JSON schema")

    def json_object(self) -> GrammarConstraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> GrammarConstraint:
        """Text that matches ``pattern`` as a whole (Rust syntax: no look-around).

        Raises:
            ConfigError: the pattern does not parse.
        """
        from llguidance import LLMatcher

        return self._constraint(LLMatcher.grammar_from_regex(pattern), "regular expression")

    def lark(self, grammar: str) -> GrammarConstraint:
        """Text of a context-free grammar in Lark's syntax, whose first rule is ``start``.

        Raises:
            ConfigError: the grammar does not parse.
        """
        from llguidance import LLMatcher

        return self._constraint(LLMatcher.grammar_from_lark(grammar), "grammar")

    def tool_calls(self, parameters: Mapping[str, Mapping[str, Any]]) -> GrammarConstraint:
        """One or more calls of the given functions, and nothing else.

        Args:
            parameters: JSON schema of the arguments of each function.

        Raises:
            ConfigError: there is no function, or a schema is invalid.
        """
        if not parameters:
            raise ConfigError("a tool call was asked for, but no tool is offered")
        calls = [_call_schema(name, schema) for name, schema in parameters.items()]
        schema = json.dumps({"anyOf": calls, "x-guidance": {"whitespace_pattern": _BLANKS}})
        return self.lark(
            f'start: call ("\\n" call)*\ncall: "<tool_call>\\n" %json {schema} "\\n</tool_call>"\n'
        )

    def _constraint(self, grammar: str, kind: str) -> GrammarConstraint:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(f"the {kind} cannot be enforced: {_one_line(matcher.get_error())}")
        return GrammarConstraint(matcher, self._words)


class _Vocabulary:
    """Our tokenizer with the attributes that llguidance's wrapper reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.tokens = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, allow_special=False)


def _call_schema(name: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": dict(parameters)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _one_line(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= _LONGEST_REASON else line[:_LONGEST_REASON] + "..."
