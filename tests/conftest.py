"""What is set before any test file is imported, and fixtures that several of them share."""

from __future__ import annotations

import os

import pytest
import torch

# Triton decides when a kernel is defined whether its interpreter will run it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def one_thread():
    """What is as small as the tests' models only loses by a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
