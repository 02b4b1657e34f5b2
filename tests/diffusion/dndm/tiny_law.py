"""Laws of two tokens out of three, their perfect networks, and samplers' laws by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparring.diffusion.dndm.choices import Prediction
from sparring.diffusion.dndm.draws import Draws
from sparring.diffusion.dndm.noise import Noise, absorbing, uniform
from sparring.diffusion.dndm.reveal import Reveal, State

N, K, MASK = 2, 3, 3
ABSORBING = absorbing(K + 1, MASK)
UNIFORM = uniform(K)
ALL = torch.tensor(list(itertools.product(range(K), repeat=N)))
# T: total variation to the data of masked, multinomial and multinomial ancestral sampling, as in
# docs/diffusion/dndm.md.
FIGURES = {2: (0.2332, 0.3326, 0.3020), 8: (0.0583, 0.2454, 0.0809), 32: (0.0146, 0.2283, 0.0195)}
Floats = npt.NDArray[np.float64]
Net = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x (B, N), t (B,), noisy (B, N) -> logits (B, N, K)."""


def data_law(seed: int = 3, concentration: float = 0.3) -> Floats:
    """(K, K) a random law with strongly dependent tokens."""
    return np.random.default_rng(seed).dirichlet([concentration] * K**N).reshape(K, K)


def total_variation(a: Floats, b: Floats) -> float:
    return float(np.abs(a - b).sum() / 2)


def product_of_marginals(law: Floats) -> Floats:
    return np.outer(law.sum(1), law.sum(0))


def _log(p: Floats) -> Tensor:
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(p))


def given_clean(law: Floats, x: Tensor, clean: Tensor) -> Floats:
    """(B, N, K) law of each token given the clean ones; for a clean one, itself."""
    out = np.zeros((len(x), N, K))
    for row, (tokens, known) in enumerate(zip(x.tolist(), clean.tolist(), strict=True)):
        joint = law.copy()
        for axis, (token, fixed) in enumerate(zip(tokens, known, strict=True)):
            if fixed:
                keep = np.zeros(K)
                keep[token] = 1
                joint = joint * (keep[:, None] if axis == 0 else keep[None, :])
        joint = joint / joint.sum() if joint.sum() else np.full((K, K), 1 / K**2)
        out[row, 0], out[row, 1] = joint.sum(1), joint.sum(0)
    return out


def distinct(net: Callable[..., Floats]) -> Net:
    """Calls a slow network once for each distinct (x, t, noisy)."""

    def call(x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        key = torch.cat([x.double(), t[:, None].double(), noisy.double()], 1)
        unique, where = key.unique(dim=0, return_inverse=True)
        p = net(unique[:, :N].long(), unique[:, N].numpy(), unique[:, N + 1 :].bool())
        return _log(p)[where]

    return call


def absorbing_net(law: Floats) -> Net:
    """The perfect network for masks; it carries clean tokens over."""

    def net(x: Tensor, t: Floats, noisy: Tensor) -> Floats:
        p = given_clean(law, x, x != MASK)
        return np.concatenate([p, np.zeros((len(x), N, 1))], 2)

    return distinct(net)


def timed_net(law: Floats) -> Net:
    """A network for masks whose answer depends on t: less and less sure towards t = 1."""

    def net(x: Tensor, t: Floats, noisy: Tensor) -> Floats:
        p = given_clean(law, x, x != MASK)
        blur = np.where((x == MASK).numpy(), t[:, None] / 2, 0)[..., None]
        return np.concatenate([(1 - blur) * p + blur / K, np.zeros((len(x), N, 1))], 2)

    return distinct(net)


def uniform_net(law: Floats, alpha: Callable[[float], float] = lambda t: 1 - t) -> Net:
    """The perfect network p(x_0 | x_t, t) for uniform noise, not told which tokens are noise."""

    def net(x: Tensor, t: Floats, noisy: Tensor) -> Floats:
        out = np.zeros((len(x), N, K))
        for row, tokens in enumerate(x.tolist()):
            kernel = alpha(float(t[row])) * np.eye(K) + (1 - alpha(float(t[row]))) / K
            joint = law * kernel[:, tokens[0]][:, None] * kernel[:, tokens[1]][None, :]
            joint /= joint.sum()
            out[row, 0], out[row, 1] = joint.sum(1), joint.sum(0)
        return out

    return distinct(net)


def conditioned_net(law: Floats) -> Net:
    """The perfect network that is told which tokens are noise."""
    return distinct(lambda x, t, noisy: given_clean(law, x, ~noisy))


class Scripted(Draws):
    """Hands out prepared numbers."""

    def __init__(self, u_BN: Tensor) -> None:
        self.u_BN = u_BN

    def uniform(self, mask_BN: Tensor) -> Tensor:
        return self.u_BN[mask_BN]


def enumerate_law(
    sampler: Reveal, net: Net, noise: Noise, u_SN: Tensor, chance_S: Tensor
) -> Floats:
    """(K, K) the exact law of what a `keep` sampler with random positions makes.

    A row for each combination of S transition times, noise w and result y. The row's tokens are y
    whenever they are asked for, and its chance is what the network gave them at their reveal.
    """
    ws = ALL if noise.mask_id is None else torch.full((1, N), MASK)
    s, w, y = torch.meshgrid(
        torch.arange(len(u_SN)), torch.arange(len(ws)), torch.arange(len(ALL)), indexing="ij"
    )
    u, w, y = u_SN[s.flatten()], ws[w.flatten()], ALL[y.flatten()]
    chance = chance_S[s.flatten()] / len(ws)
    said: list[Tensor] = []

    def scripted(prediction: Prediction, draws: Draws) -> Tensor:
        tokens = y[prediction.where_BN]
        said.append(prediction.spread(prediction.logp_of(tokens), 0.0))
        return tokens

    sampler = Reveal(
        counts=sampler.counts, token=scripted, schedule_conditioning=sampler.schedule_conditioning
    )
    free = torch.ones_like(w, dtype=torch.bool)
    plan = sampler.counts.plan(free, Scripted(u))
    state = State(w, w, free, ~free, plan, noise, Scripted(u))
    logp = torch.zeros(len(w), dtype=torch.float64)
    while bool((active := state.active).any()):
        before = state.clean_BN
        logits = net(state.x_BN[active], state.times[active], state.noisy[active])
        sampler.advance(state, logits)
        logp += torch.where(state.clean_BN & ~before, said[-1], 0.0).sum(1)
    assert torch.equal(state.x_BN, y)
    out = torch.zeros(K, K, dtype=torch.float64)
    out.index_put_((y[:, 0], y[:, 1]), chance * logp.exp(), accumulate=True)
    return out.numpy()


def all_times(steps: int, pmf: Tensor) -> tuple[Tensor, Tensor]:
    """u in the middle of its cell for each of steps^N transition times, and their chances."""
    cdf = torch.cat([torch.zeros(1, dtype=torch.float64), pmf.cumsum(0)])
    middle = (cdf[:-1] + cdf[1:]) / 2
    tau = torch.tensor(list(itertools.product(range(steps), repeat=N)))
    return middle[tau], pmf[tau].prod(1)


def bayes(alpha_s: float, alpha_t: float, noise: Floats) -> Floats:
    """(x_t, x_0, x_s) the posterior by Bayes' rule, from matrices of one-step kernels."""
    size = len(noise)
    eye = np.eye(size)
    to_s = alpha_s * eye + (1 - alpha_s) * noise[None, :]
    a = alpha_t / alpha_s
    s_to_t = a * eye + (1 - a) * noise[None, :]
    joint = to_s[:, :, None] * s_to_t[None, :, :]  # x_0, x_s, x_t
    total = joint.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (joint / total).transpose(2, 0, 1)


def ancestral_law(net: Net, noise: Noise, alphas: list[float]) -> Floats:
    """(K, K) law of ancestral sampling: products of transition matrices over all states."""
    q = noise.law_K.numpy()
    size = len(q)
    states = torch.tensor(list(itertools.product(range(size), repeat=N)))
    now = np.outer(q, q).flatten()
    steps = len(alphas) - 1
    for t in range(steps, 0, -1):
        post = np.nan_to_num(bayes(alphas[t - 1], alphas[t], q))
        time = torch.full((len(states),), t / steps, dtype=torch.float64)
        p = net(states, time, torch.zeros_like(states, dtype=torch.bool)).exp().numpy()
        rows = [np.einsum("bk,bks->bs", p[:, n], post[states[:, n].numpy()]) for n in range(N)]
        now = np.einsum("b,bi,bj->ij", now, *rows).flatten()
    return now.reshape(size, size)[:K, :K]
