import os

import hypothesis
import pytest
import torch

# Before Triton is imported by anything: without a GPU, kernels run on its interpreter. Nothing else takes notice.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples every time, and no deadline: continuous integration is no stopwatch.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
