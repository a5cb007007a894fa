"""The float64 reference against numbers worked out by hand."""

import numpy as np
import pytest

from crab_edge.ilora.reference import experts, ilora_linear, route, router

# x = (1, 2); A x = 1*1 + 2*2 = 5; R x = (0, ln 2, ln 5) with R = ((2,-1), (ln2,0), (0, ln5/2))
X = np.array([1.0, 2.0])
A = np.array([[1.0, 2.0]])
R = np.array([[2.0, -1.0], [np.log(2), 0.0], [0.0, np.log(5) / 2]])
B = [np.array([[1.0], [0.0]]), np.array([[0.0], [4.0]]), np.array([[-8.0], [8.0]])]


def test_router_by_hand():
    np.testing.assert_allclose(router(X, R), [1 / 8, 2 / 8, 5 / 8])


def test_router_survives_large_logits():
    np.testing.assert_allclose(router([1.0], [[1000.0], [1000.0], [-1000.0]]), [0.5, 0.5, 0.0])


def test_route_by_hand():
    np.testing.assert_allclose(route(X, [A], [R]), [5 / 8, 10 / 8, 25 / 8])


def test_linear_by_hand():
    # W x + b = (3, 1) + (10, 20); B_i h = (5,0), (0,20), (-40,40); s = 2
    weight, bias = np.array([[1.0, 1.0], [1.0, 0.0]]), np.array([10.0, 20.0])
    expected = [13 + 2 * (5 / 8 - 40 * 5 / 8), 21 + 2 * (20 * 2 / 8 + 40 * 5 / 8)]
    np.testing.assert_allclose(ilora_linear(X, weight, bias, A, R, B, 2.0), expected)
    y0 = X @ weight.T + bias
    np.testing.assert_allclose(experts(y0, route(X, [A], [R]), B, 2.0), expected)


@pytest.mark.parametrize(("rank", "n", "groups"), [(1, 1, 1), (4, 3, 2), (5, 2, 3)])
def test_group_is_its_linears_side_by_side(rank, n, groups):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 9))
    a = [rng.standard_normal((rank, 9)) for _ in range(groups)]
    r = [rng.standard_normal((n, 9)) for _ in range(groups)]
    z = route(x, a, r)
    assert z.shape == (2, 6, groups * n * rank)
    for i in range(groups):
        b = [rng.standard_normal((7, rank)) for _ in range(n)]
        part = z[..., i * n * rank : (i + 1) * n * rank]
        ours = experts(np.zeros((2, 6, 7)), part, b, 1.5)
        np.testing.assert_allclose(
            ours, ilora_linear(x, np.zeros((7, 9)), None, a[i], r[i], b, 1.5), atol=1e-12
        )
