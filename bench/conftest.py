"""Benchmarks run where they are: on the accelerator if there is one, else on two CPU threads."""

import pytest
import torch

from fastpref.commands.cli import default_device


@pytest.fixture(scope="session")
def device():
    name = default_device()
    if name == "cpu":
        torch.set_num_threads(2)
    return name
