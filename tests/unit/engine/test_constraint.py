"""Constrained output: always valid by somebody else's judgement, masks as llguidance's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from qwen2kit.engine.constraint import ConstraintCompiler, GrammarConstraint
from qwen2kit.errors import ConfigError
from qwen2kit.generate.tool_calls import parse_tool_calls
from qwen2kit.tokenizer.bpe import Tokenizer
from tests.tiny_checkpoint import VOCAB, write_tiny_checkpoint

llguidance = pytest.importorskip("llguidance")
ROWS = VOCAB + 50  # more rows than tokens, as in released checkpoints


class Person(BaseModel):
    name: Annotated[str, Field(max_length=12)]
    age: Annotated[int, Field(ge=0, le=150)]
    kind: Literal["cat", "dog"]
    scores: Annotated[list[bool], Field(max_length=3)]
    friend: Annotated[str, Field(pattern="^[a-c]{2,4}$")] | None


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, ROWS, [tokenizer.im_end_id, tokenizer.eot_id])


def _ids(mask: np.ndarray) -> np.ndarray:
    assert mask.dtype == np.uint32
    assert mask.shape == ((ROWS + 31) // 32,)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def _write(constraint: GrammarConstraint, tokenizer: Tokenizer, seed: int) -> str:
    """What a model without any preference says."""
    random = np.random.default_rng(seed)
    ends = {tokenizer.im_end_id, tokenizer.eot_id}
    said: list[int] = []
    for _ in range(2000):
        token = int(random.choice(_ids(constraint.mask())))
        constraint.accept(token)
        if token in ends:
            return tokenizer.decode(said)
        said.append(token)
        if constraint.finished:
            assert set(_ids(constraint.mask())) == ends
            return tokenizer.decode(said)
    raise AssertionError("the grammar never ended")


@pytest.mark.parametrize("seed", range(20))
def test_json_schema_gives_what_pydantic_accepts(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    text = _write(compiler.json_schema(Person.model_json_schema()), tokenizer, seed)
    Person.model_validate_json(text)


@pytest.mark.parametrize(
    "pattern", [r"[a-c]+d{2}", r"([0-9]{3}-)?[0-9]{4}", r"[^<]{1,9}/é?", "the (cat|mat)"]
)
@pytest.mark.parametrize("seed", range(5))
def test_regex_gives_what_re_matches(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, pattern: str, seed: int
) -> None:
    text = _write(compiler.regex(pattern), tokenizer, seed)
    assert re.fullmatch(pattern, text)


def test_json_object_and_lark(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    closing = tokenizer.encode('{"a": [1, {"b": null}]}')
    constraint = compiler.json_object()
    for token in closing:
        assert token in _ids(constraint.mask())
        constraint.accept(token)
    assert constraint.finished
    text = _write(compiler.lark('start: "(" start? ")"'), tokenizer, 3)
    assert text.count("(") == text.count(")") == len(text) / 2


@pytest.mark.parametrize("seed", range(5))
def test_tool_calls_are_calls(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    schema = {
        "type": "object",
        "properties": {"x": {"enum": [1, 2]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    text = _write(compiler.tool_calls({"f": schema, "g": schema}), tokenizer, seed)
    said, calls = parse_tool_calls(text)
    assert said == ""
    assert calls
    assert {call.name for call in calls} <= {"f", "g"}
    assert all(call.arguments["x"] in (1, 2) for call in calls)


def test_masks_are_llguidances(
    compiler: ConstraintCompiler, tokenizer: Tokenizer, model_dir: Path
) -> None:
    """Its Hugging Face reader sees tokenizer.json only, and every id is tried one by one too.

    Where text is forced, masks leave only its usual spelling in tokens.
    """
    theirs = llguidance.LLTokenizer(
        (model_dir / "tokenizer.json").read_text(),
        eos_token=[tokenizer.im_end_id, tokenizer.eot_id],
    )
    grammar = llguidance.LLMatcher.grammar_from_regex(r'\{"the": [0-9]{1,3}, "é": "[^"]*"\}')
    matcher = llguidance.LLMatcher(theirs, grammar)
    ours = compiler.regex(r'\{"the": [0-9]{1,3}, "é": "[^"]*"\}')
    free = 0
    for token in [*tokenizer.encode('{"the": 12, "é": "on the 猫"}'), tokenizer.im_end_id]:
        allowed = _ids(ours.mask())
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        assert list(allowed) == list(np.flatnonzero(np.unpackbits(mask, bitorder="little")))
        tried = [i for i in range(VOCAB) if matcher.validate_tokens([i]) == 1]
        forced = matcher.compute_ff_tokens()
        assert list(allowed) == (forced[:1] or tried) or ours.finished
        free += not forced
        ours.accept(token)
        assert matcher.consume_token(token)
    assert free > 5


def test_control_tokens_never_stand_for_text(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    constraint = compiler.json_schema({"type": "string"})
    for token in tokenizer.encode('"a'):
        constraint.accept(token)
    assert not tokenizer.special_ids & set(_ids(constraint.mask()))


def test_blanks_end(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.json_object()
    constraint.accept(tokenizer.encode("{")[0])
    (blank,) = tokenizer.encode("\n")
    count = 0
    while blank in _ids(constraint.mask()):
        constraint.accept(blank)
        count += 1
    assert 8 <= count <= 100


def test_a_token_that_does_not_fit_is_refused(
    compiler: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        compiler.regex("a").accept(tokenizer.encode("b")[0])


def _nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


@pytest.mark.parametrize(
    ("method", "source", "reason"),
    [
        ("json_schema", "{", "not JSON"),
        ("json_schema", "[]", "must be an object"),
        ("json_schema", _nested(400), "not JSON"),
        ("json_schema", _nested(40_000), "not JSON"),
        ("json_schema", {"type": "foo"}, "Invalid type: foo"),
        ("json_schema", {"$ref": "#/x"}, "does not exist"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "greater"),
        ("json_schema", {"type": "string", "pattern": "(?=a)"}, "look-around"),
        ("regex", "(a", "unclosed group"),
        ("lark", "start: nothing", "nothing"),
        ("tool_calls", {}, "no tool"),
        ("tool_calls", {"f": {"type": "foo"}}, "foo"),
    ],
)
def test_errors_are_one_line(
    compiler: ConstraintCompiler, method: str, source: Any, reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as raised:
        getattr(compiler, method)(source)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_schema_without_an_end_is_told_in_words(compiler: ConstraintCompiler) -> None:
    constraint = compiler.json_schema({"$ref": "#"})
    with pytest.raises(
        ConfigError, match="nothing can come next; does it refer to itself"
    ) as error:
        constraint.mask()
    assert "Parser" not in str(error.value)


def test_schema_may_be_text(compiler: ConstraintCompiler) -> None:
    schema = Person.model_json_schema()
    first, second = compiler.json_schema(schema), compiler.json_schema(json.dumps(schema))
    assert (first.mask() == second.mask()).all()
