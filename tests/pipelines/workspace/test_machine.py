"""Which device a command runs on."""

from __future__ import annotations

import pytest
import torch

from pipelines.workspace.machine import DeviceError, choose_device


def test_auto_is_the_gpu_where_there_is_one() -> None:
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert choose_device() == choose_device("auto") == expected
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "cpu:cpu", "cuda:-1"])
def test_what_is_not_there_is_refused_with_what_is(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"no device '{name}' .* only cpu.*; name one of these"):
        choose_device(name)
