import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from debiformer.ops import reference, route


@given(regions=st.integers(1, 9), keys=st.integers(1, 9), data=st.data())
def test_same_as_sorting_all_affinities(regions, keys, data):
    topk = data.draw(st.integers(1, keys))
    q, k = torch.randn(2, regions, 4, dtype=torch.float64), torch.randn(2, keys, 4, dtype=torch.float64)
    routes, affinities = route(q, k, topk)
    expected_routes, expected_affinities = reference.route(q, k, topk)
    assert torch.equal(routes, expected_routes)
    torch.testing.assert_close(affinities, expected_affinities)


def test_regions_go_to_the_key_that_equals_them():
    means = torch.eye(5)[None]
    routes, affinities = route(means, 3 * means[:, [4, 2, 0, 1, 3]], 1)
    assert routes[0, :, 0].tolist() == [2, 3, 1, 4, 0]
    assert torch.equal(affinities, torch.full((1, 5, 1), 3.0))


def test_affinities_carry_a_gradient_and_routes_do_not():
    q, k = (torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert not route(q, k, 2)[0].requires_grad
    assert torch.autograd.gradcheck(lambda q, k: route(q, k, 2)[1], (q, k))


def test_bad_input_names_the_numbers():
    means = torch.zeros(1, 4, 3)
    for topk in (0, 5):
        with pytest.raises(ValueError, match=rf"topk={topk} is not between 1 and the 4 key regions"):
            route(means, means, topk)
    with pytest.raises(ValueError, match=r"\(1, 4, 3\) and keys \(1, 4, 2\)"):
        route(means, means[..., :2], 1)
