"""The diffusion model: of pictures, or of the embeddings that a prior makes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffax.components import RUNTIME, TRAINING, WIRED, Each, In, Length, Of, Section, component
from diffax.conditions.base import Condition, drop, zeros
from diffax.data.pipeline import Column
from diffax.diffusion import guidance as guidances
from diffax.diffusion import losses, samplers, schedules
from diffax.diffusion.process import diffuse, predict
from diffax.diffusion.schedules import NoiseLevel, NoiseSchedule, Transition
from diffax.diffusion.timesteps import TimestepSampler
from diffax.models import analytic, base, choices
from diffax.models.base import STATISTICS, Params, Start
from diffax.models.best_of import best_of
from diffax.models.guidance import Guidance, Site, as_scale, guided, scale_of
from diffax.models.targets import Target, target_of
from diffax.networks.conditioned import Conditioned
from diffax.networks.context import Context
from diffax.networks.sharding import tied

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionModel:
    """One diffusion model, every choice made.

    Attributes:
      name: the config's section.
      number: its place among the generators, which its noise depends on: the same if those before were sampled earlier.
      target: what it makes.
      conditions: what it depends on besides its noise level.
      net: the network and the encoders of the conditions.
      schedule: noise level as a function of u.
      predicts: 'eps', 'x', 'v' or 'previous_x'.
      variance: see `process.predict`.
      analytic: whether sampling adds to that what the data leave open, see `models.analytic`.
      timesteps: how training draws u.
      loss_fn: what training minimises.
      condition_dropout: share of the training examples whose conditions are dropped.
      guidance: what wraps the denoiser in sampling, innermost first.
      sampler: how sampling walks its steps.
      temperature: of the noise that sampling starts from.
      steps: table of the transitions that sampling walks.
      nulls: {condition: null value}, of those that training drops.
    """

    name: str
    number: int
    target: Target
    conditions: Mapping[str, Condition]
    net: Conditioned
    schedule: NoiseSchedule
    predicts: str
    variance: str | float
    analytic: bool
    timesteps: TimestepSampler
    loss_fn: losses.Loss
    condition_dropout: float
    guidance: Mapping[str, Guidance]
    sampler: samplers.Sampler
    temperature: float
    steps: Transition
    nulls: Mapping[str, Any]

    curve = ("loss",)

    # ---- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return self.target.shape

    @property
    def output(self) -> str:
        """The condition that its sample is to later models."""
        return self.target.output

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the pictures that training reads."""
        return self.target.data_shape

    @property
    def scale(self) -> float | None:
        """Of its guidance."""
        return scale_of(self.guidance)

    @property
    def given(self) -> Mapping[str, Condition]:
        """The conditions that sampling is given."""
        found = dict(self.conditions)
        for part in self.guidance.values():
            found |= {name: c for name, c in part.conditions.items() if name not in found}
        return found

    @property
    def frozen(self) -> tuple[str, ...]:
        """Sections whose parameters training needs."""
        of = (*(name for c in self.conditions.values() for name in c.sections), *self.target.sections)
        return tuple(dict.fromkeys(of))

    @property
    def sections(self) -> tuple[str, ...]:
        """Sections whose parameters sampling needs."""
        of = (name for part in self.guidance.values() for name in part.sections)
        return tuple(dict.fromkeys((self.name, *of, *self.frozen)))

    @property
    def rates(self) -> dict[str, float]:
        """Factors of the learning rate, by the paths of parameters."""
        return {f"{n}/{path}": rate for n, c in self.conditions.items() for path, rate in c.rates.items()}

    @property
    def num_steps(self) -> int:
        """How often sampling calls the network for one sample."""
        return len(self.steps.t.time)

    @property
    def has_bound(self) -> bool:
        """Whether it has a variational bound: a chain of discrete steps, and nothing to condition on but data."""
        return bool(self.schedule.num_timesteps) and not self.frozen

    def resampled(self, choice: base.Sampling) -> "DiffusionModel":
        """The model with another sampling grid or sampler.

        Raises:
          ValueError: the grid is not possible.
        """
        changes: dict[str, Any] = {}
        if choice.steps is not None:
            changes["steps"] = schedules.build_steps(self.schedule, choice.steps)
        if choice.sampler is not None:
            changes["sampler"] = choice.sampler
        return dataclasses.replace(self, **changes)

    # ---- training

    def init(self, key: Array) -> Params:
        """Initial parameters, float32."""
        inputs = {name: zeros(c.example()) for name, c in self.conditions.items()}
        return self.net.init(key, jnp.zeros((1, *self.shape)), jnp.zeros((1,)), inputs)["params"]

    def init_extra(self) -> Any:
        """The state of the timestep sampler."""
        return self.timesteps.init()

    def update_extra(self, extra: Any, feedback: Any) -> Any:
        """The next state of the timestep sampler."""
        return self.timesteps.update(extra, *feedback)

    def columns(self) -> dict[str, Column]:
        """What a batch holds besides its pictures."""
        return base.columns_of(self.conditions)

    @property
    def edit(self) -> Callable | None:
        """A change of training pictures on the host."""
        return base.edit_of(self.conditions)

    def prepare(self, params: Mapping[str, Params], batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of the data as `loss` reads it."""
        found = self.target.prepare(params, batch)
        for condition in self.conditions.values():
            found |= condition.prepare(params, batch)
        return found

    def with_frozen(self, params: Mapping[str, Params]) -> "DiffusionModel":
        """The model with null values that frozen models make."""
        return dataclasses.replace(self, nulls={name: self.conditions[name].null(params) for name in self.nulls})

    def batch_example(self) -> dict[str, Any]:
        """One example as `loss` reads it, as shapes."""
        found = {self.target.key: jax.ShapeDtypeStruct(self.shape, jnp.float32)}
        for condition in self.conditions.values():
            found |= condition.batch_example()
        return found

    @functools.cached_property
    def _chain(self) -> Transition | None:
        """One reverse step for every training step, so that the bound knows where each would go; None if continuous."""
        count = self.schedule.num_timesteps
        return schedules.respaced(self.schedule.level, count)[::-1] if count else None

    def _step_at(self, u: Array) -> Transition:
        if self._chain is None:
            return schedules.to_clean(self.schedule(u))
        index = jnp.rint(u * self.schedule.num_timesteps).astype(jnp.int32) - 1
        return jax.tree.map(lambda a: jnp.asarray(a)[index], self._chain)

    def _conditions_in_training(self, batch: Mapping[str, Any], x: Array, keys: Array) -> tuple[Array, dict[str, Any]]:
        inputs = {}
        for number, (name, condition) in enumerate(self.conditions.items()):
            x, inputs[name] = condition.in_training(batch, x, base.fold_in(keys, number))
        return x, inputs

    def loss(self, params, extra, batch, keys, position, total, gather=None):
        """See `base.Model.loss`: DDPM, algorithm 1; Improved DDPM, section 3.

        Noise, noise level, dropout and which conditions are dropped depend on an example's own key.
        """
        keys = base.split(keys, "noise", "timestep", "dropout", "drop", "conditions")
        u, weight = self.timesteps.draw(extra, keys["timestep"], position, total)
        x = self.target.to_x(batch[self.target.key])
        x, inputs = self._conditions_in_training(batch, x, keys["conditions"])
        noised = losses.noised(x, base.normal(keys["noise"], x.shape[1:]), self._step_at(u))
        if self.nulls:
            how = {"conditions": self.conditions, "rate": self.condition_dropout, "nulls": self.nulls}
            inputs = drop(inputs, keys["drop"], **how)
        time, dropout = noised.step.t.time, keys["dropout"]
        out = self.net.apply({"params": params}, noised.z, time, inputs, dropout_keys=dropout)
        value, terms = self.loss_fn(out, noised, predicts=self.predicts, variance=self.variance)
        found = predict(out, noised.z, noised.step, predicts=self.predicts, variance=self.variance)
        terms = terms | self.target.metrics(found.x, x)
        return value * weight, base.by_quarter({"loss": value, **terms}, u), (u, value)

    # ---- sampling

    def denoiser(self, params: Mapping[str, Params]) -> guidances.Denoiser:
        """The denoiser without guidance, of {section: parameters}; it reads the model's own conditions."""
        own = params[self.name]

        def denoise(z: Array, step: Transition, **conditions: Any):
            inputs = {name: conditions[name] for name in self.conditions}
            out = self.net.apply({"params": own}, z, step.t.time, inputs)
            p = predict(out, z, step, predicts=self.predicts, variance=self.variance)
            if not self.analytic:
                return p
            table = nn.meta.unbox(own[STATISTICS])
            variance = analytic.analytic_variance(
                z, step, jnp.interp(step.t.logsnr, table["logsnr"], table["residual"])
            )
            return p._replace(variance=variance, logvar=jnp.log(jnp.maximum(variance, jnp.exp(p.logvar))))

        return denoise

    def guided_denoiser(
        self, params: Mapping[str, Params], scale: Array | None = None, nulls: Mapping[str, Any] | None = None
    ) -> guidances.Denoiser:
        """The denoiser under the model's guidance.

        Args:
          params: {section: parameters} of the model and of what guides it.
          scale: of the guidance that has one, scalar or [B]; None leaves that guidance out.
          nulls: null values of the conditions, by default the model's own.

        Returns:
          The denoiser; it also reads the conditions of the guidance.
        """
        nulls = self.nulls if nulls is None else nulls

        def denoise(z: Array, step: Transition, **conditions: Any):
            here = tied(params, z)  # it is called in a loop
            return guided(self.denoiser(here), self.guidance, Site(here, scale, nulls))(z, step, **conditions)

        return denoise

    def _inputs(self, params: Mapping[str, Params], keys: Array, given: Mapping[str, Any], start: Start | None):
        """What the denoiser reads of what is given, and the null values; read once what no step changes."""
        inputs = {
            name: condition.in_sampling(given[name], base.fold_in(keys, -2 - number), params)
            for number, (name, condition) in enumerate(self.given.items())
        }
        size = (len(keys), *self._size(given))
        if start is not None and start.known is not None:
            edited = start.image, start.known
        else:
            edited = None if size[1:] == self.shape else (jnp.zeros(size), jnp.zeros((*size[:-1], 1)))
        for name, condition in self.conditions.items():
            if edited is not None and hasattr(condition, "of_start"):
                inputs[name] = condition.of_start(*edited)
        nulls = {name: self.conditions[name].null(params) for name in self.nulls}
        once = {name: inputs[name] for name, c in self.conditions.items() if c.encoded_once}
        if not once:
            return inputs, nulls

        def encode(some: Mapping[str, Any], n: int) -> dict[str, Context]:
            z = jnp.zeros((n, *self.shape))
            return self.net.apply({"params": params[self.name]}, some, z, method="encode")

        dropped = {name: jax.tree.map(lambda a: jnp.asarray(a)[None], nulls[name]) for name in once if name in nulls}
        nulls |= jax.tree.map(lambda a: a[0], encode(dropped, 1))
        return {**inputs, **encode(once, len(keys))}, nulls

    def _size(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape of the samples, which a condition such as a smaller picture may change."""
        sizes = (condition.result_size(given[name]) for name, condition in self.conditions.items())
        size = next((size for size in sizes if size), None)
        return self.shape if size is None else (*size, self.shape[-1])

    def _begin(self, z: Array, steps: Transition, start: Start | None) -> tuple[Array, Transition, samplers.Sampler]:
        """z, steps and sampler of a chain that begins elsewhere than at noise, or some of whose pixels are known."""
        sampler = self.sampler
        if start is None:
            return z, steps, sampler
        if start.noise is not None:
            z = start.noise
        if start.known is not None and not any(hasattr(c, "of_start") for c in self.conditions.values()):
            sampler = samplers.replace_known(sampler, start.image, start.known)
        if start.strength < 1:
            steps = schedules.final_part(steps, start.strength)
            z = diffuse(start.image, jax.tree.map(lambda a: jnp.broadcast_to(a[0], len(z)), steps.t), z)
        return z, steps, sampler

    def until(self, stop: float | None) -> Transition:
        """The steps as far as a log-SNR; all of them without one."""
        return self.steps if stop is None else schedules.until(self.steps, stop)

    def reached(self, stop: float | None) -> NoiseLevel | None:
        """The noise level at which sampling that stops at a log-SNR ends; None: clean."""
        return None if stop is None else jax.tree.map(lambda a: a[-1], self.until(stop).s)

    def sample(self, params, keys, given, *, scale=None, start=None, stop=None, keep=0):
        """See `base.Generator.sample`."""
        noise = samplers.picture_noise(keys, self._size(given))
        z = self.temperature * noise(jnp.int32(-1))  # a number that no step has
        z, steps, sampler = self._begin(z, self.until(stop), start)
        inputs, nulls = self._inputs(params, keys, given, start)
        denoise = self.guided_denoiser(params, as_scale(scale, self.scale), nulls)
        out = samplers.sample(denoise, z, noise, steps, sampler, keep=keep, **inputs)
        out, kept = out if keep else (out, None)
        out = self.target.from_x(out)
        if start is not None and start.known is not None and stop is None:
            out = jnp.where(start.known > 0, start.image, out)
        return (out, kept) if keep else out

    def climbing(self, steps: str | None) -> "DiffusionModel":
        """The model whose sample is the noise of the picture that it starts from, see `samplers.invert`.

        DDIM without noise is the same formula up and down, so its steps are walked from clean to noisy.

        Raises:
          ValueError: the model or the steps go one way only.
        """
        if self.predicts == "previous_x":
            raise ValueError(f"{self.name} predicts the step itself, which goes one way")
        chosen = self.steps if steps is None else schedules.build_steps(self.schedule, steps)
        if len(chosen.t.logsnr) < 2:
            raise ValueError("inversion takes two steps or more")
        climb = chosen[::-1]
        table = dataclasses.replace(climb[:-1], s=climb[1:].t)
        return dataclasses.replace(self, steps=table, sampler=samplers.ddim(eta=0.0), guidance={})

    # ---- scores

    def bits_per_dim(self, params: Params, image: Array, keys: Array, given: Mapping[str, Any]) -> losses.BitsPerDim:
        """The variational bound of pictures along the sampling steps (DDPM, section 4; Improved DDPM, section 3).

        The bound is the model's own: guidance that has a scale, or that needs other sections, is left out.

        Args:
          params: of the model.
          image: [B, H, W, C] in [-1, 1].
          keys: [B] typed PRNG keys.
          given: {condition: what it is given}, see `Condition.from_batch`.
        """
        own = {self.name: params}
        inputs = {
            name: condition.in_sampling(given[name], base.fold_in(keys, -2 - number), own)
            for number, (name, condition) in enumerate(self.conditions.items())
        }
        noise = samplers.picture_noise(keys, self.shape)
        parts = {name: part for name, part in self.guidance.items() if not part.sections}
        alone = dataclasses.replace(self, guidance=parts)
        return losses.bits_per_dim(alone.guided_denoiser(own), image, noise, self.steps, **inputs)

    def residual(self, params: Params, batch: Mapping[str, Any], keys: Array, u: np.ndarray) -> Array:
        """[B, G], whose mean over B is Var[x | z_t] at G noise levels u: E[x^2] - E[f^2] where f is the estimate of x.

        Means over dimensions (Analytic-DPM, Bao et al. 2022, in terms of x).
        """
        x = self.target.to_x(batch[self.target.key])
        x, inputs = self._conditions_in_training(batch, x, keys)

        def at(numbered: tuple[Array, Array]) -> Array:
            number, u = numbered
            level = self.schedule(jnp.full(keys.shape, u))
            z = diffuse(x, level, base.normal(base.fold_in(keys, number), x.shape[1:]))
            out = self.net.apply({"params": params}, z, level.time, inputs)
            p = predict(out, z, schedules.to_clean(level), predicts=self.predicts, variance=self.variance)
            return losses.mean_flat(x**2) - losses.mean_flat(p.x**2)

        return jax.lax.map(at, (jnp.arange(len(u)), jnp.asarray(u, jnp.float32))).T

    def statistics_example(self) -> dict[str, Any] | None:
        """`jax.ShapeDtypeStruct`s of what is measured on the data; None if nothing is."""
        if not self.analytic:
            return None
        return dict.fromkeys(("logsnr", "residual"), jax.ShapeDtypeStruct((analytic.LEVELS,), jnp.float32))

    def measure_after(self, run: Callable, batches: base.Batches) -> dict[str, np.ndarray] | None:
        """Measures what the trained model leaves open of the data, by noise level; None if it does not need it.

        Args:
          run: (function of (params, batch, keys)) -> the same over all devices, with the trained parameters bound.
          batches: as `loss` reads them.
        """
        return analytic.measure(self, run, batches) if self.analytic else None


Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range", "analytic"]


@component("model", "diffusion")
def diffusion(
    *,
    shape: Annotated[tuple[int, ...], In(1, 8192), Length(1, 3)] = (32, 32, 3),
    clip: Annotated[Any, Section(needs="embed_text", what="a CLIP")] = "",
    net: Annotated[Any, Of("network", "unet", late=True)],
    conditions: Annotated[Any, Each("condition", late=True)],
    schedule: Annotated[NoiseSchedule, Of("schedule", "linear")],
    predicts: Literal["eps", "x", "v", "previous_x"] = "eps",
    variance: Annotated[Variance | float, In(0, 1)] = "fixed_large",
    loss: Annotated[Any, Of("loss", "simple"), TRAINING],
    timesteps: Annotated[Any, Of("timesteps", "uniform", late=True), TRAINING],
    condition_dropout: Annotated[float, In(0, 1, below=True)] = 0.0,
    guidance: Annotated[Any, Each("guidance", ("clip_denoised",)), RUNTIME],
    sampler: Annotated[samplers.Sampler, Of("sampler", "ddpm"), RUNTIME],
    steps: Annotated[str, RUNTIME] = "",
    temperature: Annotated[float, In(0, 2), RUNTIME] = 1.0,
    candidates: Annotated[int, In(1, 64), RUNTIME] = 1,
    name: Annotated[str, WIRED],
    number: Annotated[int, WIRED] = 0,
) -> DiffusionModel:
    """A diffusion model of pictures; with a CLIP, the prior that makes its image embeddings.

    Args:
      shape: (height, width, channels) of its pictures; of a prior (D,), the size of the embeddings.
      clip: section of the CLIP whose embeddings it makes.
      net: its network.
      conditions: what it depends on besides its noise level, in the order in which they are concatenated.
      schedule: noise level as a function of time.
      predicts: what the network predicts.
      variance: of the reverse step; a number interpolates between fixed_small and fixed_large.
      loss: what training minimises.
      timesteps: how training draws noise levels.
      condition_dropout: share of the training examples whose conditions are dropped (classifier-free guidance).
      guidance: what steers sampling, innermost first.
      sampler: how sampling walks its steps.
      steps: the sampling grid, such as '250', 'ddim25' or 'logsnr10'; '' for all.
      temperature: of the noise that sampling starts from.
      candidates: how many embeddings a prior makes of a caption, of which the nearest to it is kept.
      name: of the section.
      number: place among the generators of the config.
    """
    drops = condition_dropout > 0
    made = {key: make(name=key, shape=shape, schedule=schedule, droppable=drops) for key, make in conditions.items()}
    for key, condition in made.items():
        if condition.dropout and not condition.can_drop:
            raise ValueError(
                f"conditions.{key}.dropout is {condition.dropout:g}, but it cannot be dropped; set it to 0"
            )
        if condition.dropout and not drops:
            raise ValueError(f"conditions.{key}.dropout needs condition_dropout above 0")
    if drops and not any(c.can_drop for c in made.values()):
        raise ValueError(f"condition_dropout is {condition_dropout:g}, but no condition can be dropped; set it to 0")
    target = target_of(clip, shape, made)
    choices.check(predicts, variance, loss, schedule)
    learned = variance in ("learned", "learned_range")
    network = net(out_channels=shape[-1] * (1 + learned), name="net", parent=None)
    if hasattr(network, "check"):
        network.check(tuple(shape))
    encoders = tuple((key, condition.encoder(network)) for key, condition in made.items())
    model = DiffusionModel(
        name=name,
        number=number,
        target=target,
        conditions=made,
        net=Conditioned(network, encoders),
        schedule=schedule,
        predicts=predicts,
        variance="fixed_small" if variance == "analytic" else variance,
        analytic=variance == "analytic",
        timesteps=timesteps(num_timesteps=schedule.num_timesteps),
        loss_fn=loss,
        condition_dropout=condition_dropout,
        guidance=guidance,
        sampler=sampler,
        temperature=temperature,
        steps=choices.grid(schedule, steps),
        nulls={key: c.null({}) for key, c in made.items() if drops and c.can_drop},
    )
    for part in (*guidance.values(), *made.values()):
        part.check(model)
    scale_of(guidance)
    base.check_sequences(model.net, made, shape)
    return best_of(model, candidates)
