"""DNDM as a diffusers scheduler: a pipeline's loop over `timesteps` skips calls by itself.

    scheduler.set_timesteps(1000)
    for t in scheduler.timesteps:
        sample = scheduler.step(model(sample, t), t, sample, generator=generator).prev_sample

Times are real and fall in (0, 1], as discrete schedulers of diffusers are to have them. A network
that is told which tokens are noise gets `scheduler.noisy_mask` in the same loop.

Shape legend: B rows, N positions, K tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from sparring.diffusion.dndm.counts import TransitionTimes
from sparring.diffusion.dndm.denoisers import check_logits, told
from sparring.diffusion.dndm.draws import Draws, Generators
from sparring.diffusion.dndm.forward import hit, uniform_like
from sparring.diffusion.dndm.noise import Noise, absorbing, uniform
from sparring.diffusion.dndm.plans import TimedPlan
from sparring.diffusion.dndm.reveal import Reveal, Revise, State
from sparring.diffusion.dndm.schedules import as_schedule


@dataclass
class DNDMSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """What `step` returns."""

    prev_sample: Tensor
    """(B, N) the sample at the next time."""
    sampled_tokens: Tensor
    """(B, N) x~_0 where it was predicted, the sample elsewhere."""
    transfer_index: Tensor
    """(B, N) bool: what this step revealed."""
    pred_logits: Tensor
    """(B, N, K) as given."""


class DNDMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Pre-drawn transition times (arXiv 2312.09193) behind `set_timesteps`, `step`, `add_noise`.

    Args:
        vocab_size: K, the mask among them.
        sequence_length: N, for pipelines whose `set_timesteps` names none.
        mask_token_id: of absorbing noise; None for noise that is uniform over `noise_token_ids`.
        noise_token_ids: None for all.
        schedule: "linear", "cosine", "cosine2" or "beta", of the transition times.
        schedule_parameters: a and b of "beta".
        position, token, revise: as of `Reveal`, by name. "confidence" is DNDM-k.

    Raises:
        ValueError: an argument outside its range.
    """

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        vocab_size: int,
        sequence_length: int = 64,
        mask_token_id: int | None = None,
        noise_token_ids: list[int] | None = None,
        schedule: str = "linear",
        schedule_parameters: list[float] | None = None,
        position: str = "random",
        token: str = "sample",
        revise: Revise = "keep",
    ) -> None:
        if mask_token_id is not None and noise_token_ids is not None:
            raise ValueError(
                f"mask_token_id ({mask_token_id}) is absorbing noise and noise_token_ids "
                f"({noise_token_ids[:5]}) multinomial: set one of them"
            )
        self._length = sequence_length
        self._noise = (
            uniform(vocab_size, noise_token_ids)
            if mask_token_id is None
            else absorbing(vocab_size, mask_token_id)
        )
        self._law = as_schedule(schedule, *(schedule_parameters or []))
        counts = TransitionTimes(1, self._law)  # of set_timesteps, in the end
        self._sampler = Reveal(counts=counts, position=position, token=token, revise=revise)
        self._plan: TimedPlan | None = None
        self._free: Tensor | None = None
        self._state: State | None = None
        self._draws: tuple[Generators, Draws] | None = None
        self.timesteps = torch.zeros(0)

    @property
    def noise(self) -> Noise:
        """q_noise."""
        return self._noise

    @property
    def noisy_mask(self) -> Tensor:
        """bool (B, N), what is noise before the next step: `noisy=` of a conditioned network.

        (1, N) before the first step where all rows share the times: expand it to the sample.

        Raises:
            ValueError: no `set_timesteps`.
        """
        if self._state is not None:
            return self._state.noisy
        if self._free is None:
            raise ValueError("no transition times yet: call set_timesteps before noisy_mask")
        return self._free

    def set_timesteps(
        self,
        num_inference_steps: float,
        device: str | torch.device | None = None,
        *,
        sequence_length: int | None = None,
        batch_size: int | None = None,
        free_mask: Tensor | None = None,
        generator: Generators | None = None,
    ) -> None:
        """Draw transition times; `timesteps` are the distinct ones, falling.

        Args:
            num_inference_steps: T, or math.inf for one call a token.
            device: of everything.
            sequence_length: N; the configured one if None.
            batch_size: None: all rows share the times, and `timesteps` is (calls,). B: each row
                has its own, aligned by rank; `timesteps` is (calls, B), and 0 where a row is done.
            free_mask: bool, (1, N) or (B, N), what is generated; None for all.
            generator: of the times; torch's default one if None.

        Raises:
            ValueError: T < 1, or nothing to generate.
        """
        device = torch.device(device or "cpu")
        rows = 1 if batch_size is None else batch_size
        if free_mask is None:
            length = self._length if sequence_length is None else sequence_length
            if length < 1:
                raise ValueError(f"sequence_length must be at least one position, not {length}")
            free_mask = torch.ones((rows, length), dtype=torch.bool)
        if free_mask.shape[0] != rows or not bool(free_mask.any(1).all()):
            raise ValueError(
                f"free_mask must have shape ({rows}, N) and a True in each row, not "
                f"{tuple(free_mask.shape)} with {free_mask.sum(1).tolist()} True: each row needs a "
                "free position"
            )
        whole = num_inference_steps != math.inf and num_inference_steps % 1 == 0
        steps = int(num_inference_steps) if whole else num_inference_steps
        counts = TransitionTimes(steps, self._law)
        self._sampler = replace(self._sampler, counts=counts)
        self._free = free_mask.to(device)
        draws = Draws(_given(generator), rows, device)
        plan = self._plan = counts.plan(self._free, draws)
        self._state, self._draws = None, None
        times = plan.time_BE.T
        times = torch.where(times > 0, told(times), 0)
        self.timesteps = times[:, 0] if batch_size is None else times
        self.num_inference_steps = num_inference_steps

    def init_noise(
        self, shape: tuple[int, int], generator: torch.Generator | None = None
    ) -> Tensor:
        """(B, N) draws from q_noise: x_T of a pipeline."""
        source = torch.default_generator if generator is None else generator
        u = torch.rand(shape, generator=source, dtype=torch.float64, device=source.device)
        return self._noise.from_uniform(u)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample: tokens need no scaling."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *,
        generator: Generators | None = None,
        return_dict: bool = True,
    ) -> DNDMSchedulerOutput | tuple[Tensor, Tensor, Tensor, Tensor]:
        """x at the next transition time.

        Args:
            model_output: (B, N, K) logits of x_0, for all rows.
            timestep: the entry of `timesteps` whose turn it is.
            sample: (B, N) tokens of any integer type; int64 is returned. The first one given is
                the noise; what a pipeline changes between steps stays changed.
            generator: of the tokens, one or one a row; torch's default one if None.
            return_dict: a tuple of the same four if False.

        Raises:
            ValueError: no `set_timesteps`, a time out of turn, a sample of no integers, or logits
                that cannot be.
        """
        if sample.is_floating_point():
            raise ValueError(f"sample must hold integer tokens, not {sample.dtype}")
        sample = sample.long()
        if self._state is None:
            self._state = self._start(sample, generator)
        state = self._state
        self._check_turn(timestep, state.call)
        check_logits(model_output, sample.shape, self._noise)
        state.draws = self._streams(generator, len(sample), sample.device)
        state.noise_BN = torch.where(state.noisy, sample, state.noise_BN)
        state.x_BN, before = sample, state.clean_BN
        tokens = self._sampler.advance(state, model_output[state.active])
        output = DNDMSchedulerOutput(
            prev_sample=state.x_BN,
            sampled_tokens=tokens,
            transfer_index=state.clean_BN & ~before,
            pred_logits=model_output,
        )
        return output if return_dict else output.to_tuple()

    def add_noise(
        self,
        original_samples: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, N) x_t ~ q(x_t | x_0): `noise` where tau <= t, with tau ~ D_tau drawn here.

        Args:
            original_samples: (B, N) x_0.
            noise: (B, N) tokens of noise, as `init_noise` gives them.
            timesteps: (B,) or a single one, in [0, 1].
            generator: of tau; torch's default one if None.

        Raises:
            ValueError: a time outside [0, 1], NaN among them, or of another shape.
        """
        source = torch.default_generator if generator is None else generator
        u = uniform_like(original_samples, source)
        times = torch.as_tensor(timesteps, device=u.device)
        times = times.expand(len(u)) if times.numel() == 1 else times
        return torch.where(hit(u, times, self._law), noise, original_samples)

    def _start(self, sample: Tensor, generator: Generators | None) -> State:
        if self._plan is None or self._free is None:
            raise ValueError("no transition times yet: call set_timesteps before step")
        plan, free = self._plan, self._free
        if len(free) == 1 < len(sample):
            plan, free = plan.repeated(len(sample)), free.expand(len(sample), -1)
        if free.shape != sample.shape:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}, but set_timesteps was for "
                f"{tuple(free.shape)}: give it sequence_length and batch_size, or free_mask"
            )
        draws = self._streams(generator, len(sample), sample.device)
        clean = torch.zeros_like(free)
        return State(sample, sample, free, clean, plan, self._noise, draws)

    def _check_turn(self, timestep: Tensor | float, call: int) -> None:
        if call >= len(self.timesteps):
            raise ValueError(
                f"all {call} timesteps are done: call set_timesteps for another sample"
            )
        wanted = self.timesteps[call]
        given = torch.as_tensor(timestep, dtype=wanted.dtype, device=wanted.device)
        if not torch.equal(given.expand_as(wanted), wanted):
            raise ValueError(
                f"step {call} is at t = {wanted.tolist()}, not {given.tolist()}: go through "
                "scheduler.timesteps in order"
            )

    def _streams(self, generator: Generators | None, rows: int, device: torch.device) -> Draws:
        """Streams of the rows: made from a generator at its first step, and kept."""
        source = _given(generator)
        if self._draws is None or self._draws[0] is not source:
            self._draws = (source, Draws(source, rows, device))
        return self._draws[1]


def _given(generator: Generators | None) -> Generators:
    return torch.default_generator if generator is None else generator
