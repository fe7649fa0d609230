import hypothesis
import pytest
import torch

# The same examples every time, and no deadline: continuous integration is no stopwatch.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
