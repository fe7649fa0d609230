import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from debiformer.ops import merge, pad_to_grid, partition, reference
from debiformer.ops.regions import as_grid

sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(size=sizes, grid=grids)
def test_merge_undoes_partition_of_any_map(size, grid):
    x = torch.randn(2, *size, 3)
    padded = pad_to_grid(x, grid)
    assert padded.shape[1] % grid[0] == 0
    assert padded.shape[2] % grid[1] == 0
    assert padded.shape[1] - size[0] < grid[0]
    assert padded.shape[2] - size[1] < grid[1]
    assert padded.sum() == pytest.approx(x.sum().item(), abs=1e-4)
    assert torch.equal(merge(partition(padded, grid), grid, padded.shape[1:3])[:, : size[0], : size[1]], x)


@given(grid=grids, region=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_same_as_reference(grid, region):
    x = torch.randn(2, grid[0] * region[0], grid[1] * region[1], 3, dtype=torch.float64)
    regions = partition(x, grid)
    assert torch.equal(regions, reference.partition(x, grid))
    assert torch.equal(merge(regions, grid, x.shape[1:3]), reference.merge(regions, grid, x.shape[1:3]))


def test_a_map_that_fits_is_not_copied():
    x = torch.randn(1, 4, 6, 2)
    assert pad_to_grid(x, (2, 3)) is x


def test_bad_input_names_the_numbers():
    with pytest.raises(ValueError, match=r"5x6 map has no 2x3 grid"):
        partition(torch.zeros(1, 5, 6, 1), (2, 3))
    with pytest.raises(ValueError, match=r"6 regions of 4 tokens are not a 2x3 grid over a 4x3 map"):
        merge(torch.zeros(1, 6, 4, 1), (2, 3), (4, 3))
    with pytest.raises(ValueError, match="grid of equal regions"):
        merge(torch.zeros(1, 6, 4, 1), (2, 3), (6, 4))
    for grid in (0, (1, 2, 3), (2, -1), (2.0, 1), 7.0, True, torch.tensor(7), None):
        with pytest.raises(ValueError, match="region_grid"):
            as_grid(grid)
    with pytest.raises(ValueError, match="bias_grid=0"):
        as_grid(0, "bias_grid")
    assert as_grid(7) == as_grid([7, 7]) == as_grid(np.int64(7)) == (7, 7)
