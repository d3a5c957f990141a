"""What third-party backends import stays where they import it from."""

from __future__ import annotations

from qwen2kit.backend import protocol, values

# Of protocol 3; a name may join, and leaves with a new PROTOCOL_VERSION only.
PROTOCOL_3 = {
    "PROTOCOL_VERSION", "AdapterModel", "Backend", "BackendInfo", "Capabilities", "CompiledModel",
    "Device", "DistributedBackend", "FinishReason", "LoadReport", "ProfiledModel", "Saved",
    "Saving", "Score", "ScoreRequest", "StepMetrics", "TokenBatch", "TokenEvent", "TokenIds",
    "TrainableModel",
}  # fmt: skip


def test_one_module_has_all_names_of_the_protocol() -> None:
    assert protocol.PROTOCOL_VERSION == 3
    assert set(protocol.__all__) >= PROTOCOL_3
    for name, value in vars(values).items():
        if getattr(value, "__module__", "") == values.__name__ and not name.startswith("_"):
            assert getattr(protocol, name) is value
