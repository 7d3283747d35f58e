"""Noise schedules: how much noise there is at each moment of the process.

A *level* is two numbers: the `time` that the network's timestep embedding gets and the log signal-to-noise ratio
(`logsnr`); clean data has logsnr = +inf. A *schedule* is a function from u in [0, 1] (0 clean, 1 noise) to a level, as
an optax schedule is a function of a count. A table of betas and a closed formula are both such functions, and callers
cannot distinguish them. Training draws u; respacing, DDIM and the few-step solvers only choose other u.

Tables are made on the host in float64 and cast once, by `transitions`.

One long file: levels, the schedules over them and the steps through them are one subject.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import In, component

Array = jax.Array | np.ndarray

# What a choice of steps may be, for messages.
STEPS = "'' (all), 'N', 'N,N,...', 'ddimN', 'trailingN', 'quadN', 'logsnrN' or 'fast27'"
CONTINUOUS_STEPS = "'N', 'quadN' or 'logsnrN'"


def struct(cls: type) -> type:
    """Makes a class a frozen dataclass that is a JAX pytree; all its fields are arrays or trees of them."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@struct
class NoiseLevel:
    """A point of the process: z = alpha x + sigma eps, with alpha^2 + sigma^2 = 1.

    >>> level = NoiseLevel(time=np.zeros(2), logsnr=np.array([0.0, np.inf]))
    >>> print(level.alpha.round(3), level.sigma.round(3), level.is_clean)
    [0.707 1.   ] [0.707 0.   ] [False  True]

    Attributes:
      time: the network's input, float, any shape (scalar, batch or table).
      logsnr: log(alpha^2 / sigma^2), same shape; +inf is clean data, -inf pure noise.
    """

    time: Array
    logsnr: Array

    @property
    def alpha(self) -> jax.Array:
        """alpha = sqrt(sigmoid(logsnr)), the scale of the clean data."""
        return jnp.sqrt(jax.nn.sigmoid(self.logsnr))

    @property
    def sigma(self) -> jax.Array:
        """sigma = sqrt(sigmoid(-logsnr)), the standard deviation of the noise."""
        return jnp.sqrt(jax.nn.sigmoid(-self.logsnr))

    @property
    def is_clean(self) -> jax.Array:
        """True where there is no noise at all."""
        return jnp.isposinf(self.logsnr)


@struct
class Transition:
    """One step of the reverse process, from the noisier level `t` to the cleaner level `s`.

    Attributes:
      t: where the step starts.
      s: where it ends, cleaner than `t`.
      min_logvar: log variance of q(z_s | z_t, x), the posterior of the forward process (a lower bound for the
        reverse process). At the last step this variance is 0 and its log takes the value of the step before it
        (the "clipped" log variance of the published code).
      max_logvar: log variance of q(z_t | z_s), the upper bound: log beta_t for one step of a T-step chain.
    """

    t: NoiseLevel
    s: NoiseLevel
    min_logvar: Array
    max_logvar: Array

    def __getitem__(self, index) -> "Transition":
        """Picks steps from a table of steps."""
        return jax.tree.map(lambda a: a[index], self)


Schedule = Callable[[Array], NoiseLevel]


class NoiseSchedule(NamedTuple):
    """A schedule and the length of its chain: what every component of kind 'schedule' makes.

    Calling it calls `level`, which is what `jax.jit` and `jax.vmap` take.

    Attributes:
      level: u in [0, 1], any shape, float64 on the host or float32 on the device -> NoiseLevel of that shape.
      num_timesteps: T of a chain of T steps; 0 of a continuous schedule.
    """

    level: Schedule
    num_timesteps: int

    def __call__(self, u: Array) -> NoiseLevel:
        """The level at u."""
        return self.level(u)


# ---- betas ---------------------------------------------------------------------------------------------------------


def linear_betas(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Betas on a straight line (DDPM section 4), scaled by 1000 / T so that any T ends equally noisy.

    Args:
      num_timesteps: T, number of steps of the chain.
      beta_start: first beta of the chain of 1000 steps.
      beta_end: last beta of the chain of 1000 steps.

    Returns:
      [T] float64.

    >>> linear_betas(1000)[[0, -1]].tolist()
    [0.0001, 0.02]
    """
    scale = 1000 / num_timesteps
    return np.linspace(scale * beta_start, scale * beta_end, num_timesteps, dtype=np.float64)


def quad_betas(num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Betas whose square roots lie on a straight line; [T] float64 (DDPM's code, option `quad`)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2


def const_betas(num_timesteps: int, beta_end: float = 0.02) -> np.ndarray:
    """The same beta (`beta_end`) at every step; [T] float64 (DDPM's code, option `const`)."""
    return np.full(num_timesteps, beta_end, dtype=np.float64)


def warmup_betas(
    num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02, *, fraction: float
) -> np.ndarray:
    """A linear ramp over the first `fraction` of the steps, then `beta_end`; [T] float64 (DDPM's code, `warmup10`)."""
    betas = np.full(num_timesteps, beta_end, dtype=np.float64)
    ramp = int(num_timesteps * fraction)
    betas[:ramp] = np.linspace(beta_start, beta_end, ramp, dtype=np.float64)
    return betas


def jsd_betas(num_timesteps: int) -> np.ndarray:
    """beta = 1/T, 1/(T-1), ..., 1; [T] float64 (Sohl-Dickstein et al. 2015; DDPM's code, option `jsd`).

    The last level has no signal left, so a network that predicts eps cannot know x there: predict x or v.
    """
    return 1.0 / np.linspace(num_timesteps, 1, num_timesteps, dtype=np.float64)


def cosine_betas(num_timesteps: int) -> np.ndarray:
    """beta_t = min(1 - f((t+1)/T) / f(t/T), 0.999), f(u) = cos^2((u + 0.008) / 1.008 * pi / 2); [T] float64.

    Improved DDPM, equation 17. The offset 0.008 makes the first noise a little smaller than one pixel value.
    """
    f = np.cos((np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


# ---- schedules -----------------------------------------------------------------------------------------------------


def discrete(betas: Sequence[float] | np.ndarray, *, rescale_time: bool = False) -> NoiseSchedule:
    """A chain of T steps, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM, equation 2).

    u = i / T is the level after i noising steps, whose time is i - 1 as in the published code; u = 0 is clean. Other u
    are rounded to the nearest step.

    >>> chain = discrete(linear_betas(1000))
    >>> chain(np.array([0.0, 0.5, 1.0])).time.tolist(), chain.num_timesteps
    ([-1.0, 499.0, 999.0], 1000)

    Args:
      betas: [T], each in (0, 1].
      rescale_time: let time run over [0, 1000) whatever T is (Improved DDPM's `rescale_timesteps`).

    Returns:
      The schedule.

    Raises:
      ValueError: a beta lies outside (0, 1].
    """
    betas = np.asarray(betas, np.float64)
    num_timesteps = len(betas)
    if betas.ndim != 1 or not num_timesteps or not np.all((betas > 0) & (betas <= 1)):
        outside = betas[~((betas > 0) & (betas <= 1))].ravel()[:1]
        raise ValueError(
            f"betas must be a list of numbers in (0, 1]; the chain of {num_timesteps} steps has {outside}; "
            "use more steps or a smaller beta_end"
        )
    with np.errstate(divide="ignore"):
        log_ab = np.cumsum(np.log1p(-betas))
        logsnr = np.concatenate([[np.inf], log_ab - np.log(-np.expm1(log_ab))])
    time = np.arange(-1, num_timesteps, dtype=np.float64) * (1000 / num_timesteps if rescale_time else 1)

    def schedule(u: Array) -> NoiseLevel:
        if isinstance(u, np.ndarray):
            i = np.rint(u * num_timesteps).astype(np.int64)
            return NoiseLevel(time=time[i], logsnr=logsnr[i])
        i = jnp.rint(u * num_timesteps).astype(jnp.int32)
        return NoiseLevel(time=jnp.asarray(time, jnp.float32)[i], logsnr=jnp.asarray(logsnr, jnp.float32)[i])

    return NoiseSchedule(schedule, num_timesteps)


@component("schedule", "cosine_logsnr")
def cosine_logsnr(logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> NoiseSchedule:
    """The continuous cosine schedule, logsnr(u) = -2 log tan(a u + b) (classifier-free guidance, section 2).

    b = arctan(exp(-logsnr_max / 2)), a = arctan(exp(-logsnr_min / 2)) - b, so that u = 0 has logsnr_max and u = 1
    logsnr_min. Time is 1000 u.

    >>> print(cosine_logsnr()(np.array([0.0, 0.25, 1.0])).logsnr.round(3))
    [ 20.      1.763 -20.   ]

    Args:
      logsnr_min: log-SNR of the noisiest level.
      logsnr_max: log-SNR of the cleanest level.

    Raises:
      ValueError: the range is empty.
    """
    if not logsnr_min < logsnr_max:
        raise ValueError(f"logsnr_min must be below logsnr_max; got {logsnr_min} and {logsnr_max}")
    b = np.arctan(np.exp(-logsnr_max / 2))
    a = np.arctan(np.exp(-logsnr_min / 2)) - b

    def schedule(u: Array) -> NoiseLevel:
        xp = np if isinstance(u, np.ndarray) else jnp
        return NoiseLevel(time=1000 * u, logsnr=-2 * xp.log(xp.tan(a * u + b)))

    return NoiseSchedule(schedule, 0)


def continuous(betas: Sequence[float] | np.ndarray) -> NoiseSchedule:
    """The levels of a chain joined to a continuous schedule, whose time is the level itself (WaveGrad; SR3).

    Between its values after i and i + 1 steps alpha runs straight, so u ~ U(0, 1) draws a step and then alpha evenly
    between that step's two ends. Time is 1000 alpha and knows no step: sampling may use any other levels.

    Args:
      betas: [T], each in (0, 1).

    Returns:
      The schedule; u = 0 is clean data.

    Raises:
      ValueError: a beta lies outside (0, 1).
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas) or not np.all((betas > 0) & (betas < 1)):
        raise ValueError("a continuous schedule needs betas in (0, 1); use more steps or a smaller beta_end")
    # 1 - alpha keeps its digits near clean data, where alpha does not.
    lost = np.concatenate([[0.0], -np.expm1(0.5 * np.cumsum(np.log1p(-betas)))])

    def schedule(u: Array) -> NoiseLevel:
        xp = np if isinstance(u, np.ndarray) else jnp
        position = u * len(betas)
        i = xp.clip(xp.floor(position).astype(xp.int32), 0, len(betas) - 1)
        table = xp.asarray(lost, None if xp is np else jnp.float32)
        d = table[i] + (position - i) * (table[i + 1] - table[i])
        with np.errstate(divide="ignore"):
            logsnr = 2 * xp.log1p(-d) - xp.log(d * (2 - d))
        return NoiseLevel(time=1000 * (1 - d), logsnr=logsnr)

    return NoiseSchedule(schedule, 0)


# ---- schedules that configs name -----------------------------------------------------------------------------------

NumTimesteps = Annotated[int, In(1, 10**6)]
Beta = Annotated[float, In(0, 1, above=True)]


def _chain(betas: np.ndarray, rescale_time: bool, continuous_time: bool) -> NoiseSchedule:
    return continuous(betas) if continuous_time else discrete(betas, rescale_time=rescale_time)


def _ramp(name: str, make: Callable[..., np.ndarray], doc: str) -> Callable[..., NoiseSchedule]:
    """Names the component of a family of betas that goes from beta_start to beta_end."""

    @component("schedule", name)
    def schedule(
        *,
        num_timesteps: NumTimesteps = 1000,
        beta_start: Beta = 1e-4,
        beta_end: Beta = 0.02,
        rescale_time: bool = False,
        continuous: bool = False,
    ) -> NoiseSchedule:
        if beta_start > beta_end:
            raise ValueError(f"beta_start must not exceed beta_end, got {beta_start:g} and {beta_end:g}")
        return _chain(make(num_timesteps, beta_start, beta_end), rescale_time, continuous)

    schedule.__name__ = schedule.__qualname__ = name
    schedule.__doc__ = f"""{doc}

    Args:
      num_timesteps: T, the length of the chain.
      beta_start: first beta.
      beta_end: last beta.
      rescale_time: let time run over [0, 1000) whatever T is.
      continuous: join the levels of the chain to a continuous schedule, whose time is 1000 alpha (SR3).
    """
    return schedule


linear = _ramp(
    "linear", linear_betas, "Betas on a straight line (DDPM, section 4), given for T = 1000 and scaled by 1000 / T."
)
quad = _ramp("quad", quad_betas, "Betas whose square roots lie on a straight line (latent diffusion's `linear`).")
warmup10 = _ramp(
    "warmup10", partial(warmup_betas, fraction=0.1), "A linear ramp over the first tenth of the steps, then beta_end."
)
warmup50 = _ramp(
    "warmup50", partial(warmup_betas, fraction=0.5), "A linear ramp over the first half of the steps, then beta_end."
)


@component("schedule", "const")
def const(
    *,
    num_timesteps: NumTimesteps = 1000,
    beta_end: Beta = 0.02,
    rescale_time: bool = False,
    continuous: bool = False,
) -> NoiseSchedule:
    """The same beta at every step (DDPM's code, option `const`).

    Args:
      num_timesteps: T, the length of the chain.
      beta_end: the beta of every step.
      rescale_time: let time run over [0, 1000) whatever T is.
      continuous: join the levels of the chain to a continuous schedule, whose time is 1000 alpha (SR3).
    """
    return _chain(const_betas(num_timesteps, beta_end), rescale_time, continuous)


@component("schedule", "jsd")
def jsd(*, num_timesteps: NumTimesteps = 1000, rescale_time: bool = False) -> NoiseSchedule:
    """beta = 1/T, 1/(T-1), ..., 1 (Sohl-Dickstein et al. 2015); the last level has no signal left.

    Args:
      num_timesteps: T, the length of the chain.
      rescale_time: let time run over [0, 1000) whatever T is.
    """
    return discrete(jsd_betas(num_timesteps), rescale_time=rescale_time)


@component("schedule", "cosine")
def cosine(
    *, num_timesteps: NumTimesteps = 1000, rescale_time: bool = False, continuous: bool = False
) -> NoiseSchedule:
    """The cosine schedule of a chain of T steps (Improved DDPM, equation 17).

    >>> cosine(num_timesteps=4000, rescale_time=True)(np.array([1.0])).time.tolist()
    [999.75]

    Args:
      num_timesteps: T, the length of the chain.
      rescale_time: let time run over [0, 1000) whatever T is.
      continuous: join the levels of the chain to a continuous schedule, whose time is 1000 alpha (SR3).
    """
    return _chain(cosine_betas(num_timesteps), rescale_time, continuous)


# ---- steps ---------------------------------------------------------------------------------------------------------


def transitions(schedule: Schedule, u: np.ndarray, *, end: NoiseLevel | None = None, dtype=np.float32) -> Transition:
    """The reverse steps through the levels schedule(u[0]), schedule(u[1]), ... down to clean data.

    Computed on the host in float64 and cast once. Every quantity follows from the levels alone, so a chain that skips
    levels (Improved DDPM, section 4) needs nothing else.

    Args:
      schedule: the noise schedule.
      u: [N] float64, noisiest first, strictly decreasing, in (0, 1] (a continuous schedule also takes 0).
      end: the last level; clean data by default.
      dtype: float type of the result.

    Returns:
      A table of N transitions, in sampling order.

    Raises:
      ValueError: u is not strictly decreasing, or leaves [0, 1].
    """
    u = np.asarray(u, np.float64)
    if u.ndim != 1 or not len(u) or np.any(np.diff(u) >= 0) or u[0] > 1 or u[-1] < 0:
        shown = np.array2string(u, threshold=6)
        raise ValueError(f"steps must go from noisy to clean: u strictly decreasing within [0, 1]; got {shown}")
    t = schedule(u)
    final = NoiseLevel(time=np.float64(0), logsnr=np.float64(np.inf)) if end is None else end
    if t.logsnr[-1] >= final.logsnr:
        raise ValueError(
            f"steps must end clean: the last starts at logsnr {t.logsnr[-1]:.4g} and ends at {final.logsnr:.4g}"
        )
    s = jax.tree.map(lambda levels, e: np.append(levels[1:], e), t, final)
    return between(t, s, dtype=dtype)


def between(t: NoiseLevel, s: NoiseLevel, *, dtype=np.float32) -> Transition:
    """The transitions from each level of the table `t` to the one beside it in `s`, both [N] float64 on the host.

    The variances follow from the levels: q(z_t | z_s) has 1 - alpha_t^2 / alpha_s^2, and the posterior that times
    sigma_s^2 / sigma_t^2 (DDPM, equation 7), which is clipped where s is clean.
    """

    def log_alpha2(logsnr):  # log sigmoid; log sigma^2 is the same function of -logsnr
        return -np.logaddexp(0, -logsnr)

    with np.errstate(divide="ignore"):
        max_logvar = np.log(-np.expm1(log_alpha2(t.logsnr) - log_alpha2(s.logsnr)))
        min_logvar = max_logvar + log_alpha2(-s.logsnr) - log_alpha2(-t.logsnr)
    if np.isneginf(min_logvar[-1]):
        min_logvar[-1] = min_logvar[-2] if len(min_logvar) > 1 else max_logvar[-1]
    table = Transition(t=t, s=s, min_logvar=min_logvar, max_logvar=max_logvar)
    return jax.tree.map(lambda a: np.asarray(a, dtype), table)


def to_clean(t: NoiseLevel) -> Transition:
    """The transition from `t` straight to clean data, for callers that evaluate a denoiser at a bare level."""
    shape = jnp.shape(t.logsnr)
    clean = NoiseLevel(time=jnp.zeros(shape), logsnr=jnp.full(shape, jnp.inf))
    return Transition(t=t, s=clean, min_logvar=jnp.zeros(shape), max_logvar=jnp.zeros(shape))


def until(steps: Transition, logsnr: float) -> Transition:
    """The first of `steps`, as long as they end no cleaner than at `logsnr` (CDM, section 3: truncated sampling).

    Raises:
      ValueError: already the first one ends cleaner.
    """
    count = int(np.sum(np.asarray(steps.s.logsnr) <= logsnr + 1e-4))
    if not count:
        raise ValueError(
            f"sampling cannot stop at log-SNR {logsnr:.4g}, before its first step; stop at a cleaner level"
        )
    return steps[:count]


def final_part(steps: Transition, share: float) -> Transition:
    """The cleanest `share` of the steps, at least one.

    Raises:
      ValueError: the share is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the steps must be above 0 and at most 1; got {share:g}")
    count = len(steps.t.logsnr)
    return steps[count - max(1, round(share * count)) :]


def space_timesteps(num_timesteps: int, sections: str | int | Sequence[int]) -> np.ndarray:
    """Chooses which of the T training steps a shorter chain keeps (Improved DDPM section 4; ADM).

    Args:
      num_timesteps: T, the length of the trained chain.
      sections: '' keeps all; '250' or 250 keeps that many, evenly strided, both ends included; '10,15,20' divides
        the chain into equal sections and keeps so many of each; 'ddimN' uses the integer stride of the DDIM paper;
        'trailingN' walks down from the last step (Lin et al. 2024, table 2), 'quadN' keeps more steps near the data
        (DDIM, appendix D.2, here with both ends); 'fast27' is GLIDE's hand-tuned list for its upsampler.

    Returns:
      [N] int64, increasing, in [0, T).

    >>> space_timesteps(1000, 5).tolist(), space_timesteps(1000, "trailing4").tolist()
    ([0, 250, 500, 749, 999], [249, 499, 749, 999])

    Raises:
      ValueError: the choice is not possible.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        wanted = _count(sections.removeprefix("ddim"), sections)
        for stride in range(1, num_timesteps):
            if len(range(0, num_timesteps, stride)) == wanted:
                return np.arange(0, num_timesteps, stride)
        raise ValueError(
            f"no integer stride takes exactly {wanted} of {num_timesteps} steps; got {sections!r}; use {wanted}"
        )
    grid, count = _named_grid(sections)
    if grid in ("trailing", "quad"):
        if count > num_timesteps:
            raise ValueError(f"cannot keep {count} of {num_timesteps} steps; steps are {sections!r}")
        if grid == "trailing":
            return np.round(np.arange(num_timesteps, 0, -num_timesteps / count)[:count]).astype(np.int64)[::-1] - 1
        return _distinct((num_timesteps - 1) * np.linspace(0 if count > 1 else 1, 1, count) ** 2, num_timesteps)
    if sections == "fast27":
        if num_timesteps < 50:
            raise ValueError(f"'fast27' needs a chain of at least 50 steps; got {num_timesteps}")
        kept = set(space_timesteps(num_timesteps, "10,10,3,2,2").tolist())
        return np.array(sorted(kept - {num_timesteps - 1} | {num_timesteps - 3}))
    if isinstance(sections, str):
        counts = [_count(part, sections) for part in sections.split(",")] if sections else [num_timesteps]
    else:
        counts = [sections] if isinstance(sections, int) else [int(c) for c in sections]
    size, extra = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise ValueError(
                f"cannot keep {count} of the {length} steps of section {i}; steps are {sections!r} of {num_timesteps}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1
        position = 0.0  # accumulated, not multiplied: the published lists depend on the rounding of the sum
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return np.array(kept)


def _count(text: str, sections: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"steps must be {STEPS}; got {sections!r}") from None


def _named_grid(sections: str | int | Sequence[int]) -> tuple[str, int]:
    """'quad10' -> ('quad', 10); ('', 0) for what is no such name."""
    match = re.fullmatch("(trailing|quad|logsnr)([1-9][0-9]{0,6})", sections) if isinstance(sections, str) else None
    return (match[1], int(match[2])) if match else ("", 0)


def _distinct(index: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Rounds increasing numbers to different steps of [0, T), moving those that collide to the next free one."""
    order = np.arange(len(index))
    index = np.maximum.accumulate(np.round(index).astype(np.int64) - order) + order
    return np.minimum(index, num_timesteps - len(index) + order)


def respaced(schedule: Schedule, num_timesteps: int, sections: str | int | Sequence[int] = "") -> Transition:
    """The transitions of a T-step chain, or of the shorter one that a choice keeps.

    Args:
      schedule: a schedule of T discrete steps.
      num_timesteps: T.
      sections: as in `space_timesteps`; or 'logsnrN', evenly spaced in log-SNR (DPM-Solver, section 3.4).

    Returns:
      A table of N transitions.

    Raises:
      ValueError: the choice is not possible.
    """
    grid, count = _named_grid(sections)
    if grid != "logsnr":
        kept = space_timesteps(num_timesteps, sections)
    elif count > num_timesteps:
        raise ValueError(f"cannot keep {count} of {num_timesteps} steps; steps are {sections!r}")
    else:
        kept = _distinct(
            _at_even_logsnr(schedule, np.arange(1, num_timesteps + 1) / num_timesteps, count) * num_timesteps - 1,
            num_timesteps,
        )
    return transitions(schedule, (kept[::-1] + 1) / num_timesteps)


def continuous_steps(schedule: Schedule, choice: str | int) -> Transition:
    """The transitions that sampling of a continuous schedule walks, from u = 1 to u = 0 and from there to clean data.

    Where u = 0 is clean data itself, the last of them starts at the level before.

    Args:
      schedule: a schedule of all u in [0, 1].
      choice: 'N' levels evenly spaced in u (classifier-free guidance, algorithm 2); 'quadN': u quadratic, more near the
        data; 'logsnrN': evenly spaced in log-SNR.

    Returns:
      A table of N transitions.

    Raises:
      ValueError: the choice is none of these.
    """
    grid, count = _named_grid(choice)
    if grid == "trailing" or not grid and not re.fullmatch("[1-9][0-9]{0,6}", str(choice)):
        raise ValueError(f"steps must be {CONTINUOUS_STEPS} for a continuous schedule; got {choice!r}")
    count = count or int(choice)
    ends_clean = bool(np.isposinf(schedule(np.zeros(1)).logsnr[0]))
    even = np.linspace(1, 0, count + ends_clean)[:count] if count > 1 else np.ones(1)
    if grid == "logsnr" and count > 1:
        fine = (1 - np.cos(np.pi * np.linspace(0, 1, 10_001))) / 2  # log-SNR is steep at both ends
        even = _at_even_logsnr(schedule, fine[ends_clean:], count)[::-1]
    return transitions(schedule, even**2 if grid == "quad" else even)


def _at_even_logsnr(schedule: Schedule, u: np.ndarray, count: int) -> np.ndarray:
    """`count` values of u, increasing, from u[0] to u[-1], whose log-SNRs are evenly spaced."""
    logsnr = schedule(u).logsnr
    if not np.isfinite(logsnr).all():
        raise ValueError("evenly spaced log-SNRs need a schedule that keeps some signal at its noisiest level")
    wanted = np.linspace(logsnr[-1], logsnr[0], count) if count > 1 else logsnr[-1:]
    return np.interp(wanted, logsnr[::-1], u[::-1])[::-1]


def build_steps(schedule: NoiseSchedule, choice: str | int) -> Transition:
    """The transitions that sampling walks: `respaced` of a chain, `continuous_steps` of a continuous schedule.

    >>> build_steps(cosine(num_timesteps=100), "trailing4").t.time.tolist()
    [99.0, 74.0, 49.0, 24.0]

    Args:
      schedule: a component of kind 'schedule'.
      choice: of the steps, as in these two functions.

    Raises:
      ValueError: the choice is not possible.
    """
    if schedule.num_timesteps:
        return respaced(schedule, schedule.num_timesteps, choice)
    return continuous_steps(schedule, choice)
