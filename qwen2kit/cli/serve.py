"""``qwen2kit serve``: OpenAI's API over a model of ours, with a chat page."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2kit.cli.drafting import (
    DraftOption,
    PromptLookupOption,
    check_guessing,
    drafter_maker,
)
from qwen2kit.cli.model_options import (
    Adapter,
    BackendName,
    CacheBits,
    DeviceName,
    DType,
    Model,
    WeightBits,
)
from qwen2kit.cli.output import console, show_notes
from qwen2kit.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from qwen2kit.backend.loading import LoadedModel
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.serve.server import Serving

_KEY_VARIABLE = "QWEN2KIT_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default its file name.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY_VARIABLE,
            show_envvar=True,
            help="Asked of every client as bearer token; the variable hides it from ps.",
        ),
    ] = None,
    backend: BackendName = "auto",
    dtype: DType = "auto",
    device: DeviceName = "auto",
    adapter: Adapter = None,
    cache_bits: CacheBits = None,
    weight_bits: WeightBits = None,
    context: Annotated[
        int, typer.Option(min=2, help="Longest sequence, prompt and answer, in tokens.")
    ] = 8192,
    slots: Annotated[int, typer.Option(min=1, help="Sequences computed together.")] = 16,
    queue: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; more get status 429.")
    ] = 64,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Most prompt tokens read between two steps.")
    ] = 2048,
    draft: DraftOption = None,
    prompt_lookup: PromptLookupOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default what the context holds.")
    ] = None,
    max_choices: Annotated[
        int, typer.Option(min=1, help="Most choices of one request (n times prompts).")
    ] = 16,
    max_body: Annotated[int, typer.Option(min=1, help="Largest request body in MiB.")] = 8,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds running requests get after SIGTERM.")
    ] = 30.0,
) -> None:
    """Serve a model over HTTP: OpenAI's API, metrics, and a chat page at /."""
    _require_extra()
    _check_key(api_key)
    check_guessing(draft, prompt_lookup)
    from qwen2kit.backend.plan import ExecutionPlan
    from qwen2kit.engine.text import TextEngine
    from qwen2kit.serve.limits import Limits
    from qwen2kit.serve.own_thread import OwnThread
    from qwen2kit.serve.server import Serving, listen
    from qwen2kit.serve.server import serve as run

    limits = Limits(
        slots=slots,
        queue=queue,
        max_tokens=max_tokens,
        max_choices=max_choices,
        max_body=max_body << 20,
        grace=grace,
    )
    bound = listen(host, port)
    home = OwnThread("engine")

    def load() -> tuple[LoadedModel, TextEngine]:
        plan = ExecutionPlan(
            device=device, dtype=dtype, cache_bits=cache_bits, weight_bits=weight_bits
        )
        loaded = _load(model, backend=backend, plan=plan, adapter=adapter)
        make_drafter = drafter_maker(loaded, draft, prompt_lookup)
        capacity = min(context, loaded.model.limit)
        drafter = None if make_drafter is None else make_drafter(slots, capacity)
        engine = TextEngine(
            loaded,
            slots=slots,
            capacity=capacity,
            prefill_tokens=prefill_tokens,
            drafter=drafter,
        )
        with console().status("compiling for this device"):
            engine.engine.prepare()
        return loaded, engine

    loaded, engine = home.run(load).result()
    serving = Serving(
        home=home,
        loaded=loaded,
        name=name or _name(model),
        engine=engine,
        limits=replace(limits, slots=engine.engine.slots),
        api_key=api_key,
    )
    run(serving, bound, lambda: _announce(serving, host, bound.getsockname()[1]))


def _check_key(api_key: str | None) -> None:
    """An empty variable is a mistake, not a wish to be open to everybody."""
    key = os.environ.get(_KEY_VARIABLE) if api_key is None else api_key
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise ConfigError(
            "the API key must be printable ASCII and not empty; "
            f"unset {_KEY_VARIABLE} to ask for none"
        )


def _require_extra() -> None:
    from importlib.util import find_spec

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingExtra("serve", package)


def _load(model: str, *, backend: str, plan: ExecutionPlan, adapter: str | None) -> LoadedModel:
    from qwen2kit.backend.loading import load_model

    with console().status(f"loading {model}"):
        loaded = load_model(model, backend=backend, plan=plan, adapter=adapter)
    show_notes(loaded.notes)
    return loaded


def _name(model: str) -> str:
    """The last part of a path without ``.gguf``; a hub id as it is."""
    path = Path(model)
    if not path.exists():
        return model
    return path.resolve().name.removesuffix(".gguf")


def _announce(serving: Serving, host: str, port: int) -> None:
    root = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    size = f"{serving.limits.slots} slots of {serving.engine.engine.capacity} tokens"
    for line in (f"serving {serving.name} at {root}/v1 ({size})", f"chat page: {root}/"):
        console().print(line, markup=False, soft_wrap=True)
    if serving.api_key is None and host not in _LOOPBACK:
        show_notes([f"anybody who reaches this address may use it; set {_KEY_VARIABLE}"])
