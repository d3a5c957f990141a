"""``qwen2kit doctor`` on this machine, and with frameworks hidden."""

from __future__ import annotations

from importlib.metadata import version

from tests.run_cli import run_cli, run_json


def test_versions_and_backends() -> None:
    document = run_json("doctor", cold=True)
    assert document["packages"]["numpy"] == version("numpy")
    assert set(document["backends"]) >= {"torch", "mlx"}
    for backend in document["backends"].values():
        if backend["usable"]:
            assert backend["devices"]
            assert "float32" in backend["dtypes"]
        else:
            assert backend["problem"]


def test_version() -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"qwen2kit {version('qwen2kit')}\n")


def test_hidden_frameworks_are_reported_with_their_remedy() -> None:
    document = run_json("doctor", hide="torch,mlx,lm_eval")
    for name in ("torch", "mlx"):
        assert not document["backends"][name]["usable"]
        assert f"qwen2kit[{name}]" in document["backends"][name]["problem"]
    assert document["optional"]["lm-eval"]["version"] is None
    assert document["optional"]["lm-eval"]["install"] == "pip install 'qwen2kit[eval]'"


def test_table_names_what_to_install() -> None:
    done = run_cli("doctor", hide="torch,mlx")
    assert done.returncode == 0
    assert "no backend is usable" in done.stderr
    assert "pip install 'qwen2kit[torch]'" in done.stderr
