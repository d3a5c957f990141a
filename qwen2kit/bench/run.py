"""A whole benchmark of one loaded model, section by section."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from qwen2kit.backend.meter import MeteredBackend
from qwen2kit.bench.measure import measure_decode, measure_prefill, measure_throughput
from qwen2kit.bench.report import decode_entry, prefill_entry, throughput_entry
from qwen2kit.bench.roof import Held, Roof, roof_of
from qwen2kit.errors import BackendError, ConfigError
from qwen2kit.spec.counts import count_params

if TYPE_CHECKING:
    from qwen2kit.backend.meter import DeviceMeter
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.backend.protocol import Backend, CompiledModel
    from qwen2kit.backend.values import Device, LoadReport
    from qwen2kit.bench.measure import OpenDrafter, Prompts
    from qwen2kit.weights.source import WeightSource
    from qwen2kit.weights.tensor import DType

Notice = Callable[[str], None]
LONGEST = 600.0
"""Seconds that a number of streams may take at the roof; in truth it is several times as long."""
_LARGEST = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is timed.

    Attributes:
        prefill: prompt lengths in tokens.
        contexts: prompt lengths before decoding one stream.
        streams: numbers of streams that run together.
        prompt: prompt tokens of each such stream.
        new: generated tokens, at least 2.
        repeats: of prefill and decoding.

    Raises:
        ConfigError: a number is too small or makes no sense.
    """

    prefill: tuple[int, ...] = (128, 512, 2048)
    contexts: tuple[int, ...] = (512,)
    streams: tuple[int, ...] = (1, 8, 64)
    prompt: int = 128
    new: int = 64
    repeats: int = 3

    def __post_init__(self) -> None:
        counts = (*self.prefill, *self.contexts, *self.streams, self.prompt, self.repeats)
        if min(counts) < 1:
            raise ConfigError(f"lengths, streams and repeats must be positive, got {min(counts)}")
        if max(*counts, self.new) > _LARGEST:
            raise ConfigError(f"numbers of more than {_LARGEST:,} make no sense here")
        if self.new < 2:
            raise ConfigError(f"at least 2 new tokens are needed to time decoding, got {self.new}")

    def longest(self) -> int:
        """Tokens of the longest sequence."""
        generated = [length + self.new for length in (*self.contexts, self.prompt)]
        return max(*generated, *(length + 1 for length in self.prefill), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model to be measured.

    Attributes:
        name: for the report.
        backend, model, plan: see `qwen2kit.backend.loading.LoadedModel`.
        weights: where its weights come from.
        prompts: makes prompts.
        vocab_limit: ids from here on are never produced.
    """

    name: str
    backend: Backend
    model: CompiledModel
    plan: ExecutionPlan
    weights: WeightSource
    prompts: Prompts
    vocab_limit: int | None = None


def measured_roof(subject: Subject, work: Workload, notice: Notice) -> Roof | None:
    """What the device can do at best for a model, whose weights need not be loaded yet; None
    where the backend cannot measure it.

    Raises:
        ConfigError: a sequence is longer than the model takes, or so many streams take longer
            than anyone waits.
    """
    if work.longest() > subject.model.limit:
        raise ConfigError(
            f"the longest sequence would be {work.longest()} tokens, but the model takes "
            f"{subject.model.limit}; lower --prefill, --contexts, --prompt or --new"
        )
    meter = _meter(subject)
    if meter is None:
        return None
    notice("measuring the device")
    roof = _roof(subject, meter)
    for streams in work.streams:
        check_streams(roof, streams, work)
    return roof


def bench(
    subject: Subject,
    work: Workload,
    *,
    report: LoadReport,
    roof: Roof | None,
    drafter: OpenDrafter | None = None,
    notice: Notice,
) -> dict[str, Any]:
    """Measure everything; a section that fails is left out, with its reason in ``failures``.

    Args:
        subject: the model, loaded by now.
        work: what is timed.
        report: of loading it.
        roof: see `measured_roof`.
        drafter: guesses ahead while decoding.
        notice: told what is being measured.

    Raises:
        BackendError: every section failed.
    """
    meter = _meter(subject)
    if meter is not None:
        meter.reset_peak()
    failures: list[str] = []
    sections: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": [], "throughput": []}
    for section, label, measure in _measurements(subject, work, roof, drafter):
        notice(label)
        try:
            sections[section].append(measure())
        except (BackendError, MemoryError, RuntimeError) as error:  # frameworks' memory errors
            failures.append(f"{label}: {' '.join(str(error).split()) or type(error).__name__}")
    if failures and not any(sections.values()):
        raise BackendError(f"nothing could be measured; {failures[0]}")
    loading = {"seconds": report.seconds, "bytes": report.bytes}
    facts = _facts(subject, meter, roof)
    return {**facts, "load": loading, **sections, "failures": failures}


def check_streams(roof: Roof, streams: int, work: Workload) -> None:
    """Refuse streams that take more than ``LONGEST`` seconds at the device's very best.

    Raises:
        ConfigError: they do; says how many do not.
    """

    def least(count: int) -> float:
        prompts = 2 * count * roof.prefill(work.prompt)  # once more to warm up
        return prompts + work.new * roof.decode(work.prompt + work.new / 2, count)

    if least(streams) <= LONGEST:
        return
    most = streams
    while most > 1 and least(most) > LONGEST:
        most = most * 9 // 10
    raise ConfigError(
        f"{streams} streams of {work.prompt} and {work.new} tokens take "
        f"{least(streams) / 60:,.0f} minutes on this device at best; ask for --streams {most} or "
        "fewer, or for a shorter --prompt"
    )


def _measurements(
    subject: Subject, work: Workload, roof: Roof | None, drafter: OpenDrafter | None
) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Section, description and the work itself, in order."""
    model, prompts, limit = subject.model, subject.prompts, subject.vocab_limit

    def prefill(length: int) -> dict[str, Any]:
        return prefill_entry(measure_prefill(model, length, prompts, work.repeats, limit), roof)

    def decode(context: int) -> dict[str, Any]:
        found = measure_decode(model, context, work.new, prompts, work.repeats, limit, drafter)
        return decode_entry(found, roof)

    def throughput(streams: int) -> dict[str, Any]:
        found = measure_throughput(model, streams, work.prompt, work.new, prompts, limit, drafter)
        return throughput_entry(found, roof)

    for length in work.prefill:
        yield "prefill", f"prefill of {length} tokens", partial(prefill, length)
    for context in work.contexts:
        yield "decode", f"decoding after {context} tokens", partial(decode, context)
    for streams in work.streams:
        yield "throughput", f"{streams} streams", partial(throughput, streams)


def _meter(subject: Subject) -> DeviceMeter | None:
    backend = subject.backend
    return backend.meter(subject.plan) if isinstance(backend, MeteredBackend) else None


def _roof(subject: Subject, meter: DeviceMeter) -> Roof:
    plan = subject.plan
    held = Held(
        cast("DType", meter.dtype),
        packed=subject.backend.capabilities().quantized_bits,
        weight_bits=plan.weight_bits,
        group=plan.weight_group_size,
        cache_bits=plan.cache_bits,
    )
    return roof_of(
        subject.model.spec,
        subject.weights,
        held,
        bandwidth=meter.copy_bandwidth(),
        matmul=meter.matmul_rate(),
    )


def _facts(subject: Subject, meter: DeviceMeter | None, roof: Roof | None) -> dict[str, Any]:
    device = _device(subject)
    limits = (
        None if roof is None else {"copy_bandwidth": roof.bandwidth, "matmul_flops": roof.matmul}
    )
    return {
        "model": subject.name,
        "parameters": count_params(subject.model.spec).total,
        "backend": subject.backend.name,
        "versions": subject.backend.versions(),
        "device": {"name": device.name, "kind": device.kind, "memory_bytes": device.memory_bytes},
        "dtype": None if meter is None else meter.dtype,
        "weight_bits": subject.plan.weight_bits,
        "cache_bits": subject.plan.cache_bits,
        "memory": {
            "decode_weight_bytes": None if roof is None else roof.weights,
            "peak_bytes": None if meter is None else meter.peak_memory(),
        },
        "roof": limits,
    }


def _device(subject: Subject) -> Device:
    """The device a plan names; the best one for ``auto``."""
    devices = subject.backend.devices()
    return next((d for d in devices if d.name.startswith(subject.plan.device)), devices[0])
