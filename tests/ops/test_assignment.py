import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rtdetrv2_jax.ops.assignment import assign

solve = jax.jit(assign)
KINDS = ("uniform", "clustered", "ties", "constant", "holes")


def random_costs(rng: np.random.Generator, kind: str, problems: int, queries: int, targets: int) -> np.ndarray:
    shape = (problems, queries, targets)
    match kind:
        case "uniform":
            cost = rng.uniform(-5, 15, shape)
        case "clustered":  # as a detector has it: most queries near some target, hence long searches
            centres = rng.uniform(size=(problems, 1, targets, 2))
            near = centres[:, 0, rng.integers(targets, size=queries)] + rng.normal(0, 0.05, (problems, queries, 2))
            cost = 5 * np.abs(near[:, :, None] - centres).sum(-1) + rng.uniform(0, 2, (problems, queries, 1))
        case "ties":
            cost = rng.integers(0, 4, shape)
        case "constant":
            cost = np.full(shape, 3.5)
        case "holes":
            cost = rng.uniform(-5, 15, shape)
            cost = np.where(rng.uniform(size=shape) < 0.4, rng.choice([np.nan, np.inf, -np.inf], shape), cost)
    return cost.astype(np.float32)


def prefix_mask(counts: np.ndarray, targets: int) -> np.ndarray:
    return np.arange(targets) < counts[:, None]


def check_against_scipy(cost: np.ndarray, mask: np.ndarray, found: np.ndarray) -> None:
    """Each result is a matching of the right size, and no worse than SciPy's: fewest holes first, then least cost."""
    linear_sum_assignment = pytest.importorskip("scipy.optimize").linear_sum_assignment
    queries = cost.shape[1]
    for table, present, chosen in zip(cost.astype(np.float64), mask, found, strict=True):
        assert np.all(chosen[~present] == -1)
        pairs = np.flatnonzero(chosen >= 0)
        assert len(pairs) == min(queries, present.sum())
        assert len(set(chosen[pairs].tolist())) == len(pairs)
        assert np.all(chosen[pairs] < queries)
        table = np.where(np.isfinite(table), table, 1e7)
        rows, columns = linear_sum_assignment(table[:, present])
        best, ours = table[:, present][rows, columns], table[chosen[pairs], pairs]
        assert (ours == 1e7).sum() == (best == 1e7).sum()
        np.testing.assert_allclose(ours[ours < 1e7].sum(), best[best < 1e7].sum(), rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "targets"), [(30, 12), (12, 12), (7, 20)])
def test_the_total_is_that_of_scipy(kind, queries, targets):
    rng = np.random.default_rng(len(kind) + queries)
    cost = random_costs(rng, kind, 60, queries, targets)
    mask = prefix_mask(rng.integers(0, targets + 1, 60), targets)
    check_against_scipy(cost, mask, np.asarray(solve(jnp.array(cost), jnp.array(mask))))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("problems", "queries", "targets"),
    [(900, 50, 20), (600, 300, 30), (300, 300, 100), (150, 100, 130), (50, 300, 300)],
)
def test_the_total_is_that_of_scipy_on_ten_thousand_problems(kind, problems, queries, targets):
    rng = np.random.default_rng(queries + targets)
    cost = random_costs(rng, kind, problems, queries, targets)
    counts = rng.integers(0, targets + 1, problems)
    counts[:2] = 0, targets
    mask = prefix_mask(counts, targets)
    check_against_scipy(cost, mask, np.asarray(solve(jnp.array(cost), jnp.array(mask))))


def test_a_matching_worked_by_hand_takes_the_dearer_query_where_that_is_cheaper_for_all():
    cost = jnp.array([[1.0, 2.0], [2.0, 9.0], [5.0, 9.0]])  # both targets want query 0
    np.testing.assert_array_equal(solve(cost, jnp.array([True, True])), [1, 0])


def test_equal_costs_go_to_the_lowest_query_and_then_the_lowest_target():
    np.testing.assert_array_equal(solve(jnp.zeros((5, 3)), jnp.ones(3, bool)), [0, 1, 2])
    for level in (-2.0, 0.0, 3.0):
        np.testing.assert_array_equal(solve(jnp.full((2, 4), level), jnp.ones(4, bool)), [0, 1, -1, -1])


def test_what_stands_in_the_padding_changes_nothing_wherever_the_padding_is():
    rng = np.random.default_rng(0)
    cost = random_costs(rng, "clustered", 20, 30, 10)
    expected = np.asarray(solve(jnp.array(cost), jnp.ones((20, 10), bool)))
    for filling in (0.0, -1e9, np.nan, np.inf):
        places = np.sort(rng.permutation(25)[:10])
        padded = np.full((20, 30, 25), filling, np.float32)
        padded[:, :, places] = cost
        mask = np.zeros((20, 25), bool)
        mask[:, places] = True
        found = np.asarray(solve(jnp.array(padded), jnp.array(mask)))
        np.testing.assert_array_equal(found[:, places], expected)
        assert np.all(found[~mask] == -1)


def test_a_problem_has_the_same_result_alone_in_a_batch_and_under_more_axes():
    cost = jnp.array(random_costs(np.random.default_rng(1), "clustered", 12, 20, 9))
    mask = jnp.array(prefix_mask(np.arange(12) % 10, 9))
    together = solve(cost, mask)
    for i in range(12):
        np.testing.assert_array_equal(solve(cost[i], mask[i]), together[i])
    stacked = solve(cost.reshape(3, 2, 2, 20, 9), mask.reshape(3, 2, 2, 9))
    np.testing.assert_array_equal(stacked.reshape(12, 9), together)


def test_a_constant_added_to_a_target_or_a_target_moved_changes_no_pair():
    rng = np.random.default_rng(2)
    cost, mask = random_costs(rng, "uniform", 8, 25, 11), np.ones((8, 11), bool)
    expected = np.asarray(solve(jnp.array(cost), jnp.array(mask)))
    shifted = cost + rng.integers(-50, 50, (8, 1, 11)).astype(np.float32)
    np.testing.assert_array_equal(solve(jnp.array(shifted), jnp.array(mask)), expected)
    order = rng.permutation(11)
    np.testing.assert_array_equal(solve(jnp.array(cost[:, :, order]), jnp.array(mask)), expected[:, order])


def test_a_pair_that_is_not_finite_is_taken_only_where_no_matching_avoids_it():
    nan, inf = np.nan, np.inf
    cost = jnp.array([[nan, 3.0], [inf, 900.0], [8.0, -inf]])
    np.testing.assert_array_equal(solve(cost, jnp.ones(2, bool)), [2, 0])
    np.testing.assert_array_equal(np.sort(solve(jnp.full((3, 2), nan), jnp.ones(2, bool))), [0, 1])
    blind = jnp.array([[nan, 1.0], [nan, 2.0], [nan, 3.0]])  # the target that nothing fits leaves the other its best
    np.testing.assert_array_equal(solve(blind, jnp.ones(2, bool))[1], 0)


def test_one_compilation_serves_any_number_of_targets():
    jitted = jax.jit(lambda cost, mask: assign(cost, mask))
    cost = jnp.array(random_costs(np.random.default_rng(3), "uniform", 2, 20, 15))
    for count in (0, 1, 7, 15):
        found = jitted(cost, jnp.array(prefix_mask(np.array([count, 15 - count]), 15)))
        assert (np.asarray(found) >= 0).sum() == 15
    assert jitted._cache_size() == 1


def test_no_columns_of_targets_at_all_gives_no_answers():
    assert assign(jnp.zeros((2, 5, 0)), jnp.zeros((2, 0), bool)).shape == (2, 0)


def test_a_batch_spread_over_devices_has_the_same_result_and_costs_stay_where_they_are():
    cost = jnp.array(random_costs(np.random.default_rng(4), "clustered", 3 * 16, 20, 9).reshape(3, 16, 20, 9))
    mask = jnp.broadcast_to(jnp.array(prefix_mask(np.arange(16) % 10, 9)), (3, 16, 9))
    expected = solve(cost, mask)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec(None, "data"))
    program = jax.jit(assign).lower(jax.device_put(cost, sharding), jax.device_put(mask, sharding)).compile()
    np.testing.assert_array_equal(program(jax.device_put(cost, sharding), jax.device_put(mask, sharding)), expected)
    text = program.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
