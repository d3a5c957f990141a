"""Proof that a conversion computes the same model: tensors, then logits on every backend."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from qwen2kit.backend.plan import ExecutionPlan
from qwen2kit.backend.protocol import CompiledModel
from qwen2kit.backend.registry import get, installed
from qwen2kit.errors import BackendError, ParityError
from qwen2kit.parity.layers import Divergence, first_divergence, state_name
from qwen2kit.parity.metrics import LogitDelta, compare_logits
from qwen2kit.parity.prompts import prompt_set
from qwen2kit.spec.model import ModelSpec, SlidingWindowSpec
from qwen2kit.weights.checkpoint import Checkpoint
from qwen2kit.weights.verify_tensors import TensorCheck, check_tensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_TOLERANCE = 1e-3
_PROMPT_TOKENS = 64
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitCheck:
    """Logits of two models on the prompt set, in float32.

    Attributes:
        first, second: ``source on torch`` and so on.
        delta: how far they are apart.
        binding: whether the tolerance applies; the loss of a rounded or quantised conversion is
            reported, not judged.
        passed: within tolerance, or not binding.
        layers: residual streams layer by layer, if it failed.
    """

    first: str
    second: str
    delta: LogitDelta
    binding: bool
    passed: bool
    layers: Divergence | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        values["delta"] = self.delta.to_dict()
        if self.layers is not None:
            values["layers"] = {
                "first": self.layers.where,
                "relative": {
                    state_name(index, len(self.layers.relative)): value
                    for index, value in enumerate(self.layers.relative)
                },
            }
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """Outcome of `verify`.

    Attributes:
        tensors: one check per parameter.
        logits: source against target on each backend, then backends against each other on the
            target.
        lossless: every parameter has equal values.
        tolerance: largest allowed absolute difference of logits where binding.
        not_applicable: backends that cannot run this model, with the reason.
    """

    tensors: tuple[TensorCheck, ...]
    logits: tuple[LogitCheck, ...]
    lossless: bool
    tolerance: float
    not_applicable: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether tensors are as expected and every binding logit check holds."""
        tensors = all(check.verdict != "different" for check in self.tensors)
        return tensors and all(check.passed for check in self.logits)

    @property
    def verdicts(self) -> dict[str, int]:
        """Number of tensors per verdict."""
        return dict(Counter(check.verdict for check in self.tensors))

    def require(self) -> None:
        """Raise ParityError, naming the worst offender, unless `passed`."""
        wrong = [check for check in self.tensors if check.verdict == "different"]
        if wrong:
            worst = max(wrong, key=lambda check: check.relative)
            raise ParityError(
                f"{len(wrong)} tensors of the conversion differ from the source; worst: "
                f"{worst.name} by {worst.max_abs:.3g} (relative {worst.relative:.3g})"
            )
        failed = [check for check in self.logits if not check.passed]
        if failed:
            bad = max(failed, key=lambda check: check.delta.max_abs)
            where = "" if bad.layers is None else f"; first difference: {bad.layers.where}"
            raise ParityError(
                f"logits of {bad.first} and {bad.second} differ by up to {bad.delta.max_abs:.3g}, "
                f"tolerance {self.tolerance:g}{where}"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "passed": self.passed,
            "lossless": self.lossless,
            "tolerance": self.tolerance,
            "verdicts": self.verdicts,
            "max_abs": max(check.max_abs for check in self.tensors),
            "logits": [check.to_dict() for check in self.logits],
            "not_applicable": self.not_applicable,
        }


def verify(
    source: Checkpoint,
    target: Checkpoint,
    backends: Sequence[str] | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    *,
    strict: bool = True,
    progress: Progress = lambda message: None,
) -> VerifyReport:
    """Compare a conversion with its source.

    Every parameter must be equal, exactly rounded, or within its quantisation's error. Where all
    are equal, logits of source and target must agree within ``tolerance`` on every backend; else
    that difference is reported. Different backends must always agree on the target.

    Args:
        source, target: opened checkpoints.
        backends: names; by default every installed one.
        tolerance: on absolute logit differences in float32.
        strict: raise instead of returning a report that did not pass.
        progress: called with what is being done.

    Raises:
        ParityError: the specs differ; or, if ``strict``, anything else does.
        BackendError: a backend named in ``backends`` cannot run the model.
    """
    _check_specs(source.spec, target.spec)
    tensors = tuple(check_tensors(source, target, progress))
    lossless = all(check.verdict == "equal" for check in tensors)
    runner = _Runner(source, target, progress)
    not_applicable: dict[str, str] = {}
    names = []
    for name in installed() if backends is None else backends:
        try:
            runner.run(name)
            names.append(name)
        except BackendError as error:
            if backends is not None:
                raise
            not_applicable[name] = str(error)
    pairs = [(("source", name), ("target", name), lossless) for name in names]
    pairs += [(("target", names[0]), ("target", name), True) for name in names[1:]]
    report = VerifyReport(
        tensors=tensors,
        logits=tuple(runner.check(a, b, binding, tolerance) for a, b, binding in pairs),
        lossless=lossless,
        tolerance=tolerance,
        not_applicable=not_applicable,
    )
    if strict:
        report.require()
    return report


_Key = tuple[str, str]


class _Runner:
    """Runs source and target on backends, one loaded model at a time, and keeps the logits."""

    def __init__(self, source: Checkpoint, target: Checkpoint, progress: Progress) -> None:
        self._checkpoints = {"source": source, "target": target}
        self._progress = progress
        prompts = prompt_set(source.tokenizer(), context=source.spec.max_position_embeddings)
        self._prompts = [prompt.tokens[:_PROMPT_TOKENS] for prompt in prompts]
        self._logits: dict[_Key, NDArray[np.float32]] = {}

    def run(self, backend: str) -> None:
        import numpy as np

        for side in self._checkpoints:
            self._progress(f"{side} on {backend}: logits")
            model = self._load((side, backend))
            logits = [model.logits(tokens) for tokens in self._prompts]
            self._logits[side, backend] = np.concatenate(logits)
            del model
            gc.collect()

    def check(self, first: _Key, second: _Key, binding: bool, tolerance: float) -> LogitCheck:
        delta = compare_logits(self._logits[first], self._logits[second])
        check = LogitCheck(
            first=" on ".join(first),
            second=" on ".join(second),
            delta=delta,
            binding=binding,
            passed=not binding or delta.within(tolerance),
        )
        if check.passed:
            return check
        return replace(check, layers=first_divergence(self._states(first), self._states(second)))

    def _states(self, key: _Key) -> NDArray[np.float32]:
        self._progress(f"{' on '.join(key)}: hidden states")
        model = self._load(key)
        states = model.hidden_states(self._prompts[0])
        del model
        gc.collect()
        return states

    def _load(self, key: _Key) -> CompiledModel:
        side, backend = key
        checkpoint = self._checkpoints[side]
        model = get(backend).compile(checkpoint.spec, ExecutionPlan(dtype="float32"))
        model.load(checkpoint.weights)
        return model


def _check_specs(source: ModelSpec, target: ModelSpec) -> None:
    """ParityError unless both specs compute the same function."""
    ours, theirs = _computing(source), _computing(target)
    differing = [
        f"{f.name} ({getattr(ours, f.name)} and {getattr(theirs, f.name)})"
        for f in fields(ModelSpec)
        if getattr(ours, f.name) != getattr(theirs, f.name)
    ]
    if differing:
        raise ParityError("the two models differ in " + ", ".join(differing))


def _computing(spec: ModelSpec) -> ModelSpec:
    """The spec without what does not enter the forward pass."""
    return replace(
        spec,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        window=spec.window if spec.window.enabled else SlidingWindowSpec(),
        moe=None
        if spec.moe is None
        else replace(spec.moe, router_aux_loss_coef=0.001, output_router_logits=False),
    )
