"""Prompts are what lm-eval makes of them, with each template compiled once."""

from __future__ import annotations

import pytest
from lm_eval import utils

from qwen2kit_evals.prompt_templates import compiled_once

TEMPLATE = "{{a}} {% if b %}and {{b[0]}}{% endif %}\n"
DOCUMENTS = [{"a": 1, "b": ["x"]}, {"a": "é", "b": []}, {"a": 1, "b": ["x"]}]


def test_templates_are_compiled_once_and_render_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [utils.apply_template(TEMPLATE, document) for document in DOCUMENTS]
    compiled: list[str] = []
    compile_ = type(utils.env).compile

    def counted(self, source, *args, **kwargs):  # type: ignore[no-untyped-def]
        compiled.append(source)
        return compile_(self, source, *args, **kwargs)

    monkeypatch.setattr(type(utils.env), "compile", counted)
    with compiled_once():
        cached = [utils.apply_template(TEMPLATE, document) for document in DOCUMENTS]
        other = utils.apply_template("{{a}}!", DOCUMENTS[0])
    assert (cached, other) == (plain, "1!")
    assert compiled == [TEMPLATE, "{{a}}!"]
    utils.apply_template(TEMPLATE, DOCUMENTS[0])
    assert compiled[2:] == [TEMPLATE]  # afterwards lm-eval is as it was
