"""``qwen2kit doctor``: versions, backends, devices, and what to install for what is missing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qwen2kit.cli.output import console, emit_json

_CORE = ("numpy", "pydantic", "tokenizers", "safetensors", "jinja2", "huggingface_hub", "gguf")
# Distribution, the extra that brings it (or how else), and what it is for.
_OPTIONAL = (
    ("torch", "qwen2kit[torch]", "training and inference on PyTorch"),
    ("mlx", "qwen2kit[mlx]", "inference on MLX"),
    ("lm-eval", "qwen2kit[eval]", "qwen2kit eval"),
    ("pyarrow", "qwen2kit[torch]", "parquet training data"),
    ("matplotlib", "qwen2kit[torch]", "the loss curve as an image"),
    ("transformers", "transformers", "a peer for qwen2kit parity"),
    ("mlx-lm", "mlx-lm", "a peer for qwen2kit parity"),
)


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Check the installation: versions, backends, devices, missing extras."""
    document = examine()
    if json_output:
        emit_json(document)
    else:
        _print(document)


def examine() -> dict[str, Any]:
    """Everything `doctor` reports, as JSON values."""
    import os
    import platform
    import sys

    import qwen2kit

    packages = {name: _version(name) for name in _CORE}
    optional = {
        name: {
            "version": _version(name),
            "for": purpose,
            "install": f"pip install {_quoted(source)}",
        }
        for name, source, purpose in _OPTIONAL
    }
    return {
        "qwen2kit": qwen2kit.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": packages,
        "optional": optional,
        "backends": _backends(),
    }


def _backends() -> dict[str, Any]:
    from qwen2kit.backend.registry import available, get
    from qwen2kit.errors import Qwen2KitError

    report: dict[str, Any] = {}
    for info in available():
        entry: dict[str, Any] = {"package": info.package, "usable": False}
        try:
            backend = get(info.name)
            capabilities = backend.capabilities()
            entry |= {
                "usable": True,
                "versions": backend.versions(),
                "devices": [
                    {"name": d.name, "kind": d.kind, "memory_bytes": d.memory_bytes}
                    for d in backend.devices()
                ],
                "dtypes": list(capabilities.dtypes),
                "trains": capabilities.trains,
            }
        except Qwen2KitError as error:
            entry["problem"] = str(error)
        except Exception as error:  # a broken framework may raise anything on first use
            entry["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        report[info.name] = entry
    return report


def _version(name: str) -> str | None:
    """Installed version of a distribution that can also be found by the import system."""
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    try:
        if find_spec(name.replace("-", "_")) is None:
            return None
        return version(name)
    except PackageNotFoundError:
        return None


def _quoted(source: str) -> str:
    return f"'{source}'" if "[" in source else source


def _print(document: dict[str, Any]) -> None:
    out = console()
    out.print(
        f"qwen2kit {document['qwen2kit']}, Python {document['python']}, {document['platform']}, "
        f"{document['cpus']} CPUs",
        markup=False,
        soft_wrap=True,
    )
    versions = ", ".join(f"{name} {version}" for name, version in document["packages"].items())
    out.print(f"packages: {versions}", markup=False, soft_wrap=True)
    for name, entry in document["backends"].items():
        out.print(f"backend {name}: {_backend_line(entry)}", markup=False, soft_wrap=True)
    for name, entry in document["optional"].items():
        if entry["version"]:
            out.print(f"{name} {entry['version']}", markup=False, soft_wrap=True)
        else:
            out.print(
                f"{name} is missing ({entry['for']}): {entry['install']}",
                markup=False,
                soft_wrap=True,
            )
    if not any(entry["usable"] for entry in document["backends"].values()):
        out.print("no backend is usable: pip install 'qwen2kit[all]'", markup=False, soft_wrap=True)


def _backend_line(entry: dict[str, Any]) -> str:
    if not entry["usable"]:
        return str(entry["problem"])
    devices = [
        device["kind"]
        if device["kind"] == device["name"]
        else f"{device['name']} ({device['kind']}"
        + (f", {device['memory_bytes'] / 2**30:.0f} GiB)" if device["memory_bytes"] else ")")
        for device in entry["devices"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in entry["versions"].items())
    trains = "trains and runs" if entry["trains"] else "runs"
    return f"{trains} on {'; '.join(devices)} [{versions}]"
