"""A trained system as a function: keys and conditions in, pictures out."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffax import components
from diffax.conditions.base import Condition, one_each
from diffax.conditions.text import as_texts
from diffax.errors import UserError
from diffax.models import cascade
from diffax.models.base import Generator, Sampling, Start, clip_of
from diffax.sampling import arguments
from diffax.training import parallel, reporting

Params = Any


@dataclasses.dataclass(frozen=True, eq=False)
class SampleFn:
    """`sample_fn(key, label=[3, 7], guidance=1.5)` -> pictures; the pure function underneath is `models.cascade`.

    Attributes:
      models: the generators, in order.
      params: {section: parameters}, of the generators and of what guides or conditions them.
      config: the config they were trained with, as a plain dict.
      step: {section: training step of the parameters}.
    """

    models: tuple[Generator, ...]
    params: Mapping[str, Params]
    config: Mapping[str, Any]
    step: Mapping[str, int]

    # ---- what it is

    @functools.cached_property
    def given(self) -> dict[str, dict[str, Condition]]:
        """{model: {name: condition}} that a call gives, and no earlier model makes."""
        found, made = {}, set()
        for model in self.models:
            found[model.name] = {name: c for name, c in model.given.items() if name not in made}
            made.add(model.output)
        return found

    @functools.cached_property
    def arguments(self) -> dict[str, Condition]:
        """The arguments that conditions are given by, in order, each with the first condition that has it."""
        found: dict[str, Condition] = {}
        for conditions in self.given.values():
            for condition in conditions.values():
                if condition.absent(1) is None:
                    found.setdefault(condition.argument, condition)
        return found

    @property
    def first(self) -> Generator | None:
        """The first model that makes pictures; None of a prior alone."""
        return cascade.first_of_pictures(self.models)

    @property
    def makes_pictures(self) -> bool:
        """Whether its samples are pictures."""
        return len(self.models[-1].shape) == 3

    @property
    def enlarges(self) -> bool:
        """Whether it is given a smaller picture."""
        return "image" in self.arguments

    @property
    def reads_text(self) -> bool:
        """Whether it is given a prompt."""
        return "prompt" in self.arguments

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1; 0 where there are none."""
        counts = [getattr(c, "num_classes", 0) for of in self.given.values() for c in of.values()]
        return max(counts, default=0)

    @property
    def mode(self) -> str:
        """How the devices of a process share the work, see `parallel.sampling_mode`."""
        return parallel.sampling_mode(self.config.get("parallel", "pmap"))

    @functools.cached_property
    def clip(self) -> Any:
        """The CLIP whose embeddings a model has or makes.

        Raises:
          UserError: there is none.
        """
        found = next((clip for clip in map(clip_of, self.models) if clip is not None), None)
        if found is None:
            raise UserError("no stage has a CLIP's embeddings; sample_fn; load a model with a CLIP")
        return found

    # ---- sampling

    def __call__(
        self,
        key: int | jax.Array,
        n: int | None = None,
        *,
        first: int = 0,
        guidance: float | Sequence[float] | Mapping[str, Any] | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: float | None = None,
        noise: np.ndarray | None = None,
        level: float | Sequence[float] | Mapping[str, Any] | None = None,
        steps: str | int | Mapping[str, str | int] | None = None,
        sampler: str | Mapping[str, str] | None = None,
        eta: float | None = None,
        keep: int = 0,
        every_stage: bool = False,
        batch_size: int = 64,
        **conditions: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray] | dict[str, np.ndarray]:
        """Samples pictures.

        Picture i depends on the key, i, the i-th conditions and the i-th guidance only, not on how many are made or on
        how many devices. New labels, guidance or keys never compile again; a new `steps`, `sampler` or `keep` does.

        Args:
          key: a seed or a typed PRNG key; or [n] keys, one for each picture: equal ones give equal noise.
          n: how many; by default as many as there are conditions, else 1.
          first: the number i of the first one: with n, pictures that an earlier call did not come to.
          guidance: scale of the guidance that has one, one for all pictures or one each; see `diffusion.guidance` for
            what 0 and 1 mean. {stage: scale} where stages differ. By default the config's.
          image: [h, w, C] or [n, h, w, C], uint8 or floats in [-1, 1]. Without `mask` and `strength` it is what the
            first stage enlarges, if that has the condition 'low_res', of any size that its network can halve often
            enough once enlarged. With either it is edited, and has the size of the last stage's pictures.
          mask: [h, w] or [n, h, w], true or 1 where `image` is known and stays as it is, bit by bit; the rest is filled
            in: by a model that was trained to (its condition is 'inpaint'), else by replacement at every step.
          strength: how far from `image` the result may go, in (0, 1]: the share of the steps that are walked from
            `image` made noisy. 1, or none: from noise alone.
          noise: [h, w, C] or [n, h, w, C], what the first stage that makes pictures starts from in place of noise that
            is drawn, such as `invert` finds.
          level: noise on the smaller picture that a stage enlarges, as u in [0, 1], up to what it was trained with;
            given like guidance. By default the config's.
          steps: another sampling grid than the config's, such as 50, 'ddim25' or 'logsnr10'; {stage: choice} where it
            is not for all.
          sampler: another sampler than the config's, by name or import path, given like steps.
          eta: of that sampler, if it has one, such as 'ddim'.
          keep: also return this many estimates of each picture on the way (DDPM's progressive generation).
          every_stage: return {stage: pictures} of all stages.
          batch_size: pictures made at once.
          **conditions: a value for every picture, or one for all, by the arguments of the model's conditions: label,
            prompt, image_embedding (from `embed`; None to drop it), or that of a condition of your own.

        Returns:
          [n, H, W, C] float32 in [-1, 1]; with `keep`, also [n, keep, H, W, C]. Embeddings [n, E] of a prior alone.

        Raises:
          UserError: a condition is missing, unknown or out of range; n, guidance, steps or sampler cannot be.
        """
        if image is not None and mask is None and strength is None:
            conditions["image"] = image
        edit = self._edit(image, mask, strength) if mask is not None or strength is not None else {}
        if noise is not None:
            edit["noise"] = self._noise(noise, edited=bool(edit))
        self._check_plan(batch_size, keep, every_stage)
        self._check_arguments(conditions)
        keys_given = len(key) if np.ndim(key) else None
        n = self._count(keys_given if n is None else n, conditions, (guidance, level), edit)
        tree = {
            "given": self._given(conditions, level, n),
            "scales": self._scales(guidance, n),
            "edit": {name: one_each(name, array, n, 3) for name, array in edit.items()},
        }
        run = self._run(steps, sampler, eta, keep, every_stage, float(strength or 1))
        return self._in_batches(run, arguments.keys(key, first, n), tree, batch_size)

    def _run(self, steps, sampler, eta, keep, every_stage, strength) -> Callable[..., Any]:
        grids, samplers = self._by_stage("steps", steps), self._by_stage("sampler", sampler)
        if eta is not None and sampler is None:
            raise UserError("eta is of a sampler; sample_fn(eta=...); name it, as in sampler='ddim'")
        made = tuple((name, (choice, _with_eta(choice, eta))) for name, choice in samplers)
        try:
            return _compiled(self.models, grids, made, keep, every_stage, strength, self.mode)
        except ValueError as error:
            raise UserError(f"{error}; sample_fn(steps={steps!r})") from error

    def _in_batches(self, run: Callable, keys: jax.Array, tree: Any, batch_size: int) -> Any:
        n = len(keys)
        size = min(batch_size, 2 ** math.ceil(math.log2(n)))
        params, done = parallel.settled(self.params, self.mode), []
        for start in reporting.progress_bar(range(0, n, size), "sampling"):
            # The last batch is filled up: one program serves all.
            index = np.minimum(np.arange(start, start + size), n - 1)
            out = run(params, keys[index], jax.tree.map(lambda v, i=index: v[i], tree))
            done.append(jax.tree.map(lambda a, left=n - start: np.asarray(a)[:left], out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *done)

    def starting_at(self, name: str) -> "SampleFn":
        """The same system from a later stage on, which is then given what the stages before it would make.

        Raises:
          UserError: there is no such stage.
        """
        names = [model.name for model in self.models]
        if name not in names:
            raise UserError(f"unknown stage {name!r}; sample_fn.starting_at; stages are {', '.join(names)}")
        return dataclasses.replace(self, models=self.models[names.index(name) :])

    def alone(self, name: str) -> "SampleFn":
        """One stage by itself."""
        later = self.starting_at(name)
        return dataclasses.replace(later, models=later.models[:1])

    # ---- embeddings and latents

    def embed(self, image: np.ndarray, *, batch_size: int = 64) -> np.ndarray:
        """The image embeddings of pictures, for `sample_fn(key, image_embedding=...)`: variations of them (DALL-E 2).

        Args:
          image: [h, w, C] or [n, h, w, C], uint8 or floats in [-1, 1], of the CLIP's proportions.
          batch_size: pictures at once.

        Returns:
          [E] or [n, E] float32.

        Raises:
          UserError: no stage has a CLIP, or a picture cannot be read.
        """
        clip, image = self.clip, arguments.picture(image, "sample_fn.embed")
        if image.ndim not in (3, 4) or image.shape[-1] != clip.shape[-1] or not image.size:
            raise UserError(
                f"image is {image.shape}; sample_fn.embed; pass one picture [h, w, {clip.shape[-1]}] or several"
            )
        run, params = embedder(clip), self.params[clip.name]
        rows = image[None] if image.ndim == 3 else image
        parts = [np.asarray(run(params, rows[i : i + batch_size])) for i in range(0, len(rows), batch_size)]
        return np.concatenate(parts)[0] if image.ndim == 3 else np.concatenate(parts)

    def embed_text(self, prompt: str | Sequence[str]) -> np.ndarray:
        """The CLIP text embeddings of captions, as long as image embeddings are if these are all of one length.

        Args:
          prompt: a text or several.

        Returns:
          [E] or [n, E] float32.

        Raises:
          UserError: no stage has a CLIP, or there are no prompts.
        """
        texts, one = as_texts("prompt", prompt)
        found = np.asarray(text_embedder(self.clip)(self.params[self.clip.name], self.clip.tokenizer(texts)))
        return found[0] if one else found

    def invert(
        self, image: np.ndarray, *, steps: str | int | None = None, batch_size: int = 64, **conditions: Any
    ) -> np.ndarray:
        """The noise of which DDIM makes these pictures, their x_T (ADM, appendix F; DALL-E 2, section 3).

        The first stage that makes pictures is run backwards, without guidance or clipping. With the same conditions and
        steps, `sample_fn(0, noise=found, sampler='ddim', guidance=1, ...)` gives the pictures back, the better the more
        steps there are.

        Args:
          image: [h, w, C] or [n, h, w, C], uint8 or floats in [-1, 1], of the size of that stage.
          steps: as in a call.
          batch_size: pictures at once.
          **conditions: as in a call.

        Returns:
          [h, w, C] or [n, h, w, C] float32.

        Raises:
          UserError: the picture or a condition does not fit, or the stage cannot be run backwards.
        """
        model = self.first
        if model is not self.models[0] or self.enlarges:
            raise UserError(
                f"{self.models[0].name} comes first and makes no pictures from noise alone; sample_fn.invert; start "
                "at a stage that does: sample_fn.starting_at(NAME)"
            )
        image = arguments.in_range(arguments.picture(image, "sample_fn.invert"), "sample_fn.invert")
        if image.ndim not in (3, 4) or image.shape[-3:] != tuple(model.shape):
            raise UserError(
                f"image is {image.shape}; sample_fn.invert; {model.name} makes pictures of {model.shape}: resize it"
            )
        try:
            backwards = dataclasses.replace(self, models=(_climbing(model, None if steps is None else str(steps)),))
        except ValueError as error:
            raise UserError(f"{error}; sample_fn.invert(steps={steps!r})") from error
        one = image.ndim == 3
        wanted = {name: value for name, value in conditions.items() if name in backwards.arguments}
        found = backwards(0, 1 if one else None, noise=image, batch_size=batch_size, **wanted)
        return found[0] if one else found

    # ---- what a call is given

    def _check_plan(self, batch_size: int, keep: int, every_stage: bool) -> None:
        if batch_size < 1 or keep < 0 or (keep and every_stage):
            raise UserError(f"batch_size is {batch_size} and keep {keep}; sample_fn; use at least 1 and 0")
        if keep and not self.makes_pictures:
            raise UserError(f"keep is {keep}, but {self.models[-1].name} makes no pictures; sample_fn; leave it out")

    def _check_arguments(self, conditions: Mapping[str, Any]) -> None:
        for name in conditions:
            if name not in self.arguments:
                there = ", ".join(self.arguments) or "none"
                raise UserError(
                    f"this model has no condition {name!r}; sample_fn; its conditions are {there}"
                    f"{components.closest(name, self.arguments)}"
                )
        for name in self.arguments:
            if name not in conditions:
                how = {"prompt": "'...'", "image": "[h, w, C]", "image_embedding": "sample_fn.embed(image)"}
                raise UserError(f"the condition {name!r} is missing; sample_fn; pass {name}={how.get(name, '[...]')}")

    def _count(self, n: int | None, conditions: Mapping, numbers: Sequence, edit: Mapping) -> int:
        """How many pictures to make: n, or as many as there are conditions, scales or levels."""
        lengths = [len(array) for array in edit.values() if array.ndim == 4]
        lengths += [self.arguments[name].count(value) or 1 for name, value in conditions.items()]
        for given in numbers:
            for value in given.values() if isinstance(given, Mapping) else [given]:
                lengths += _length(value)
        n = max(lengths, default=1) if n is None else n
        if not isinstance(n, int | np.integer) or n < 1:
            raise UserError(f"there is nothing to sample (n = {n}); sample_fn; n is at least 1")
        return int(n)

    def _given(self, conditions: Mapping[str, Any], level: Any, n: int) -> dict[str, dict[str, Any]]:
        """{model: {condition: arrays [n, ...]}}."""
        levels = self._levels(level, n)
        given: dict[str, dict[str, Any]] = {}
        for model in self.models:
            its = given[model.name] = {}
            for name, condition in model.given.items():
                level_of = levels.get((model.name, name), {})
                if name not in self.given[model.name]:
                    its[name] = level_of
                elif condition.argument in conditions:
                    its[name] = condition.from_user(conditions[condition.argument], n)
                    its[name] = {**its[name], **level_of} if level_of else its[name]
                else:
                    its[name] = condition.absent(n)
        self._check_size(given)
        return given

    def _check_size(self, given: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises UserError if a picture that is given is of a size that the networks cannot halve often enough."""
        if not self.enlarges:
            return
        factor, unit = 1, 1
        small = given[self.models[0].name][self.arguments["image"].name]["image"]
        for model in self.models:
            condition = model.conditions["low_res"]
            deepest = 2 ** (len(getattr(model.net.net, "channel_mult", (1,))) - 1)
            factor *= condition.factor
            unit = math.lcm(unit, deepest // math.gcd(deepest, factor))
        if any(side % unit for side in small.shape[1:3]):
            raise UserError(
                f"image is {small.shape[1:]}; sample_fn; {self.models[0].name} enlarges pictures whose sides are "
                f"multiples of {unit}"
            )

    def _scales(self, guidance: Any, n: int) -> dict[str, np.ndarray]:
        """{guided model: [n] float32}."""
        own = {model.name: model.scale for model in self.models if model.scale is not None}
        none = "this model has no guidance with a scale; sample_fn; see `guidance` of a stage in the config"
        return arguments.numbers("guidance", guidance, own, n, none=none)

    def _levels(self, level: Any, n: int) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        """{(model that enlarges a noised picture, its condition): {'level': [n] float32}}."""
        noised = noised_conditions(self.models)
        own = {name: c.level for name, c in noised.items()}
        levels = arguments.numbers(
            "level", level, own, n, none="no stage has a noised smaller picture; sample_fn(level=...)"
        )
        return {(name, noised[name].name): noised[name].levels(values, n) for name, values in levels.items()}

    def _by_stage(self, what: str, given: Any) -> tuple[tuple[str, str], ...]:
        """((stage, choice), ...) of one choice for all stages or {stage: choice}."""
        names = [model.name for model in self.models]
        given = {} if given is None else given if isinstance(given, Mapping) else dict.fromkeys(names, given)
        for name in given:
            if name not in names:
                raise UserError(f"no stage {name!r}; sample_fn({what}=...); stages are {', '.join(names)}")
        return tuple((name, str(choice)) for name, choice in given.items())

    def _noise(self, noise: Any, *, edited: bool) -> np.ndarray:
        """What the first stage of pictures starts from, checked."""
        model = self.first
        if edited or model is None or self.enlarges:
            raise UserError("noise is for pictures made of noise alone; sample_fn; leave out noise, or what is edited")
        noise = np.asarray(noise, np.float32)
        if noise.ndim not in (3, 4) or noise.shape[-3:] != tuple(model.shape) or not np.isfinite(noise).all():
            raise UserError(
                f"noise is {noise.shape}, or not finite; sample_fn; {model.name} starts from {model.shape}, such as "
                "sample_fn.invert finds"
            )
        return noise

    def _edit(self, image: Any, mask: Any, strength: float | None) -> dict[str, np.ndarray]:
        """The picture to be edited and what is known of it."""
        shape = tuple(self.models[-1].shape)
        if image is None:
            raise UserError("there is no picture to edit; sample_fn(mask=..., strength=...); pass image=[h, w, C]")
        if self.enlarges:
            raise UserError(
                f"{self.models[0].name} enlarges a picture, so nothing can be edited; sample_fn; use a model of the "
                "whole cascade"
            )
        arguments.check_strength(strength)
        image = arguments.picture(image, "sample_fn")
        if image.ndim not in (3, 4) or image.shape[-3:] != shape:
            raise UserError(
                f"image is {image.shape}; sample_fn; this model edits pictures of {shape}: resize or crop it"
            )
        arguments.in_range(image, "sample_fn")
        return {"image": image} if mask is None else {"image": image, "known": arguments.known(mask, image, shape)}


def noised_conditions(models: Sequence[Generator]) -> dict[str, Condition]:
    """{model: its condition whose noise level a call may choose}: not where the model before stops at that level."""
    found = {}
    for i, model in enumerate(models):
        for condition in model.conditions.values():
            if getattr(condition, "noise", 0) and (i == 0 or condition.stops_before is None):
                found[model.name] = condition
    return found


@functools.lru_cache(maxsize=32)
def _with_eta(name: str, eta: float | None) -> Any:
    """A sampler by name.

    Raises:
      UserError: there is none, or it has no eta.
    """
    factory = components.find("sampler", name, "sample_fn(sampler=...)")
    if eta is None:
        return factory()
    field = components.schema(factory).get("eta")
    if field is None:
        raise UserError(f"the sampler {name!r} has no eta; sample_fn(eta={eta}); leave it out")
    if not field.accepts(float(eta)):
        raise UserError(f"eta must be {field.allowed}, got {eta}; sample_fn")
    return factory(eta=float(eta))


def _length(value: Any) -> list[int]:
    """[n] of n numbers; [] of one number, and of what `_numbers` refuses."""
    try:
        return [len(value)] if isinstance(value, Sequence | np.ndarray) and np.ndim(value) == 1 else []
    except ValueError:  # it is ragged
        return []


@functools.lru_cache(maxsize=32)
def _compiled(
    models: tuple[Generator, ...],
    grids: tuple[tuple[str, str], ...],
    samplers: tuple[tuple[str, Any], ...],
    keep: int,
    every_stage: bool,
    strength: float,
    mode: str,
) -> Callable[..., Any]:
    """The sampler over all devices, one for all parameters: (params, keys, {given, scales, edit}) -> pictures."""
    steps, chosen = dict(grids), dict(samplers)
    choices = {
        name: Sampling(steps.get(name), chosen[name][1] if name in chosen else None) for name in {*steps, *chosen}
    }
    pure = cascade.cascade(cascade.resampled(models, choices), keep=keep, every=every_stage)

    def run(params, keys, tree):
        start = Start(**tree["edit"], strength=strength) if tree["edit"] else None
        out = pure(params, keys, tree["given"], tree["scales"], start)
        return (out[0], out[1].swapaxes(0, 1)) if keep else out

    return parallel.map_batch(run, mode=mode)


@functools.lru_cache(maxsize=32)
def _climbing(model: Any, steps: str | None) -> Any:
    return model.climbing(steps)


@functools.lru_cache(maxsize=8)
def embedder(clip: Any) -> Callable[[Params, np.ndarray], jax.Array]:
    """(parameters, pictures) -> embeddings, over all devices."""
    return parallel.map_batch(clip.embed_image)


@functools.lru_cache(maxsize=8)
def text_embedder(clip: Any) -> Callable[[Params, np.ndarray], jax.Array]:
    """(parameters, ids) -> embeddings, over all devices."""
    return parallel.map_batch(lambda params, ids: clip.embed_text(params, ids).embedding)
