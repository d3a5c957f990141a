"""The tokenizer every part of the kit uses: byte-level BPE with control tokens and a template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2kit.errors import TokenizerError
from qwen2kit.tokenizer import families
from qwen2kit.tokenizer.byte_level import CHAR_TO_BYTE
from qwen2kit.tokenizer.chat_template import ChatTemplate, Message
from qwen2kit.tokenizer.content_guard import ContentGuard
from qwen2kit.tokenizer.document import (
    ENDOFTEXT,
    IM_END,
    IM_START,
    PRETOKENIZE_REGEX,
    TokenizerParts,
    compile_document,
)

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Text to ids and back, and conversations to prompts.

    Args:
        parts: a tokenizer read from any format.

    Raises:
        TokenizerError: the parts contradict each other.

    Attributes:
        chat_template: the checkpoint's template, else its family's; None if it knows no ChatML.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._encoder = compile_document(parts.document, parts.origin)
        self._parts = replace(parts, document={})
        self._added = self._encoder.get_added_tokens_decoder()
        self._by_content = {token.content: index for index, token in self._added.items()}
        self._bytes: dict[int, bytes] = {}
        builtin = families.detect(self._by_content)
        self.chat_template = parts.chat_template or (builtin.template if builtin else None)
        for token in (parts.eos_token, parts.pad_token):
            if token is not None and self.token_to_id(token) is None:
                raise TokenizerError(f"{parts.origin}: {token!r} is not in the vocabulary")

    @classmethod
    def from_dir(cls, path: Path) -> Tokenizer:
        """Read tokenizer.json, vocab.json + merges.txt or qwen.tiktoken from a directory.

        Raises:
            TokenizerError: no tokenizer there, or a damaged file (named).
        """
        from qwen2kit.tokenizer.formats import parts_from_dir

        return cls(parts_from_dir(Path(path)))

    @classmethod
    def from_gguf(cls, fields: Mapping[str, object]) -> Tokenizer:
        """Read ``tokenizer.*`` GGUF metadata given as plain values.

        Raises:
            TokenizerError: a field is missing or malformed, or not a Qwen2 tokenizer.
        """
        from qwen2kit.tokenizer.gguf_metadata import parts_from_gguf

        return cls(parts_from_gguf(fields))

    @cached_property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included; embedding rows from here on are untrained."""
        return max(self._encoder.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids of a text: vocabulary, merges, added tokens,
        normalisation and splitting. The same for every file format of one tokenizer."""
        document = json.loads(self._encoder.to_str())
        added = [[entry["id"], entry["content"]] for entry in document["added_tokens"]]
        merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
        splits = re.findall(r'"Regex": "(?:[^"\\]|\\.)*"', json.dumps(document["pre_tokenizer"]))
        content = [self._encoder.get_vocab(), merges, added, document["normalizer"], splits]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def begins_anew_at_lines(self) -> bool:
        """Whether a line that begins with an ASCII letter has the same ids whatever stands before
        it: so with Qwen2's normalisation and splitting, and added tokens that take no space."""
        parts = self._encoder.pre_tokenizer, self._encoder.normalizer
        splits, normalizer = (json.loads(p.__getstate__()) if p else None for p in parts)
        return (
            json.dumps({"Regex": PRETOKENIZE_REGEX}) in json.dumps(splits)
            and normalizer in (None, {"type": "NFC"})
            and not any(t.lstrip or t.rstrip or "\n" in t.content for t in self._added.values())
        )

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens (``<tool_call>`` and its like are ordinary)."""
        return frozenset(index for index, token in self._added.items() if token.special)

    @property
    def eot_id(self) -> int:
        """``<|endoftext|>``, the end of a document."""
        return self.require_id(ENDOFTEXT)

    @property
    def im_start_id(self) -> int:
        """``<|im_start|>``, the start of a chat turn."""
        return self.require_id(IM_START)

    @property
    def im_end_id(self) -> int:
        """``<|im_end|>``, the end of a chat turn."""
        return self.require_id(IM_END)

    @property
    def pad_id(self) -> int:
        """The padding token; ``<|endoftext|>`` if the files name none."""
        return self.require_id(self._parts.pad_token or ENDOFTEXT)

    @property
    def eos_id(self) -> int:
        """The end-of-sequence token of the files; ``<|endoftext|>`` if they name none."""
        return self.require_id(self._parts.eos_token or ENDOFTEXT)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end generation: the family's full list, most specific first."""
        found = (self.token_to_id(token) for token in families.STOP_TOKENS)
        return tuple(dict.fromkeys([i for i in found if i is not None] + [self.eos_id]))

    @property
    def model_max_length(self) -> int | None:
        """Context length in tokens as the files state it."""
        return self._parts.model_max_length

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in vocabulary spelling, None if there is none."""
        index: int | None = self._encoder.token_to_id(token)
        return index

    def require_id(self, token: str) -> int:
        """Like `token_to_id`, but raises TokenizerError for an unknown token."""
        index = self.token_to_id(token)
        if index is None:
            raise TokenizerError(f"{self._parts.origin}: the vocabulary has no {token}")
        return index

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for. Raises TokenizerError for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Ids of ``text``; nothing is added at either end.

        Args:
            text: any Unicode text; NFC is applied as the model was trained.
            allow_special: recognise control tokens written in ``text``. False treats
                ``<|im_start|>`` as the characters it is made of.

        Raises:
            TokenizerError: ``text`` holds lone surrogates.
        """
        return self.encode_many([text], allow_special=allow_special)[0]

    def encode_many(self, texts: Sequence[str], *, allow_special: bool = True) -> list[list[int]]:
        """`encode` for many texts, in parallel."""
        encoder = self._encoder if allow_special else self._literal
        try:
            found = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            raise TokenizerError(
                "text is not valid Unicode (it holds lone surrogates); decode it as UTF-8 first"
            ) from None
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TokenizerError: an id outside the vocabulary.
        """
        skipped = self.special_ids if skip_special else frozenset()
        data = b"".join([self.token_bytes(i) for i in ids if i not in skipped])
        return data.decode("utf-8", errors="replace")

    @property
    def default_system(self) -> str | None:
        """The system prompt the template inserts into a conversation without one."""
        return self._template.default_system

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a conversation, by the checkpoint's template.

        Raises:
            TokenizerError: malformed messages, or the template fails or is missing.
        """
        names = {"eos_token": self._parts.eos_token, "pad_token": self._parts.pad_token}
        names["bos_token"] = self._parts.bos_token
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            special_tokens={key: name for key, name in names.items() if name is not None},
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of `render_chat`, where only the template can write control tokens.

        A control token spelled out in a message stays text, so that content cannot open or close
        turns. Raises as `render_chat`.
        """
        guard = ContentGuard(self, messages, tools)
        text = self.render_chat(
            guard.messages, add_generation_prompt=add_generation_prompt, tools=guard.tools
        )
        return guard.encode(text)

    def save(self, directory: Path, *, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json for transformers, mlx-lm and this kit.

        Args:
            directory: created if absent.
            model_max_length: context length to state; the one read from the files by default.
        """
        from qwen2kit.tokenizer.save import write_tokenizer

        parts = replace(
            self._parts,
            chat_template=self.chat_template,
            model_max_length=model_max_length or self.model_max_length,
        )
        write_tokenizer(Path(directory), self._encoder, parts)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise TokenizerError(
                f"{self._parts.origin}: no chat template and no ChatML tokens; "
                "use an instruct checkpoint to chat"
            )
        return ChatTemplate(self.chat_template)

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A second encoder that never recognises control tokens (a switch would not be safe
        to flip while another thread encodes)."""
        import tokenizers

        encoder = tokenizers.Tokenizer.from_str(self._encoder.to_str())
        encoder.encode_special_tokens = True
        return encoder

    def _spell(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return str(added.content).encode("utf-8")
        token = self._encoder.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise TokenizerError(
                f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens"
            )
        return bytes(CHAR_TO_BYTE[char] for char in token)
