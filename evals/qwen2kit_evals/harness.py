"""Qwen2KitLM: the one lm-eval model, over scoring and continuous batching on any backend.

Requests are tokenised, split and truncated exactly as lm-eval's ``hf`` model does it, so that
per-sample results compare; how they are ordered and computed is left to the backend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qwen2kit.backend.loading import LoadedModel, load_model
from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.values import ScoreRequest
from qwen2kit.errors import ConfigError, DataError
from qwen2kit.spec.counts import count_params
from qwen2kit.tokenizer.lines import LineEncoder
from qwen2kit_evals.chat import render
from qwen2kit_evals.failed_tasks import for_each
from qwen2kit_evals.generation import (
    Asked,
    Decoding,
    decoding,
    together_by_default,
)
from qwen2kit_evals.progress import Progress
from qwen2kit_evals.request_log import RequestLog
from qwen2kit_evals.team import Team, Work, compute

DEFAULT_MAX_GEN_TOKS = 256
_LM_EVAL_DEVICE = "cuda:0"
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("qwen2kit")
class Qwen2KitLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of a loaded model.

    Args:
        pretrained: a `LoadedModel`, or what `load_model` takes (directory, GGUF, run, hub id).
        backend, device, dtype: as for `load_model`; unused when ``pretrained`` is loaded already.
        batch_size: prompts generated together; ``auto`` is what keeps the device busy. Scoring is
            batched by the backend.
        max_length: context limit in tokens; default the model's ``max_position_embeddings``.
        max_gen_toks: generated tokens where a task names no limit.
        prefix_token_id: what an empty context becomes; default ``<|endoftext|>``.
        seed: of sampling tasks.

    Attributes:
        log: answers known from an interrupted run, and where new ones are written.
        team: the other processes that answer, if there are any.
        answered: requests that were not found in the log.
        label: what stands before the progress bars.

    Raises:
        Qwen2KitError: the model cannot be loaded, or an argument is unknown or out of range.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        *,
        backend: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        prefix_token_id: int | None = None,
        seed: int = 1234,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(f"unknown model_args: {', '.join(sorted(unknown))}")
        if not isinstance(pretrained, LoadedModel):
            plan = ExecutionPlan(device=device, dtype=dtype)
            pretrained = load_model(pretrained, backend=backend, plan=plan)
        self.loaded = pretrained
        self.tokenizer = pretrained.tokenizer
        self.batch_size = _batch_size(batch_size, max_batch_size, pretrained)
        limit = pretrained.model.spec.context_length
        self.max_length = limit if max_length is None else min(int(max_length), limit)
        self.max_gen_toks = int(max_gen_toks)
        self.seed = int(seed)
        self.truncated = 0
        self.log = RequestLog()
        self.team: Team | None = None
        self.answered = 0
        self.label = ""
        self._prefix_token_id = prefix_token_id
        self._lines = LineEncoder(self.tokenizer)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Qwen2KitLM:
        """Build from lm-eval's ``--model_args``, which win over its ``--batch_size`` and such.

        lm-eval's own default ``--device cuda:0``, given or not, means the backend's best device.
        """
        extra = {k: v for k, v in (additional_config or {}).items() if v is not None}
        if extra.get("device") == _LM_EVAL_DEVICE:
            del extra["device"]
        return cls(**(extra | arg_dict))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Qwen2KitLM:
        """Like `create_from_arg_obj`, from ``key=value,key=value``."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """Id of ``<|endoftext|>``."""
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The token an empty context consists of."""
        return self.eot_token_id if self._prefix_token_id is None else self._prefix_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Token ids; special tokens written out in ``string`` count as such.

        ``add_special_tokens`` changes nothing: Qwen2 tokenizers add none.
        """
        return self.tokenizer.encode(string)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one; tokenised as
        lm-eval does it (spaces at the end of a context belong to its continuation)."""
        pairs, tasks = [request.args for request in requests], _tasks(requests)
        wanted = for_each(tasks, self._encode_pairs(pairs), self._request)
        answers = self._score(wanted, disable_tqdm, tasks)
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def _encode_pairs(
        self, pairs: Sequence[tuple[str, str]]
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], str]]:
        """Ids of context and continuation, and the continuation's text."""
        moved = []
        for context, continuation in pairs:
            kept = context.rstrip()
            moved.append((kept, context[len(kept) :] + continuation))
        encoded = self._lines.encode_pairs(moved)
        for (_, continuation), (ids, rest) in zip(pairs, encoded, strict=True):
            if not ids:
                given = rest[:1] == (self.prefix_token_id,)
                ids, rest = (rest[:1], rest[1:]) if given else ((self.prefix_token_id,), rest)
            yield ids, rest, continuation

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        wanted = (self._request(tuple(ids), tuple(rest), texts) for texts, ids, rest in requests)
        return self._score(wanted, disable_tqdm)

    def _score(
        self,
        requests: Iterable[ScoreRequest],
        disable_tqdm: bool,
        tasks: Sequence[str] | None = None,
    ) -> list[tuple[float, bool]]:
        wanted = list(requests)
        keys = self.log.score_keys(wanted)
        tasks = tasks or [""] * len(wanted)
        answers = self._answers("scoring", keys, wanted, tasks, disable_tqdm)
        if None in answers:
            raise RuntimeError(f"backend left {answers.count(None)} requests without a score")
        return [(logprob, greedy) for logprob, greedy in answers]

    def _answers(
        self, doing: str, keys: Sequence[str], work: Work, tasks: Sequence[str], quiet: bool
    ) -> list[Any]:
        """The answer of every request, from the log or computed; None where there is none."""
        answers, open_ = self.log.look_up(keys)
        known = [index for index, answer in enumerate(answers) if answer is not None]
        missing = cast(Work, [work[index] for index in open_])
        with Progress(f"{self.label}{doing}", tasks, known, disable=quiet) as progress:
            for place, answer in self._computed([keys[index] for index in open_], missing):
                answers[open_[place]] = answer
                self.answered += 1
                progress.answered(open_[place])
        return answers

    def _computed(self, keys: Sequence[str], work: Work) -> Iterator[tuple[int, Any]]:
        def own(indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
            part = cast(Work, [work[index] for index in indices])
            for place, answer in compute(self.loaded, part, together=self.batch_size):
                self.log.add(keys[indices[place]], answer)
                yield indices[place], answer

        if self.team is None or not work:
            return own(range(len(work)))
        return self.team.answers(keys, work, own)

    def _request(
        self, context: tuple[int, ...], continuation: tuple[int, ...], text: object
    ) -> ScoreRequest:
        """Cut from the left so that all but the last token fit the context limit."""
        if not continuation:
            raise DataError(f"continuation {text!r} adds no token to its context")
        if len(continuation) > self.max_length:
            raise DataError(
                f"a continuation of {len(continuation)} tokens exceeds the context limit of "
                f"{self.max_length}"
            )
        excess = max(0, len(context) + len(continuation) - (self.max_length + 1))
        self.truncated += bool(excess)
        return ScoreRequest(context[excess:], continuation)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability in nats of whole texts, each token predicted once, from as much context
        as fits (windows are lm-eval's own; the first one starts with the prefix token)."""
        texts = [request.args[0] for request in requests]
        owners: list[int] = []
        windows: list[TokenRequest] = []
        for owner, text in enumerate(texts):
            for context, continuation in self._windows(text):
                owners.append(owner)
                windows.append((None, context, continuation))
        totals = [0.0] * len(texts)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            totals[owner] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, pairs)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each cut before its first stop string.

        All requests run through one engine, `batch_size` at a time; what a request answers does
        not depend on the others.
        """
        tasks = _tasks(requests)
        asked = self._asked([request.args for request in requests], tasks)
        keys = self.log.text_keys((r.args for r in requests), [self.seed, self.max_gen_toks])
        texts = self._answers("generating", keys, asked, tasks, disable_tqdm)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _asked(
        self, arguments: Sequence[tuple[str, dict[str, Any]]], tasks: Sequence[str]
    ) -> list[Asked]:
        ways: dict[str, Decoding] = {}

        def ask(index: int, ids: list[int], gen_kwargs: dict[str, Any]) -> Asked:
            name = json.dumps(gen_kwargs, sort_keys=True, default=str)
            if name not in ways:
                ways[name] = decoding(
                    self.loaded, gen_kwargs, default_max_tokens=self.max_gen_toks, seed=self.seed
                )
            how = ways[name]
            room = self.max_length - how.sampling.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"{how.sampling.max_new_tokens} tokens to generate leave no room for a prompt "
                    f"in a context of {self.max_length}; take a model with a longer one, or lower "
                    "the task's max_gen_toks"
                )
            self.truncated += len(ids) > room
            # A stream of its own for every request: repeats of one prompt must differ.
            return Asked(tuple(ids[-room:] or [self.prefix_token_id]), how, stream=index)

        prompts = self._lines.encode([prompt for prompt, _ in arguments])
        options = (gen_kwargs for _, gen_kwargs in arguments)
        return for_each(tasks, zip(range(len(tasks)), prompts, options, strict=True), ask)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The checkpoint's template over ``chat_history``."""
        return render(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, or None when none was asked for.

        Raises:
            ConfigError: a template was asked for by name; checkpoints hold one without a name.
        """
        if isinstance(chat_template, str):
            raise ConfigError(f"no chat template named {chat_template!r}; the model has one only")
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes lm-eval's request caches: checkpoint name and a digest of the template."""
        template = self.tokenizer.chat_template or ""
        digest = hashlib.sha256(template.encode()).hexdigest()[:12]
        return f"{self.loaded.checkpoint.path.name}__{digest}"

    def get_model_info(self) -> dict[str, object]:
        """What lm-eval records about the model."""
        return {
            "model_num_parameters": count_params(self.loaded.model.spec).total,
            "model_dtype": self.loaded.plan.dtype,
            "model_backend": self.loaded.backend.name,
            "model_path": str(self.loaded.checkpoint.path),
        }


def _tasks(requests: Sequence[Instance]) -> list[str]:
    return [request.task_name or "" for request in requests]


def _batch_size(value: int | str, limit: int | None, loaded: LoadedModel) -> int:
    if value == "auto":
        most = together_by_default(loaded)
        return most if limit is None else min(most, limit)
    if not str(value).isdigit() or int(value) < 1:
        raise ConfigError(f"batch_size must be a positive integer or auto, got {value!r}")
    return int(value)
