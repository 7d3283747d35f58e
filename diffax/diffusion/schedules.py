"""Noise schedules: how much noise there is at each moment of the process (floor 0).

A *level* is two numbers: what the network's clock reads (`time`) and the log signal-to-noise ratio (`logsnr`);
clean data has logsnr = +inf. A *schedule* is a function from u in [0, 1] (0 clean, 1 noise) to a level, as an
optax schedule is a function of a count. A table of betas and a closed formula are both such functions, and
callers cannot tell them apart. Training draws u; respacing, DDIM and the few-step solvers only choose other u.

Tables are made on the host in float64 and cast once, by `transitions`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

# What a choice of steps may be, for messages.
STEPS = "'' (all), 'N', 'N,N,...', 'ddimN', 'trailingN', 'quadN', 'logsnrN' or 'fast27'"
CONTINUOUS_STEPS = "'N', 'quadN' or 'logsnrN'"


@flax.struct.dataclass
class NoiseLevel:
    """A point of the process: z = alpha x + sigma eps, with alpha^2 + sigma^2 = 1.

    Attributes:
      time: what the network is told, float, any shape (scalar, batch or table).
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


@flax.struct.dataclass
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


# ---- betas ---------------------------------------------------------------------------------------------------------


def linear_betas(steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Betas on a straight line (DDPM section 4), scaled by 1000 / T so that any T ends equally noisy.

    Args:
      steps: T, number of steps of the chain.
      beta_start: first beta of the chain of 1000 steps.
      beta_end: last beta of the chain of 1000 steps.

    Returns:
      [T] float64.
    """
    scale = 1000 / steps
    return np.linspace(scale * beta_start, scale * beta_end, steps, dtype=np.float64)


def quad_betas(steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Betas whose square roots lie on a straight line; [T] float64 (DDPM's code, option `quad`)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64) ** 2


def const_betas(steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """The same beta (`beta_end`) at every step; [T] float64 (DDPM's code, option `const`)."""
    del beta_start
    return np.full(steps, beta_end, dtype=np.float64)


def warmup_betas(steps: int, beta_start: float = 1e-4, beta_end: float = 0.02, *, fraction: float) -> np.ndarray:
    """A linear ramp over the first `fraction` of the steps, then `beta_end`; [T] float64 (DDPM's code, `warmup10`)."""
    betas = np.full(steps, beta_end, dtype=np.float64)
    ramp = int(steps * fraction)
    betas[:ramp] = np.linspace(beta_start, beta_end, ramp, dtype=np.float64)
    return betas


def jsd_betas(steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """beta = 1/T, 1/(T-1), ..., 1; [T] float64 (Sohl-Dickstein et al. 2015; DDPM's code, option `jsd`).

    The last level has no signal left, so a network that predicts eps cannot know x there: predict x or v.
    """
    del beta_start, beta_end
    return 1.0 / np.linspace(steps, 1, steps, dtype=np.float64)


def cosine_betas(steps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """beta_t = min(1 - f((t+1)/T) / f(t/T), 0.999), f(u) = cos^2((u + 0.008) / 1.008 * pi / 2); [T] float64.

    Improved DDPM, equation 17. The offset 0.008 makes the first noise a little smaller than one pixel value.
    """
    del beta_start, beta_end
    f = np.cos((np.arange(steps + 1, dtype=np.float64) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


BETAS: dict[str, Callable[..., np.ndarray]] = {
    "linear": linear_betas,
    "quad": quad_betas,
    "const": const_betas,
    "warmup10": lambda *args: warmup_betas(*args, fraction=0.1),
    "warmup50": lambda *args: warmup_betas(*args, fraction=0.5),
    "jsd": jsd_betas,
    "cosine": cosine_betas,
}


# ---- schedules -----------------------------------------------------------------------------------------------------


def discrete(betas: Sequence[float] | np.ndarray, *, rescale_time: bool = False) -> Schedule:
    """A chain of T steps, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM, equation 2).

    u = i / T is the level after i noising steps, whose clock reads i - 1 as in the published code; u = 0 is clean.
    Other u are rounded to the nearest step.

    Args:
      betas: [T], each in (0, 1].
      rescale_time: let the clock run over [0, 1000) whatever T is (Improved DDPM's `rescale_timesteps`).

    Returns:
      The schedule.

    Raises:
      ValueError: a beta lies outside (0, 1].
    """
    betas = np.asarray(betas, np.float64)
    steps = len(betas)
    if betas.ndim != 1 or not steps or not np.all((betas > 0) & (betas <= 1)):
        outside = betas[~((betas > 0) & (betas <= 1))].ravel()[:1]
        raise ValueError(
            f"betas must be a list of numbers in (0, 1]; schedule of {steps} steps has {outside}; "
            "use more steps or a smaller beta_end"
        )
    with np.errstate(divide="ignore"):
        log_ab = np.cumsum(np.log1p(-betas))
        logsnr = np.concatenate([[np.inf], log_ab - np.log(-np.expm1(log_ab))])
    time = np.arange(-1, steps, dtype=np.float64) * (1000 / steps if rescale_time else 1)

    def schedule(u: Array) -> NoiseLevel:
        if isinstance(u, np.ndarray):
            i = np.rint(u * steps).astype(np.int64)
            return NoiseLevel(time=time[i], logsnr=logsnr[i])
        i = jnp.rint(u * steps).astype(jnp.int32)
        return NoiseLevel(time=jnp.asarray(time, jnp.float32)[i], logsnr=jnp.asarray(logsnr, jnp.float32)[i])

    return schedule


def cosine_logsnr(logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> Schedule:
    """The continuous cosine schedule, logsnr(u) = -2 log tan(a u + b) (classifier-free guidance, section 2).

    b = arctan(exp(-logsnr_max / 2)), a = arctan(exp(-logsnr_min / 2)) - b, so that u = 0 has logsnr_max and u = 1
    logsnr_min. The clock reads 1000 u.

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

    return schedule


def continuous(betas: Sequence[float] | np.ndarray) -> Schedule:
    """The levels of a chain joined to a continuous schedule, whose clock is the level itself (WaveGrad; SR3).

    Between its values after i and i + 1 steps alpha runs straight, so u ~ U(0, 1) draws a step and then alpha evenly
    between that step's two ends. The clock reads 1000 alpha and knows no step: sampling may use any other levels.

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

    return schedule


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
    last = NoiseLevel(time=np.float64(0), logsnr=np.float64(np.inf)) if end is None else end
    if t.logsnr[-1] >= last.logsnr:
        raise ValueError(
            f"steps must end clean: the last starts at logsnr {t.logsnr[-1]:.4g} and ends at {last.logsnr:.4g}"
        )
    s = jax.tree.map(lambda levels, e: np.append(levels[1:], e), t, last)
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
    """The transition from `t` straight to clean data, for callers that need a denoiser's opinion at a bare level."""
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


def last(steps: Transition, share: float) -> Transition:
    """The cleanest `share` of the steps, at least one.

    Raises:
      ValueError: the share is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the steps must be above 0 and at most 1; got {share:g}")
    count = len(steps.t.logsnr)
    return steps[count - max(1, round(share * count)) :]


def space_timesteps(steps: int, sections: str | int | Sequence[int]) -> np.ndarray:
    """Chooses which of the T training steps a shorter chain keeps (Improved DDPM section 4; ADM).

    Args:
      steps: T, the length of the trained chain.
      sections: '' keeps all; '250' or 250 keeps that many, evenly strided, both ends included; '10,15,20' cuts the
        chain into equal sections and keeps so many of each; 'ddimN' uses the integer stride of the DDIM paper;
        'trailingN' walks down from the last step (Lin et al. 2024, table 2), 'quadN' keeps more steps near the data
        (DDIM, appendix D.2, here with both ends); 'fast27' is GLIDE's hand-tuned list for its upsampler.

    Returns:
      [N] int64, increasing, in [0, T).

    Raises:
      ValueError: the choice is not possible.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        wanted = _count(sections.removeprefix("ddim"), sections)
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == wanted:
                return np.arange(0, steps, stride)
        raise ValueError(f"no integer stride takes exactly {wanted} of {steps} steps; got {sections!r}; use {wanted}")
    grid, count = _named_grid(sections)
    if grid in ("trailing", "quad"):
        if count > steps:
            raise ValueError(f"cannot keep {count} of {steps} steps; steps are {sections!r}")
        if grid == "trailing":
            return np.round(np.arange(steps, 0, -steps / count)[:count]).astype(np.int64)[::-1] - 1
        return _distinct((steps - 1) * np.linspace(0 if count > 1 else 1, 1, count) ** 2, steps)
    if sections == "fast27":
        if steps < 50:
            raise ValueError(f"'fast27' needs a chain of at least 50 steps; got {steps}")
        kept = set(space_timesteps(steps, "10,10,3,2,2").tolist())
        return np.array(sorted(kept - {steps - 1} | {steps - 3}))
    if isinstance(sections, str):
        counts = [_count(part, sections) for part in sections.split(",")] if sections else [steps]
    else:
        counts = [sections] if isinstance(sections, int) else [int(c) for c in sections]
    size, extra = divmod(steps, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise ValueError(
                f"cannot keep {count} of the {length} steps of section {i}; steps are {sections!r} of {steps}"
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


def _distinct(index: np.ndarray, steps: int) -> np.ndarray:
    """Rounds increasing numbers to different steps of [0, steps), moving those that collide to the next free one."""
    order = np.arange(len(index))
    index = np.maximum.accumulate(np.round(index).astype(np.int64) - order) + order
    return np.minimum(index, steps - len(index) + order)


def respaced(schedule: Schedule, steps: int, sections: str | int | Sequence[int] = "") -> Transition:
    """The transitions of a T-step chain, or of the shorter one that a choice keeps.

    Args:
      schedule: a schedule of T discrete steps.
      steps: T.
      sections: as in `space_timesteps`; or 'logsnrN', evenly spaced in log-SNR (DPM-Solver, section 3.4).

    Returns:
      A table of N transitions.

    Raises:
      ValueError: the choice is not possible.
    """
    grid, count = _named_grid(sections)
    if grid != "logsnr":
        kept = space_timesteps(steps, sections)
    elif count > steps:
        raise ValueError(f"cannot keep {count} of {steps} steps; steps are {sections!r}")
    else:
        kept = _distinct(_at_even_logsnr(schedule, np.arange(1, steps + 1) / steps, count) * steps - 1, steps)
    return transitions(schedule, (kept[::-1] + 1) / steps)


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


# ---- by name --------------------------------------------------------------------------------------------------------


def build(config: Mapping[str, Any]) -> tuple[Schedule, int]:
    """The schedule that a config's `schedule` section describes, and its T (0 if continuous).

    Raises:
      ValueError: unknown name, or numbers that make no schedule.
    """
    if config["name"] == "cosine_logsnr":
        return cosine_logsnr(config["logsnr_min"], config["logsnr_max"]), 0
    if config["name"] not in BETAS:
        raise ValueError(f"unknown schedule.name {config['name']!r}; use one of {', '.join(sorted(BETAS))}")
    betas = BETAS[config["name"]](config["steps"], config["beta_start"], config["beta_end"])
    if config["continuous"]:
        return continuous(betas), 0
    return discrete(betas, rescale_time=config["rescale_time"]), config["steps"]


def build_steps(schedule: Schedule, train_steps: int, choice: str | int) -> Transition:
    """The transitions that sampling walks: `respaced` if there are T train_steps, `continuous_steps` if there are 0."""
    return respaced(schedule, train_steps, choice) if train_steps else continuous_steps(schedule, choice)
