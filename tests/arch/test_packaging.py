"""The wheel: built offline, holding four packages and nothing else, working anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.arch.source_tree import PACKAGES, ROOT, source_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    done = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT,
        cwd=out, PIP_NO_INDEX="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile",
        "--disable-pip-version-check", "--target", target, wheel, cwd=target,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_top_level_is_the_four_packages(wheel: Path) -> None:
    top = {name.split("/")[0] for name in names(wheel)}
    info = f"qwen2kit-{PROJECT['version']}.dist-info"
    assert top == {*PACKAGES, info}


def test_every_source_file_and_recipe_is_inside(wheel: Path) -> None:
    inside = names(wheel)
    for package, root in PACKAGES.items():
        kinds = ("*.toml", "*.jinja", "*.yaml", "*.sbatch", "*.html")
        data = [root / "py.typed", *(file for kind in kinds for file in root.rglob(kind))]
        for file in [f for f in source_files() if f.is_relative_to(root)] + data:
            assert f"{package}/{file.relative_to(root).as_posix()}" in inside
    assert any(name.startswith("qwen2kit/recipes/") and name.endswith(".toml") for name in inside)


def test_nothing_else_is_inside(wheel: Path) -> None:
    allowed = {".py", ".typed", ".toml", ".jinja", ".yaml", ".sbatch", ".json", ".txt", ".html"}
    strange = {
        name for name in names(wheel)
        if ".dist-info/" not in name and Path(name).suffix not in allowed
        and not name.endswith("py.typed")
    }  # fmt: skip
    assert strange == set()
    assert f"qwen2kit-{PROJECT['version']}.dist-info/licenses/LICENSE" in names(wheel)


def test_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = "import qwen2kit, qwen2kit_torch, qwen2kit_mlx; print(qwen2kit.__file__)"
    done = run(sys.executable, "-c", where, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed)
    done = run(sys.executable, "-m", "qwen2kit", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout


def test_wheel_brings_its_backends_and_recipes(installed: Path, tmp_path: Path) -> None:
    probe = (
        "from qwen2kit.backend.registry import available\n"
        "from qwen2kit.config.load import load_recipe, shipped\n"
        "print(*[info.name for info in available()])\n"
        "print(*[load_recipe(name).name for name in shipped()])\n"
    )
    done = run(sys.executable, "-c", probe, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    backends, recipes = done.stdout.splitlines()
    assert set(backends.split()) >= {"torch", "mlx"}
    assert recipes.split()


def test_console_script_is_installed(installed: Path, tmp_path: Path) -> None:
    script = installed / "bin" / "qwen2kit"
    assert script.is_file()
    done = run(sys.executable, script, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr


def test_version_is_said_once() -> None:
    import qwen2kit

    assert qwen2kit.__version__ == PROJECT["version"]


def test_extras_exist() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) >= {"torch", "mlx", "eval", "all", "dev"}
    markers = " ".join(extras["mlx"])
    assert "platform_machine == 'arm64'" in markers
    assert "sys_platform == 'linux'" in markers
