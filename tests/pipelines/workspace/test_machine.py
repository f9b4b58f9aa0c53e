"""Which device a command runs on, and the memory of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipelines.workspace import machine
from pipelines.workspace.machine import DeviceError, choose_device, memory_bytes


def test_auto_is_the_gpu_where_there_is_one() -> None:
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert choose_device() == choose_device("auto") == expected
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:cpu", "cuda:-1"])
def test_what_is_not_there_is_refused_with_what_is(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"no device '{name}' .* only cpu.*; name one of these"):
        choose_device(name)


def test_memory_is_that_of_the_device_which_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small GPU decided for a CPU, and the first GPU for the others."""
    on_cpu = memory_bytes("cpu")
    totals = [1000, 2000]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(total_memory=totals[torch.device(device).index or 0]),
    )
    assert [memory_bytes(one) for one in ("cuda:0", torch.device("cuda:1"), None)] == [
        1000, 2000, 2000,
    ]  # fmt: skip
    assert memory_bytes("cpu") == on_cpu > 2000


@pytest.mark.parametrize(
    ("own", "file", "limit", "counts"),
    [
        ("0::/", "memory.max", "1000", True),  # in a container
        ("0::/a.slice/b.scope", "a.slice/memory.max", "1000", True),
        ("4:cpu,memory:/docker/c", "memory/docker/c/memory.limit_in_bytes", "1000", True),
        ("3:cpu:/\n4:memory:/docker/c", "memory/memory.limit_in_bytes", "1000", True),
        ("0::/", "memory.max", "max", False),
        ("4:memory:/", "memory/memory.limit_in_bytes", str((1 << 63) - 4096), False),  # the largest
        ("3:cpu:/", "memory.max", "1000", False),
    ],
)
def test_a_container_s_limit_is_its_memory(
    own: str, file: str, limit: str, counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dry run said that a model fits which the system then killed."""
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    physical = memory_bytes("cpu")
    (tmp_path / "own").write_text(f"{own}\n")
    (tmp_path / "groups" / file).parent.mkdir(parents=True)
    (tmp_path / "groups" / file).write_text(f"{limit}\n")
    assert memory_bytes("cpu") == (1000 if counts else physical)
