"""The algorithms on games small enough to solve by hand.

Each test runs the library's losses to their minimum over a softmax policy on three actions and
compares with numbers from the papers' closed forms, which are also coded here in numpy.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from sparring.alignment.games import (
    best_response,
    cyclicity,
    duality_gap,
    exploitability,
    pairwise_probabilities,
)
from sparring.alignment.losses import dpo_loss, ipo_loss, spin_loss, sppo_loss
from sparring.alignment.momentum import extrapolate, folded_reference

Array = np.ndarray

UNIFORM = np.full(3, 1 / 3)
ROCK_PAPER_SCISSORS = np.array([[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]])
CONDORCET = np.array([[0.5, 0.7, 0.9], [0.3, 0.5, 0.8], [0.1, 0.2, 0.5]])
START = np.array([0.5, 0.3, 0.2])

REWARD = np.array([1.0, 0.5, 0.0])
BANDIT_START = np.array([0.1, 0.3, 0.6])
DATA = np.array([0.6, 0.3, 0.1])


def softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kl_from_uniform(policy: Array) -> float:
    return float(np.mean(np.log(UNIFORM / policy)))


def minimise(loss: Callable[[Tensor], Tensor], start: Array, steps: int = 100) -> Array:
    """Newton's method with backtracking, from `start`, in float64."""
    x = torch.from_numpy(start.copy())
    for _ in range(steps):
        point = x.clone().requires_grad_()
        value = loss(point)
        (gradient,) = torch.autograd.grad(value, point, create_graph=True)
        rows = [torch.autograd.grad(g, point, retain_graph=True)[0] for g in gradient]
        eigenvalues, vectors = torch.linalg.eigh(torch.stack(rows))
        # A normalised policy is flat along constants; absolute values keep the step downhill.
        curvature = eigenvalues.abs()
        curvature[curvature < 1e-13 * curvature.max()] = torch.inf
        step = -vectors @ (vectors.T @ gradient.detach() / curvature)
        decrease = -float(gradient.detach() @ step)
        size = 1.0
        while decrease > 1e-14 and size > 1e-9 and loss(x + size * step) > value.detach():
            size /= 2
        x = x + size * step
        if decrease < 1e-20:
            break
    return x.numpy()


def over_pairs(
    loss: Callable[[Tensor, Tensor], Tensor], weight: Array
) -> Callable[[Tensor], Tensor]:
    """Σ_ij weight_ij loss(Δ_i, Δ_j) as a function of the three log-ratios."""
    i, j = (torch.from_numpy(index.ravel()) for index in np.indices((3, 3)))
    flat = torch.from_numpy(weight.ravel())
    return lambda logratio: (flat * loss(logratio[i], logratio[j])).sum()


def solve_dpo(reference_logp: Array, sampler: Array) -> Array:
    """Logits of the minimiser of the population DPO loss, β = 1, Bradley–Terry on REWARD."""
    first_wins = 1 / (1 + np.exp(REWARD[None, :] - REWARD[:, None]))
    weight = np.outer(sampler, sampler) * first_wins
    loss = over_pairs(partial(dpo_loss, beta=1.0), weight)
    reference = torch.from_numpy(reference_logp)
    return minimise(lambda logits: loss(torch.log_softmax(logits, 0) - reference), reference_logp)


def solve_sppo(policy: Array, wins: Array, *, eta: float) -> Array:
    """Free log-probabilities, one an action and not normalised: the loss is then quadratic."""
    reference, target = torch.from_numpy(np.log(policy)), torch.from_numpy(wins)
    return minimise(
        lambda logp: sppo_loss(logp - reference, target, eta=eta).sum(), np.log(policy), steps=1
    )


def solve_sppo_normalised(
    policy: Array, reference_logp: Array, wins: Array, *, eta: float, log_z: float
) -> tuple[Array, float]:
    """Minimiser in the softmax family of E_{y~policy}, with log_z in place of the paper's η/2."""
    reference, weight = torch.from_numpy(reference_logp), torch.from_numpy(policy)
    shifted = torch.from_numpy(wins - log_z / eta + 0.5)

    def loss(logits: Tensor) -> Tensor:
        logratio = torch.log_softmax(logits, 0) - reference
        return (weight * sppo_loss(logratio, shifted, eta=eta)).sum()

    logits = minimise(loss, np.log(policy))
    return softmax(logits), float(loss(torch.from_numpy(logits)))


def multiplicative_weights(policy: Array, game: Array, eta: float) -> Array:
    return softmax(np.log(policy) + eta * game @ policy)


def accelerate(
    solve: Callable[[Array], Array], start: Array, alpha: float, solves: int
) -> list[tuple[Array, Array]]:
    """(π̂_n, π_n) after each solve, the library extrapolating the logits."""
    policy, old = start, {"logits": torch.from_numpy(np.log(start))}
    history = []
    for _ in range(solves):
        new = {"logits": torch.from_numpy(solve(policy))}
        policy = softmax(extrapolate(new, old, alpha)["logits"].numpy())
        history.append((softmax(new["logits"].numpy()), policy))
        old = new
    return history


def accelerate_closed_form(
    gain: Callable[[Array], Array], start: Array, alpha: float, solves: int
) -> list[tuple[Array, Array]]:
    """The same in log space: π̂_{n+1} ∝ π_n exp(gain), π_{n+1} ∝ π̂_{n+1}(π̂_{n+1}/π̂_n)^α."""
    policy, old, history = start, np.log(start), []
    for _ in range(solves):
        new = np.log(policy) + gain(policy)
        policy = softmax((1 + alpha) * new - alpha * old)
        history.append((softmax(new), policy))
        old = new
    return history


def sppo_step(game: Array, eta: float) -> Callable[[Array], Array]:
    return lambda policy: solve_sppo(policy, game @ policy, eta=eta)


# --- SPPO: multiplicative weights ---------------------------------------------------------------


def test_sppo_step_is_multiplicative_weights() -> None:
    wins = ROCK_PAPER_SCISSORS @ START
    assert wins == pytest.approx([0.45, 0.65, 0.40])
    policy = softmax(solve_sppo(START, wins, eta=0.5))
    assert policy == pytest.approx([0.487038, 0.322956, 0.190005], abs=1e-6)
    assert policy == pytest.approx(multiplicative_weights(START, ROCK_PAPER_SCISSORS, 0.5))
    assert np.log(START @ np.exp(0.5 * wins)) == pytest.approx(0.251265, abs=1e-6)


@pytest.mark.parametrize("eta", [0.5, 5.0, 1000.0])
def test_nash_policy_is_a_fixed_point(eta: float) -> None:
    wins = ROCK_PAPER_SCISSORS @ UNIFORM
    assert softmax(solve_sppo(UNIFORM, wins, eta=eta)) == pytest.approx(UNIFORM)


def test_last_iterate_leaves_nash_and_the_average_reaches_it() -> None:
    policy, total, distance = START, np.zeros(3), {}
    for t in range(2000):
        total += policy
        policy = softmax(solve_sppo(policy, ROCK_PAPER_SCISSORS @ policy, eta=0.5))
        distance[t + 1] = kl_from_uniform(policy)
    assert distance[1] == pytest.approx(0.071506, abs=1e-6)
    assert distance[5] == pytest.approx(0.0772, abs=5e-5)
    assert distance[20] == pytest.approx(0.1005, abs=5e-5)
    assert all(distance[t] < distance[t + 1] for t in range(1, 40))
    exploitability = (ROCK_PAPER_SCISSORS @ (total / 2000)).max() - 0.5
    assert exploitability == pytest.approx(0.0059, abs=5e-5)
    assert policy == pytest.approx([0.999, 0.0, 0.001], abs=5e-4)


@pytest.mark.parametrize(
    ("eta", "half_eta", "weights"),
    [
        (0.5, [0.487056, 0.322926, 0.190018], [0.487038, 0.322956, 0.190005]),
        (5.0, [0.360266, 0.525669, 0.114065], [0.339848, 0.554282, 0.105870]),
    ],
)
def test_half_eta_is_not_the_log_partition_function(
    eta: float, half_eta: list[float], weights: list[float]
) -> None:
    wins = ROCK_PAPER_SCISSORS @ START
    log_z = float(np.log(START @ np.exp(eta * wins)))
    exact, left = solve_sppo_normalised(START, np.log(START), wins, eta=eta, log_z=log_z)
    assert exact == pytest.approx(multiplicative_weights(START, ROCK_PAPER_SCISSORS, eta))
    assert exact == pytest.approx(weights, abs=1e-6)
    assert left == pytest.approx(0, abs=1e-15)
    paper, left = solve_sppo_normalised(START, np.log(START), wins, eta=eta, log_z=eta / 2)
    assert paper == pytest.approx(half_eta, abs=1e-6)
    assert left > 1e-8


# --- the empirical game -------------------------------------------------------------------------


def iterates(game: Array, start: Array, eta: float, solves: int) -> Array:
    """(solves + 1, 3) policies of SPPO's self-play."""
    policies = [start]
    for _ in range(solves):
        policies.append(softmax(solve_sppo(policies[-1], game @ policies[-1], eta=eta)))
    return np.stack(policies)


def test_rock_paper_scissors_is_exploited_unless_mixed_evenly() -> None:
    assert exploitability(ROCK_PAPER_SCISSORS, UNIFORM) == pytest.approx(0)
    assert duality_gap(ROCK_PAPER_SCISSORS, UNIFORM) == pytest.approx(0)
    for action in np.eye(3):
        assert exploitability(ROCK_PAPER_SCISSORS, action) == 0.5
        assert duality_gap(ROCK_PAPER_SCISSORS, action) == 1.0
    # Against START = (.5, .3, .2) paper, the second row, wins .65.
    assert exploitability(ROCK_PAPER_SCISSORS, START) == pytest.approx(0.15)


def test_a_condorcet_winner_is_not_exploited() -> None:
    assert [exploitability(CONDORCET, action) for action in np.eye(3)] == pytest.approx(
        [0, 0.2, 0.4]
    )
    for policy in (UNIFORM, START, np.array([0.1, 0.2, 0.7])):
        # The winner beats every mixture most: max_a (Pμ)_a = .5 μ_0 + .7 μ_1 + .9 μ_2.
        expected = 0.2 * policy[1] + 0.4 * policy[2]
        assert exploitability(CONDORCET, policy) == pytest.approx(expected)
        least = policy @ CONDORCET[:, 0]
        assert duality_gap(CONDORCET, policy) == pytest.approx(0.5 + expected - least)
        assert duality_gap(CONDORCET, policy) == pytest.approx(2 * expected)


def test_self_play_finds_the_condorcet_winner_and_its_last_iterate_is_best() -> None:
    policies = iterates(CONDORCET, UNIFORM, 1.0, 20)
    # 1 − π(best) after 5, 10, 15, 20 solves is in the test of momentum, below; here the gap.
    gaps = [exploitability(CONDORCET, policy) for policy in policies]
    for n, policy in enumerate(policies):
        assert gaps[n] == pytest.approx(0.2 * policy[1] + 0.4 * policy[2])
    assert all(one > two for one, two in pairwise(gaps))
    assert gaps[20] < exploitability(CONDORCET, policies.mean(axis=0))
    # The game between the iterates: no iterate beats the last, and it beats the first most.
    payoff = policies @ CONDORCET @ policies.T
    last = np.eye(21)[20]
    assert exploitability(payoff, last) == pytest.approx(0)
    assert payoff[20].argmax() == 0
    assert exploitability(payoff, last) <= gaps[20]  # a lower bound, among iterates only


def test_on_a_cycle_the_average_of_iterates_is_safe_and_the_last_is_not() -> None:
    policies = iterates(ROCK_PAPER_SCISSORS, START, 0.5, 2000)[:2000]
    average = [
        exploitability(ROCK_PAPER_SCISSORS, policies[:n].mean(axis=0)) for n in (20, 200, 2000)
    ]
    assert average[0] > average[1] > average[2]
    assert average[2] == pytest.approx(0.0059, abs=5e-5)
    assert exploitability(ROCK_PAPER_SCISSORS, policies[-1]) > 0.45
    # Among the iterates themselves the same is seen, without knowing the game.
    payoff = policies @ ROCK_PAPER_SCISSORS @ policies.T
    count = len(policies)
    assert exploitability(payoff, np.full(count, 1 / count)) <= average[2] + 1e-12
    assert exploitability(payoff, np.eye(count)[-1]) > 0.45


def test_cyclicity_is_what_ratings_leave() -> None:
    assert cyclicity(ROCK_PAPER_SCISSORS) == pytest.approx(1)
    rating = np.array([0.2, 0.05, -0.1, -0.15])
    linear = 0.5 + rating[:, None] - rating[None, :]
    assert cyclicity(linear) == pytest.approx(0, abs=1e-12)
    logits = 3 * (rating[:, None] - rating[None, :])
    assert cyclicity(logits) == pytest.approx(0, abs=1e-12)
    # σ is not linear: in probabilities a strict order of M has (M − 2)/(3M), though transitive.
    assert 0 < cyclicity(1 / (1 + np.exp(-logits))) < 0.01
    for count in (3, 4, 10):
        order = np.arange(count)
        strict = 0.5 + 0.5 * np.sign(order[:, None] - order[None, :])
        assert cyclicity(strict) == pytest.approx((count - 2) / (3 * count))
    # CONDORCET − ½ has rows (0, .2, .4), (−.2, 0, .3), (−.4, −.3, 0): ratings .2, 1/30, −7/30,
    # whose differences miss by ±1/30 everywhere; of the squares' sum 2(.04 + .16 + .09).
    assert cyclicity(CONDORCET) == pytest.approx(6 * (1 / 30) ** 2 / 0.58)
    # Orthogonal parts: a cycle added to ratings has the share of its squares.
    both = linear[:3, :3] + 0.1 * (ROCK_PAPER_SCISSORS - 0.5)
    share = 6 * 0.05**2
    whole = share + ((linear[:3, :3] - 0.5) ** 2).sum()
    assert cyclicity(both) == pytest.approx(share / whole)
    assert np.isnan(cyclicity(np.full((3, 3), 0.5)))


def test_a_cycle_over_prompts_of_three_policies_from_judge_logits() -> None:
    """The spec's L, cyclic in both orders' mean: 0 over 1 over 2 over 0."""
    logits = np.array([[0, 1.2, -0.4], [-0.8, 0, 0.6], [0.9, -0.5, 0]])
    chance = pairwise_probabilities(logits)
    assert chance.mean(axis=1) == pytest.approx([0.524683, 0.467692, 0.507625], abs=1e-6)
    assert chance[0, 1] > 0.5
    assert chance[1, 2] > 0.5
    assert chance[2, 0] > 0.5
    # Order-averaged logits 1, .55, .65 around the cycle: its mean is the cyclic part.
    mean = (1 + 0.55 + 0.65) / 3
    assert cyclicity(logits) == pytest.approx(3 * mean**2 / (1 + 0.55**2 + 0.65**2))


def test_the_best_response_to_samples_of_a_pure_policy() -> None:
    # Prompts whose policy always plays rock, paper, scissors; candidates are the three actions.
    wins = np.stack([np.repeat(ROCK_PAPER_SCISSORS[:, [a]], 4, axis=1) for a in range(3)])
    assert best_response(wins) == pytest.approx([0.5, 0.5, 0.5])
    # A policy that plays all three evenly in both halves cannot be exploited.
    even = ROCK_PAPER_SCISSORS[:, [0, 0, 1, 1, 2, 2]]
    assert best_response(even[None]) == pytest.approx([0])


# --- SPPO with momentum -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, [0.343565, 0.143392, 0.055189, 0.020638]),
        (0.3, [0.267982, 0.072122, 0.017761, 0.004284]),
    ],
)
def test_momentum_finds_a_condorcet_winner_sooner(alpha: float, expected: list[float]) -> None:
    history = accelerate(sppo_step(CONDORCET, 1.0), UNIFORM, alpha, 20)
    left = [1 - history[n - 1][0][0] for n in (5, 10, 15, 20)]
    assert left == pytest.approx(expected, abs=1e-6)
    oracle = accelerate_closed_form(lambda p: CONDORCET @ p, UNIFORM, alpha, 20)
    np.testing.assert_allclose(history, oracle, rtol=1e-9)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, [0.071506, 0.078751, 0.086111, 0.093350]),
        (0.3, [0.071506, 0.088291, 0.108142, 0.133999]),
    ],
)
def test_momentum_hurts_on_a_cycle(alpha: float, expected: list[float]) -> None:
    history = accelerate(sppo_step(ROCK_PAPER_SCISSORS, 0.5), START, alpha, 16)
    distances = [kl_from_uniform(history[n - 1][0]) for n in (1, 6, 11, 16)]
    assert distances == pytest.approx(expected, abs=1e-6)


# --- DPO with momentum: the bandit of APO -------------------------------------------------------


def momentum_multiplier(alpha: float, solves: int) -> float:
    """C_n = n/(1−α) − α(1−αⁿ)/(1−α)²."""
    return solves / (1 - alpha) - alpha * (1 - alpha**solves) / (1 - alpha) ** 2


@cache
def bandit_history(alpha: float) -> list[tuple[Array, Array]]:
    return accelerate(lambda p: solve_dpo(np.log(p), p), BANDIT_START, alpha, 12)


@pytest.mark.parametrize(
    ("alpha", "solves", "expected", "gap"),
    [
        (0.0, 1, [0.198931, 0.361973, 0.439096], 0.620082),
        (0.0, 2, [0.342977, 0.378522, 0.278501], 0.467762),
        (0.0, 3, [0.508101, 0.340118, 0.151781], 0.321840),
        (0.0, 5, [0.777192, 0.191388, 0.031420], 0.127114),
        (0.0, 10, None, 0.010171),
        (0.3, 1, [0.198931, 0.361973, 0.439096], 0.620082),
        (0.3, 2, [0.391932, 0.372300, 0.235768], 0.421918),
        (0.3, 3, [0.615798, 0.291935, 0.092266], 0.238234),
        (0.3, 5, [0.890308, 0.101914, 0.007777], 0.058734),
        (0.3, 10, None, 0.001612),
    ],
)
def test_bandit_table(alpha: float, solves: int, expected: list[float] | None, gap: float) -> None:
    solution = bandit_history(alpha)[solves - 1][0]
    assert expected is None or solution == pytest.approx(expected, abs=1e-6)
    assert 1 - REWARD @ solution == pytest.approx(gap, abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "multipliers"),
    [
        (0.0, {1: 1, 2: 2, 3: 3, 5: 5, 10: 10}),
        (0.3, {1: 1, 2: 2.3, 3: 3.69, 4: 5.107, 5: 6.5321, 10: 13.673473}),
        (0.6, {1: 1, 2: 2.6, 3: 4.56, 5: 9.0416, 10: 21.272675}),
    ],
)
def test_solutions_are_the_reference_tilted_by_the_multiplier(
    alpha: float, multipliers: dict[int, float]
) -> None:
    history = bandit_history(alpha)
    for n, multiplier in multipliers.items():
        assert momentum_multiplier(alpha, n) == pytest.approx(multiplier, abs=1e-6)
        tilted = softmax(np.log(BANDIT_START) + multiplier * REWARD)
        assert history[n - 1][0] == pytest.approx(tilted, abs=1e-6)


@pytest.mark.parametrize(("alpha", "solves"), [(0.0, 12), (0.3, 9), (0.6, 6)])
def test_momentum_saves_solves(alpha: float, solves: int) -> None:
    best = [solution[0] for solution, _ in bandit_history(alpha)[:solves]]
    assert best[-1] >= 0.99 > best[-2]


def test_no_momentum_hands_over_the_solution_to_the_bit() -> None:
    policy, old = BANDIT_START, np.log(BANDIT_START)
    for expected, _ in bandit_history(0.0)[:4]:
        hat = solve_dpo(np.log(policy), policy)
        handed, kept = ({"logits": torch.from_numpy(x)} for x in (hat, old))
        assert extrapolate(handed, kept, 0.0)["logits"].numpy().tobytes() == hat.tobytes()
        policy, old = softmax(hat), hat
        assert policy == pytest.approx(expected, rel=1e-9)


def test_first_solve_does_not_depend_on_momentum() -> None:
    solutions, extrapolated = zip(*(bandit_history(a)[0] for a in (0.0, 0.3, 0.6)), strict=True)
    np.testing.assert_allclose(solutions, [solutions[0]] * 3, rtol=1e-12)
    assert extrapolated[1] == pytest.approx([0.238020, 0.372772, 0.389208], abs=1e-6)


def test_the_result_is_the_solution_and_not_its_extrapolation() -> None:
    solution, extrapolated = bandit_history(0.3)[1]
    tilted = softmax(np.log(BANDIT_START) + 2.3 * REWARD)
    assert solution == pytest.approx(tilted)
    assert np.abs(extrapolated - tilted).max() > 0.05


def test_logits_parameters_and_folding_agree_for_dpo() -> None:
    alpha = 0.3
    features = np.array([[1.0, 0.2, -0.5, 0.3], [0.1, -1.0, 0.4, 0.8], [0.6, 0.5, 1.5, -0.2]])
    theta_old = np.linalg.pinv(features) @ np.log(BANDIT_START)
    hat = solve_dpo(np.log(BANDIT_START), BANDIT_START)
    theta_new = np.linalg.pinv(features) @ hat

    def extrapolated(new: Array, old: Array) -> Array:
        pair = ({"x": torch.from_numpy(x)} for x in (new, old))
        return extrapolate(*pair, alpha)["x"].numpy()

    from_logits = softmax(extrapolated(hat, np.log(BANDIT_START)))
    from_parameters = softmax(features @ extrapolated(theta_new, theta_old))
    assert from_parameters == pytest.approx(from_logits)
    folded = folded_reference(
        torch.from_numpy(np.log(softmax(hat))), torch.from_numpy(np.log(BANDIT_START)), alpha
    ).numpy()
    assert abs(np.exp(folded).sum() - 1) > 0.01
    # The sampler is the same in both, so that only the reference's log Z′ differs.
    expected = softmax(solve_dpo(np.log(from_logits), from_logits))
    by_folding = softmax(solve_dpo(folded, from_logits))
    assert by_folding == pytest.approx(expected)
    assert expected == pytest.approx(bandit_history(alpha)[1][0])


@pytest.mark.parametrize("loss", [partial(ipo_loss, beta=0.1), partial(spin_loss, lam=0.1)])
def test_folding_leaves_pairwise_losses_as_they_are(loss: Callable[..., Tensor]) -> None:
    chosen, rejected, log_z = torch.tensor([0.4, -1.0]), torch.tensor([0.1, 2.0]), 0.7
    torch.testing.assert_close(loss(chosen - log_z, rejected - log_z), loss(chosen, rejected))


def test_folding_fails_for_sppo_by_the_log_partition_function() -> None:
    (solution, policy), eta = accelerate(sppo_step(CONDORCET, 1.0), START, 0.3, 1)[0], 1.0
    folded = folded_reference(
        torch.from_numpy(np.log(solution)), torch.from_numpy(np.log(START)), 0.3
    ).numpy()
    wins = CONDORCET @ policy
    log_z = float(np.log(policy @ np.exp(eta * wins)))

    def solve(reference_logp: Array) -> Array:
        return solve_sppo_normalised(policy, reference_logp, wins, eta=eta, log_z=log_z)[0]

    expected = multiplicative_weights(policy, CONDORCET, eta)
    assert solve(np.log(policy)) == pytest.approx(expected)
    assert np.abs(solve(folded) - expected).max() > 1e-4
    assert solve(folded - np.log(np.exp(folded).sum())) == pytest.approx(expected)


# --- SPIN ---------------------------------------------------------------------------------------


def spin_objective(policy: Array, lam: float) -> Callable[[Tensor], Tensor]:
    """Population SPIN loss as a function of the scaled log-ratios u = λΔ, one an action."""
    pairs = over_pairs(partial(spin_loss, lam=lam), np.outer(DATA, policy))
    return lambda u: pairs(u / lam)


def spin_step(policy: Array, lam: float) -> Array:
    u = minimise(spin_objective(policy, lam), np.zeros(3))
    return softmax(np.log(policy) + u / lam)


def spin_closed_form(policy: Array, lam: float) -> Array:
    return softmax(np.log(policy) + np.log(DATA / policy) / lam)


@pytest.mark.parametrize(
    ("lam", "path"),
    [
        (1.0, [DATA, DATA]),
        (
            2.0,
            [
                [0.472734, 0.334273, 0.192993],
                [0.538953, 0.320463, 0.140584],
                [0.570204, 0.310906, 0.118891],
            ],
        ),
        (0.5, [[0.782609, 0.195652, 0.021739], UNIFORM, [0.782609, 0.195652, 0.021739], UNIFORM]),
        (0.1, [[0.999024, 0.000976, 0.0], [0.0, 0.0, 1.0]]),
    ],
)
def test_spin_path(lam: float, path: list[list[float]]) -> None:
    policy = UNIFORM
    for expected in path:
        following = spin_step(policy, lam)
        assert following == pytest.approx(spin_closed_form(policy, lam), rel=1e-5, abs=1e-12)
        assert following == pytest.approx(expected, abs=1e-6)
        policy = following


@pytest.mark.parametrize("lam", [0.1, 0.5, 1.0, 2.0])
def test_spin_loss_at_the_start_and_at_the_minimum(lam: float) -> None:
    objective = spin_objective(UNIFORM, lam)
    assert objective(torch.zeros(3).double()).item() == pytest.approx(np.log(2))
    best = objective(torch.from_numpy(np.log(DATA / UNIFORM))).item()
    assert best == pytest.approx(0.592675, abs=1e-6)
    found = objective(torch.from_numpy(minimise(objective, np.zeros(3)))).item()
    assert found == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("lam", [0.1, 1.0, 5.0])
def test_spin_rests_at_the_data(lam: float) -> None:
    u = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = spin_objective(DATA, lam)(u)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(2))
    assert u.grad is not None
    assert u.grad.numpy() == pytest.approx(np.zeros(3), abs=1e-15)
    assert spin_step(DATA, lam) == pytest.approx(DATA)


@pytest.mark.parametrize(("lam", "factor"), [(0.1, -9.0), (0.5, -1.0), (1.0, 0.0), (2.0, 0.5)])
def test_spin_error_is_multiplied_by_one_minus_one_over_lambda(lam: float, factor: float) -> None:
    def error(policy: Array) -> Array:
        logs = np.log(policy / DATA)
        return logs - logs.mean()

    start = softmax(np.log(DATA) + 0.05 * np.array([1.0, -2.0, 0.5]))
    assert error(spin_step(start, lam)) == pytest.approx(factor * error(start), abs=1e-7)
