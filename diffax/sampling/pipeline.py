"""From a trained workdir to pictures, in one call."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffax import config as configs
from diffax import data, networks, weights
from diffax.conditions import tokenizer
from diffax.data import images
from diffax.diffusion import augment, samplers, schedules
from diffax.errors import UserError
from diffax.models import codes, stages
from diffax.training import checkpoint, parallel, reporting

Params = Any

# What may be chosen anew for parameters that are there.
NOT_IN_THE_NETWORK = (
    "data",
    "train",
    "loss",
    "timesteps",
    "guidance",
    "guidance_scale",
    "limit",
    "candidates",
    "embedding.mean",
    "embedding.std",
    "codes.examples",
    "codes.percentile",
    "classifier",
    "last",
    "workdir",
    "sampler",
    "steps",
    "low_res.level",
    "low_res.truncated",
    "low_res.round",
    "low_res.blur",
    "low_res.blur_sigma",
    "low_res.jpeg",
    "low_res.degrade",
    "low_res.crop",
    "inpaint",
    "text.vocab",
    "net.dropout",
    "net.dtype",
    "net.remat",
    "net.flash",
)


@dataclasses.dataclass(frozen=True, eq=False)
class SampleFn:
    """`sample_fn(key, label=[3, 7], guidance=1.5)` -> pictures; the pure function underneath is `stages.sample_fn`.

    Attributes:
      stages: the stages, in order.
      params: {section: parameters}, of the stages, the classifiers that guide them and the CLIPs that they use.
      config: the config they were trained with, as a plain dict.
      step: {section: training step of the parameters}.
    """

    stages: tuple[stages.Stage, ...]
    params: Mapping[str, Params]
    config: Mapping[str, Any]
    step: Mapping[str, int]

    @property
    def takes(self) -> tuple[str, ...]:
        """The conditions that a call must give."""
        given, made = [], set()
        for stage in self.stages:
            given += [name for name in stage.reads if name not in made]
            made.add(stage.emits)
        return tuple(dict.fromkeys(given))

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1; 0 where there are none."""
        return max(s.num_classes for s in self.stages)

    @functools.cached_property
    def tokenizers(self) -> Mapping[str, tokenizer.Tokenizer]:
        """{condition: prompts -> its ids}: 'text' of stages that read any, 'clip_text' of a CLIP that reads for one."""
        readers = [("text", s.name) for s in self.stages if "text" in s.takes]
        clips = [model for s in self.stages if "clip_text" in s.reads for model in (s.clip, s.guide)]
        readers += [("clip_text", model.name) for model in clips if isinstance(model, stages.Clip)]
        return {condition: text_tokenizer(self.config[name]) for condition, name in readers}

    @property
    def mode(self) -> str:
        """How the devices of a process run it, see `parallel.sampling_mode`."""
        return parallel.sampling_mode(self.config.get("parallel", "pmap"))

    @property
    def painter(self) -> stages.Stage | None:
        """The first stage that makes pictures; None of a prior alone."""
        return next((s for s in self.stages if s.emits == "low_res"), None)

    def __call__(
        self,
        key: int | jax.Array,
        n: int | None = None,
        *,
        first: int = 0,
        prompt: str | Sequence[str] | None = None,
        guidance: float | Sequence[float] | Mapping[str, Any] | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        strength: float | None = None,
        noise: np.ndarray | None = None,
        level: float | Sequence[float] | Mapping[str, Any] | None = None,
        steps: str | int | Mapping[str, str | int] | None = None,
        sampler: str | Mapping[str, str] | None = None,
        eta: float = 0.0,
        keep: int = 0,
        every_stage: bool = False,
        batch_size: int = 64,
        **cond: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray] | dict[str, np.ndarray]:
        """Samples pictures.

        Picture i depends on the key, i, the i-th conditions and the i-th guidance only, not on how many are made or on
        how many devices. New labels, guidance or keys never compile again; a new `steps`, `sampler` or `keep` does.

        Args:
          key: a seed or a typed PRNG key; or [n] keys, one for each picture: equal ones give equal noise.
          n: how many; by default as many as there are conditions, else 1.
          first: the number i of the first one: with n, pictures that an earlier call did not come to.
          prompt: what the pictures show, if a stage reads text: one text for all, or one each; a long one is cut.
          guidance: scale of the classifier's or of classifier-free guidance, one for all pictures or one each; see
            `diffusion.guidance` for what 0 and 1 mean. {stage: scale} where stages differ. By default the config's.
          image: [h, w, C] or [n, h, w, C], uint8 or floats in [-1, 1]. Without `mask` and `strength` it is what the
            first stage enlarges, if that takes 'low_res', of any size that its network can halve often enough once
            enlarged. With either it is edited, and has the size of the last stage's pictures.
          mask: [h, w] or [n, h, w], true or 1 where `image` is known and stays as it is, bit by bit; the rest is filled
            in: by a model that was trained to (it takes 'inpaint'), else by replacement at every step.
          strength: how far from `image` the result may go, in (0, 1]: the share of the steps that are walked from
            `image` made noisy. 1, or none: from noise alone.
          noise: [h, w, C] or [n, h, w, C], what the first stage that makes pictures starts from in place of noise that
            is drawn, such as `invert` finds.
          level: noise on the smaller picture that a stage enlarges, as u in [0, 1], up to what it was trained with;
            given like guidance. By default the config's.
          steps: another choice of steps than the config's, such as 50, 'ddim25' or 'logsnr10'; {stage: choice} where it
            is not for all.
          sampler: another sampler than the config's, a key of `samplers.SAMPLERS`, given like steps.
          eta: of DDIM, if it is named here.
          keep: also return this many estimates of each picture on the way (DDPM's progressive generation).
          every_stage: return {stage: pictures} of all stages.
          batch_size: pictures made at once.
          **cond: a value for every picture, or one for all: label, an integer or a list of them; image_embedding, from
            `embed`, of a decoder without a prior before it, or None to withhold it.

        Returns:
          [n, H, W, C] float32 in [-1, 1]; with `keep`, also [n, keep, H, W, C]. Embeddings [n, E] of a prior alone.

        Raises:
          UserError: a condition is missing, unknown or out of range; n, guidance, steps or sampler cannot be.
        """
        edit = {}
        if mask is not None or strength is not None:
            edit = self._edit(image, mask, strength)
        elif image is not None:
            cond["low_res"] = images.as_floats(image)
        if noise is not None:
            edit["noise"] = self._noise(noise, edited=bool(edit))
        if prompt is not None:
            cond |= self._read(prompt)
        n = self._count(len(key) if n is None and np.ndim(key) else n, {**cond, **edit}, guidance, level)
        cond = self._conditions(cond, n)
        numbers = {"guidance": self._scales(guidance, n), "level": self._levels(level, n)}
        numbers |= {name: _one_each(name, array, n, 3) for name, array in edit.items()}
        samplers_of, names = self._chosen("sampler", sampler), samplers.SAMPLERS
        for unknown in [name for _, name in samplers_of if name not in names]:
            near = configs.closest(unknown, names)
            raise UserError(f"unknown sampler {unknown!r}{near}; sample_fn; use one of {', '.join(names)}")
        if batch_size < 1 or keep < 0 or (keep and every_stage):
            raise UserError(f"batch_size is {batch_size} and keep {keep}; sample_fn; use at least 1 and 0")
        if keep and self.stages[-1].emits != "low_res":
            raise UserError(f"keep is {keep}, but {self.stages[-1].name} makes no pictures; sample_fn; leave it out")
        try:
            run = _compiled(
                self.stages,
                self._chosen("steps", steps),
                samplers_of,
                float(eta),
                keep,
                every_stage,
                float(strength or 1),
                self.mode,
            )
        except ValueError as error:
            raise UserError(f"{error}; sample_fn(steps={steps!r})") from error
        key = jax.random.key(key) if isinstance(key, int | np.integer) else key
        keys = key if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(first, first + n))
        if len(keys) != n:
            raise UserError(f"{len(keys)} keys for {n} pictures; sample_fn; pass one for all, or one each")
        size = min(batch_size, 2 ** math.ceil(math.log2(n)))
        params, done = parallel.settled(self.params, self.mode), []
        for start in reporting.progress_bar(range(0, n, size), "sampling"):
            # The last batch is filled up: one program serves all.
            index = np.minimum(np.arange(start, start + size), n - 1)
            out = run(params, keys[index], *jax.tree.map(lambda v, i=index: v[i], (numbers, cond)))
            done.append(jax.tree.map(lambda a, left=n - start: np.asarray(a)[:left], out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *done)

    def starting_at(self, name: str) -> "SampleFn":
        """The same cascade from a later stage on, which then enlarges a given `image`.

        Raises:
          UserError: there is no such stage.
        """
        names = [s.name for s in self.stages]
        if name not in names:
            raise UserError(f"unknown stage {name!r}; sample_fn.starting_at; stages are {', '.join(names)}")
        return dataclasses.replace(self, stages=self.stages[names.index(name) :])

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
        clip, image = self._clip("embed"), images.as_floats(image)
        if image.ndim not in (3, 4) or image.shape[-1] != clip.shape[-1] or not image.size:
            raise UserError(
                f"image is {image.shape}; sample_fn.embed; pass one picture [h, w, {clip.shape[-1]}] or several"
            )
        run, params = _embedder(clip), self.params[clip.name]
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
        clip = self._clip("embed_text")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts:
            raise UserError("there are no prompts; sample_fn.embed_text; give at least one")
        found = np.asarray(_text_embedder(clip)(self.params[clip.name], self._clip_tokenizer(texts)))
        return found[0] if isinstance(prompt, str) else found

    def invert(
        self,
        image: np.ndarray,
        *,
        prompt: str | Sequence[str] | None = None,
        steps: str | int | None = None,
        batch_size: int = 64,
        **cond: Any,
    ) -> np.ndarray:
        """The noise of which DDIM makes these pictures, their x_T (ADM, appendix F; DALL-E 2, section 3).

        The first stage that makes pictures is run backwards, without guidance or clipping. With the same conditions and
        steps, `sample_fn(0, noise=found, sampler='ddim', guidance=1, ...)` gives the pictures back, the better the more
        steps there are.

        Args:
          image: [h, w, C] or [n, h, w, C], uint8 or floats in [-1, 1], of the size of that stage.
          prompt: what the pictures show, if the stage reads text.
          steps: as in a call.
          batch_size: pictures at once.
          **cond: as in a call.

        Returns:
          [h, w, C] or [n, h, w, C] float32.

        Raises:
          UserError: the picture or a condition does not fit, or the stage cannot be run backwards.
        """
        stage = self.painter
        if stage is not self.stages[0] or stage.low_res:
            raise UserError(
                f"{self.stages[0].name} comes first and makes no pictures from noise alone; sample_fn.invert; start "
                "at a stage that does: sample_fn.starting_at(NAME)"
            )
        image = _in_range(images.as_floats(image), "sample_fn.invert")
        if image.ndim not in (3, 4) or image.shape[-3:] != stage.shape:
            raise UserError(
                f"image is {image.shape}; sample_fn.invert; {stage.name} makes pictures of {stage.shape}: resize it"
            )
        try:
            backwards = dataclasses.replace(self, stages=(_climbing(stage, None if steps is None else str(steps)),))
        except ValueError as error:
            raise UserError(f"{error}; sample_fn.invert(steps={steps!r})") from error
        one = image.ndim == 3
        found = backwards(0, 1 if one else None, noise=image, prompt=prompt, batch_size=batch_size, **cond)
        return found[0] if one else found

    @functools.cached_property
    def _clip_tokenizer(self) -> tokenizer.Tokenizer:
        return text_tokenizer(self.config[self._clip("embed_text").name])

    def _clip(self, method: str) -> stages.Clip:
        clip = next((s.clip for s in self.stages if s.clip), None)
        if clip is None:
            raise UserError(f"no stage takes embeddings; sample_fn.{method}; load a model with a CLIP")
        return clip

    def _chosen(self, what: str, given: Any) -> tuple[tuple[str, str], ...]:
        """((stage, choice), ...) of one choice for all stages or {stage: choice}."""
        names = [s.name for s in self.stages]
        given = {} if given is None else given if isinstance(given, Mapping) else dict.fromkeys(names, given)
        for name in given:
            if name not in names:
                raise UserError(f"no stage {name!r}; sample_fn({what}=...); stages are {', '.join(names)}")
        return tuple((name, str(choice)) for name, choice in given.items())

    def _noise(self, noise: Any, *, edited: bool) -> np.ndarray:
        """What the painter starts from, checked."""
        stage = self.painter
        if edited or stage is None or stage.low_res:
            raise UserError("noise is for pictures made of noise alone; sample_fn; leave out noise, or what is edited")
        noise = np.asarray(noise, np.float32)
        if noise.ndim not in (3, 4) or noise.shape[-3:] != stage.shape or not np.isfinite(noise).all():
            raise UserError(
                f"noise is {noise.shape}, or not finite; sample_fn; {stage.name} starts from {stage.shape}, such as "
                "sample_fn.invert finds"
            )
        return noise

    def _read(self, prompt: str | Sequence[str]) -> dict[str, np.ndarray]:
        """{condition: ids of prompts}, [L] of a single text or [n, L]."""
        if not self.tokenizers:
            raise UserError("this model reads no text; sample_fn(prompt=...); leave it out")
        one = isinstance(prompt, str)
        if not one and not len(prompt):
            raise UserError("there are no prompts; sample_fn(prompt=[]); give at least one")
        prompts = [prompt] if one else list(prompt)
        ids = {name: read(prompts) for name, read in self.tokenizers.items()}
        return {name: rows[0] for name, rows in ids.items()} if one else ids

    def _edit(self, image: Any, mask: Any, strength: float | None) -> dict[str, np.ndarray]:
        """The picture to be edited and what is known of it, as `stages.sample_fn` takes them."""
        shape = self.stages[-1].shape
        if image is None:
            raise UserError("there is no picture to edit; sample_fn(mask=..., strength=...); pass image=[h, w, C]")
        if self.stages[0].low_res:
            raise UserError(
                f"{self.stages[0].name} enlarges a picture, so nothing can be edited; sample_fn; use a model of the "
                "whole cascade"
            )
        if strength is not None and not 0 < strength <= 1:
            raise UserError(
                f"strength is {strength}; sample_fn; pass a number above 0, the picture, up to 1, noise alone"
            )
        image = images.as_floats(image)
        if image.ndim not in (3, 4) or image.shape[-3:] != shape:
            raise UserError(
                f"image is {image.shape}; sample_fn; this model edits pictures of {shape}: resize or crop it"
            )
        _in_range(image, "sample_fn")
        if mask is None:
            return {"picture": image}
        known = np.asarray(mask)
        if known.shape not in (image.shape[:-1], shape[:2]):
            raise UserError(f"mask is {known.shape}; sample_fn; it must be {image.shape[:-1]}, like the image")
        if not np.isin(known, (0, 1)).all():
            raise UserError("mask has values besides 0 and 1; sample_fn; pass 1 where the picture stays, 0 elsewhere")
        return {"picture": image, "known": known.astype(np.float32)[..., None]}

    def _count(self, n: int | None, cond: Mapping[str, Any], *numbers: Any) -> int:
        """How many pictures are asked for: n, or as many as there are conditions, scales or levels."""
        lengths = []
        for given in numbers:
            for value in given.values() if isinstance(given, Mapping) else [given]:
                try:
                    lengths += np.shape(value)[:1]
                except ValueError:  # a ragged list; told in full by _numbers
                    continue
        for name, value in cond.items():
            try:
                lengths += np.shape(value)[:1] if np.ndim(value) > CONDITIONS.get(name, 0) else []
            except ValueError:  # told in full by _conditions
                continue
        n = max(lengths, default=1) if n is None else n
        if n < 1:
            raise UserError(f"there is nothing to sample (n = {n}); sample_fn; ask for at least one picture")
        return n

    def _conditions(self, cond: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
        """The conditions as arrays [n, ...]."""
        for name in cond:
            if name not in self.takes:
                raise UserError(f"condition {name!r} is not taken; sample_fn; it takes {list(self.takes) or 'none'}")
        for name in self.takes:
            if name not in cond:
                wanted = {
                    "text": "prompt='...'",
                    "clip_text": "prompt='...'",
                    "low_res": "image=[h, w, C]",
                    "image_embedding": "image_embedding=sample_fn.embed(image)",
                }.get(name, f"{name}=[...]")
                raise UserError(f"condition {name!r} is missing; sample_fn; pass {wanted}")
        arrays, cond = {}, dict(cond)
        if "image_embedding" in cond and cond["image_embedding"] is None:
            arrays["image_embedding"] = self._no_embedding(n)
            del cond["image_embedding"]
        for name, value in cond.items():
            integers = name in ("label", "text", "clip_text")
            kind = np.int32 if integers else np.float32
            try:
                array = np.asarray(value)
                wrong = integers and array.size and not np.issubdtype(array.dtype, np.integer)
            except ValueError:
                wrong = True
            if name == "low_res" and (wrong or array.ndim not in (CONDITIONS[name], CONDITIONS[name] + 1)):
                shape = getattr(value, "shape", "ragged")
                raise UserError(f"condition {name} is {shape}; sample_fn; pass one picture [h, w, C], or [n, h, w, C]")
            if name == "image_embedding" and not wrong:
                size = next(s.clip.net.image.features for s in self.stages if s.clip)
                if array.ndim not in (1, 2) or array.shape[-1] != size or not np.isfinite(array).all():
                    raise UserError(
                        f"image_embedding is {array.shape}, or not finite; sample_fn; pass [{size}] or [n, {size}], "
                        "from sample_fn.embed(image)"
                    )
            if wrong:
                raise UserError(f"condition {name} is {value!r}; sample_fn; pass one or a list of integers")
            arrays[name] = _one_each(name, array.astype(kind), n, CONDITIONS.get(name, 0))
        if "low_res" in arrays:
            self._check_image(arrays["low_res"])
        for v in np.ravel(arrays.get("label", [])):
            if not 0 <= v < self.num_classes:
                raise UserError(f"label {v} is out of range; sample_fn; labels are 0 to {self.num_classes - 1}")
        return arrays

    def _no_embedding(self, n: int) -> np.ndarray:
        """[n, E] that say that there is none, for a decoder from which some were withheld in training."""
        stage = next(s for s in self.stages if "image_embedding" in s.takes)
        if "image_embedding" not in stage.null:
            raise UserError(f"none was ever withheld from {stage.name}; sample_fn(image_embedding=None); pass one")
        return np.full((n, stage.clip.net.image.features), stage.null["image_embedding"], np.float32)

    def _check_image(self, image: np.ndarray) -> None:
        """Raises UserError if the first stage cannot enlarge pictures [n, h, w, C]."""
        stage, factor, unit = self.stages[0], 1, 1
        for s in self.stages:
            factor, deepest = factor * s.low_res.factor, 2 ** (len(s.net.unet.channel_mult) - 1)
            unit = math.lcm(unit, deepest // math.gcd(deepest, factor))
        if image.shape[-1] != stage.shape[-1] or any(side % unit for side in image.shape[1:3]):
            raise UserError(
                f"image is {image.shape[1:]}; sample_fn; {stage.name} enlarges pictures of {stage.shape[-1]} channels "
                f"whose sides are multiples of {unit}"
            )
        _in_range(image, "sample_fn")

    def _scales(self, guidance: Any, n: int) -> dict[str, np.ndarray]:
        """{guided stage: [n] float32}."""
        own = {s.name: s.scale for s in self.stages if s.is_guided}
        there = f"a stage's guidance is {' or '.join(stages.SCALED)} in the config"
        return _numbers("guidance", guidance, own, n, none=f"this model has no guidance; sample_fn; {there}")

    def _levels(self, level: Any, n: int) -> dict[str, np.ndarray]:
        """{stage that enlarges: [n] float32}."""
        noised = {s.name: s.low_res for i, s in enumerate(self.stages) if stages.chooses_level(s, first=i == 0)}
        own = {name: c.level for name, c in noised.items()}
        levels = _numbers("level", level, own, n, none="no stage takes a noised picture; sample_fn(level=...)")
        for name, values in levels.items():
            outside = [v for v in values if not 0 <= v <= noised[name].noise + 1e-6]
            if outside:
                highest = noised[name].noise
                raise UserError(
                    f"level is {outside[0]:g}; sample_fn; {name} was trained with levels from 0 to {highest:g}"
                )
        return levels


def _numbers(what: str, given: Any, own: Mapping[str, float], n: int, *, none: str) -> dict[str, np.ndarray]:
    """{stage: [n] float32}: `own` where nothing else is given, as one number, one each, or {stage: either}."""
    if given is not None and not own:
        raise UserError(none)
    given = given if isinstance(given, Mapping) else {} if given is None else dict.fromkeys(own, given)
    numbers = {name: np.full(n, value, np.float32) for name, value in own.items()}
    for name, value in given.items():
        if name not in own:
            raise UserError(f"no stage {name!r} takes {what}; sample_fn({what}=...); {', '.join(own)} does")
        try:
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            array = np.float32(np.nan)
        if not np.isfinite(array).all():
            raise UserError(f"{what} is {value!r}; sample_fn; pass a number, or one for each picture")
        numbers[name] = _one_each(what, array, n, 0)
    return numbers


# Conditions that are arrays themselves, and their rank; the others are numbers.
CONDITIONS = {"low_res": 3, "text": 1, "clip_text": 1, "image_embedding": 1, "picture": 3, "known": 3, "noise": 3}


def _in_range(image: np.ndarray, where: str) -> np.ndarray:
    """The image, if its values are in [-1, 1]."""
    if not np.isfinite(image).all() or np.abs(image).max(initial=0) > 1 + 1e-3:
        raise UserError(f"image has values outside [-1, 1]; {where}; pass uint8, or floats in [-1, 1]")
    return image


def _one_each(name: str, array: np.ndarray, n: int, rank: int) -> np.ndarray:
    """One value for all pictures, or one each -> [n, ...]."""
    if array.ndim > rank and len(array) != n:
        raise UserError(f"{len(array)} values of {name} for {n} pictures; sample_fn; pass one each, or one for all")
    return array if array.ndim > rank else np.broadcast_to(array, (n, *array.shape))


@functools.lru_cache(maxsize=32)
def _compiled(
    built: tuple[stages.Stage, ...],
    steps: tuple[tuple[str, str], ...],
    sampler: tuple[tuple[str, str], ...],
    eta: float,
    keep: int,
    every_stage: bool,
    strength: float,
    mode: str,
):
    """The sampler over all devices, one for all parameters: (params, keys, numbers, cond) -> pictures.

    `steps` and `sampler` are pairs of a stage and its choice.
    """
    changes: dict[str, dict[str, Any]] = {stage.name: {} for stage in built}
    named = {stage.name: stage for stage in built}
    for name, choice in steps:
        stage = named[name]
        changes[name]["sampling"] = schedules.build_steps(stage.schedule, stage.train_steps, choice)
    for name, choice in sampler:
        changes[name]["sampler"] = samplers.SAMPLERS[choice](eta)
    built = tuple(dataclasses.replace(s, **changes[s.name]) if changes[s.name] else s for s in built)

    def run(params, keys, numbers, cond):
        numbers, first = dict(numbers), next((s for s in built if s.emits == "low_res"), None)
        noise = numbers.pop("noise", None)
        begun = built if noise is None else tuple(_starting_from(s, noise) if s is first else s for s in built)
        pure = stages.sample_fn(begun, keep=keep, every_stage=every_stage, strength=strength)
        out = pure(params, keys, **numbers, **cond)
        return (out[0], out[1].swapaxes(0, 1)) if keep else out

    return parallel.map_batch(run, mode=mode)


def _starting_from(stage: stages.Stage, start: jax.Array) -> stages.Stage:
    """The stage, sampled from `start` [B, H, W, C] in place of noise: its sampler replaces z before the first step."""
    own = stage.sampler

    def init(z, count):
        return jnp.bool_(True), own.init(start, count)

    def step(denoise, z, step, noise, memory, **cond):
        fresh, memory = memory
        z, p, memory = own.step(denoise, jnp.where(fresh, start, z), step, noise, memory, **cond)
        return z, p, (jnp.bool_(False), memory)

    return dataclasses.replace(stage, sampler=samplers.Sampler(init, step))


@functools.lru_cache(maxsize=32)
def _climbing(stage: stages.Stage, steps: str | None) -> stages.Stage:
    """The stage whose sample is the noise of the picture that it starts from, see `samplers.invert`.

    DDIM without noise is the same formula up and down, so its steps are walked from clean to noisy.
    """
    if stage.predicts == "previous_x":
        raise ValueError(f"{stage.name} predicts the step itself, which goes one way")
    chosen = stage.sampling if steps is None else schedules.build_steps(stage.schedule, stage.train_steps, steps)
    if len(chosen.t.logsnr) < 2:
        raise ValueError("inversion takes two steps or more")
    climb = chosen[::-1]
    table = climb[:-1].replace(s=climb[1:].t)
    return dataclasses.replace(stage, sampling=table, sampler=samplers.ddim(0.0), guidance=(), guide=None)


@functools.lru_cache(maxsize=8)
def _embedder(clip: stages.Clip):
    """(parameters, pictures) -> embeddings, over all devices."""
    return parallel.map_batch(functools.partial(stages.embed_image, clip))


@functools.lru_cache(maxsize=8)
def _text_embedder(clip: stages.Clip):
    """(parameters, ids) -> embeddings, over all devices."""
    return parallel.map_batch(lambda params, ids: stages.embed_text(clip, params, ids)["text_embedding"])


def enlarge(
    sample_fn: SampleFn, image: np.ndarray, *, seed: int = 0, tile: int = 0, batch_size: int = 16, **call: Any
) -> np.ndarray:
    """Enlarges one picture of any size, in overlapping tiles where it is large.

    A tile is sampled with noise of its own, and neighbours are blended over a quarter of a tile, so that no seam shows.
    The picture is extended by reflection to whole tiles.

    Args:
      sample_fn: its first stage enlarges.
      image: [h, w, C], uint8 or floats in [-1, 1].
      seed: of the noise.
      tile: side of a tile of `image`; by default the size that the stage is made for.
      batch_size: tiles at once.
      **call: for `sample_fn`, such as label=3 or steps=50.

    Returns:
      [h * factor, w * factor, C] float32, over the factors of all stages.

    Raises:
      UserError: the first stage enlarges nothing, or `call` does not fit.
    """
    stage, image = sample_fn.stages[0], images.as_floats(image)
    if stage.low_res is None:
        raise UserError(f"{stage.name} enlarges no picture; enlarge; start at a stage that takes 'low_res'")
    if image.ndim != 3:
        raise UserError(f"image is {image.shape}; enlarge; pass one picture [h, w, C]")
    tile = tile or min(stage.shape[:2]) // stage.low_res.factor
    corners, padded = images.tile_corners(image.shape[:2], tile, overlap=tile // 4)
    extended = images.pad_reflecting(image, padded)
    cut = np.stack([extended[y : y + tile, x : x + tile] for y, x in corners])
    made = sample_fn(seed, len(cut), image=cut, batch_size=min(batch_size, len(cut)), **call)
    factor = made.shape[1] // tile
    whole = images.blend_tiles(made, [(factor * y, factor * x) for y, x in corners], overlap=factor * (tile // 4))
    return whole[: factor * image.shape[0], : factor * image.shape[1]]


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The config of a workdir, from its config.json.

    Raises:
      UserError: there is none, or it is no JSON.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no trained model; {workdir} has no config.json; train first, or pass another workdir"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config ({error}); {path}; restore it or train again") from error


def load(
    source: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
) -> SampleFn:
    """Loads a trained model: `sample_fn = diffax.load('runs/quickstart')`.

    Args:
      source: the workdir that training wrote to; or a config, `configs/NAME.py[:variant]` or `NAME[:variant]`, whose
        weights are in `checkpoint`; or a published file, such as '64x64_diffusion.pt' (see `diffax.weights`).
      checkpoint: the workdir that holds the weights, or a published file or a list of them; by default `source`, or
        runs/NAME of a config.
      config: use this config in place of the workdir's (a plain dict of the same networks).
      step: a training step, by default the newest intact one.
      decay: which average of the parameters, by default the first configured one.
      raw: the parameters in training instead of an average.

    Returns:
      A `SampleFn`.

    Raises:
      UserError: there is no such workdir, config, checkpoint, step or average; or no stage that makes pictures.
    """
    files = next((f for f in (checkpoint, source) if f is not None and weights.is_weights(f)), None)
    if files is not None:
        config, params, steps = weights.load(files, source if files is checkpoint else None)
        if not (built := stages.build_stages(config)):
            raise UserError(f"no stage makes pictures in {files}: it holds a classifier; load the model that it guides")
        return SampleFn(tuple(built), params, config, steps)
    workdir = pathlib.Path(source)
    if config is None and (workdir / "config.json").exists():
        config = configs.to_dict(configs.from_dict(read_config(workdir)))  # fields that are newer than it get defaults
    elif config is None:
        config = _named_config(source)
        workdir = pathlib.Path("runs") / default_name(source)
        if checkpoint is None and not workdir.exists():
            raise UserError(
                f"there are no weights of {source} in {workdir}; diffax.load; pass checkpoint=WORKDIR, or train with "
                f"python -m diffax.main --config={source}"
            )
    workdir = pathlib.Path(checkpoint or workdir)
    config = with_statistics(config, workdir)
    built = stages.build_stages(config)
    if not built:
        raise UserError(f"no stage makes pictures in {workdir}: it holds a classifier; load the model that it guides")
    params, steps = {}, {}
    for name in dict.fromkeys(name for stage in built for name in stage.sections):
        params[name], steps[name] = load_params(config, name, workdir, step=step, decay=decay, raw=raw)
    return SampleFn(tuple(built), params, config, steps)


def with_statistics(config: Mapping[str, Any], workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The config with the statistics of a CLIP's embeddings that its workdir keeps, where it gives none itself.

    Those of published priors are a file, which `diffax.weights` puts into the workdir's config.
    """
    config = dict(config)
    for name in configs.trained_sections(config):
        section, folder = config[name], pathlib.Path(config[name]["workdir"] or workdir)
        if configs.is_clip(section) and (folder / "config.json").exists():
            kept = read_config(folder).get(name, {}).get("embedding", {})
            own = {key: section["embedding"][key] or kept.get(key, []) for key in ("mean", "std")}
            config[name] = {**section, "embedding": {**section["embedding"], **own}}
    return config


def _named_config(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The validated config of that name or path, as a plain dict."""
    try:
        config = configs.load(os.fspath(source))
    except UserError as error:
        if pathlib.Path(source).is_dir() or "there is no config" in str(error):
            raise UserError(
                f"there is no trained model; {source} is no config and has no config.json; train first, or pass "
                "another workdir"
            ) from None
        raise
    configs.validate(config)
    return configs.to_dict(config)


def default_name(config: str | os.PathLike[str]) -> str:
    """The folder below runs/ for a config given as on the command line: 'configs/a.py:tiny' -> 'a_tiny'."""
    return pathlib.Path(config).name.replace(".py", "").replace(":", "_")


def sample_together(
    sample_fn: SampleFn, key: int, n: int, each: Mapping[str, Any], **how: Any
) -> np.ndarray | dict[str, np.ndarray]:
    """`sample_fn(key, n, **each, **how)`, of which every process makes its share; all must call it, and get the whole.

    Args:
      sample_fn: the trained model.
      key: a seed.
      n: how many.
      each: arguments that have a value for every picture, such as label, prompt or the images to enlarge.
      **how: arguments that are the same for all; not `keep`.
    """

    def make(part: slice) -> Any:
        own = {name: values[part] for name, values in each.items()}
        return sample_fn(key, part.stop - part.start, first=part.start, **own, **how)

    return parallel.share(make, n)


def load_params(
    config: Mapping[str, Any],
    name: str,
    workdir: str | os.PathLike[str],
    *,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
    fitted: bool = True,
) -> tuple[Params, int]:
    """The trained parameters of one section, with what was fitted to its data if it has that, and their training step.

    They lie in the section's own `workdir` if it names one, else in `workdir`.

    Raises:
      UserError: there are none, or they belong to another network than the config's.
    """
    section = config[name]
    average = decay or next((str(d) for d in section["train"]["ema"]), None)
    folder = pathlib.Path(section["workdir"] or workdir) / name / "checkpoints"
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        saved = configs.complete_section(checkpoints.read_meta(step)["stage"])
        lines = checkpoint.config_difference(saved, section, ignore=NOT_IN_THE_NETWORK)
        if lines:
            raise UserError(f"{lines[0]}; {checkpoints.directory}; use the config it was trained with")
        found, params, _ = checkpoints.restore_ema(step=step, decay=average, raw=raw or average is None)
    if configs.has_fitted(section) and fitted:
        params = params | {"fitted": read_fitted(folder.parent)}
    return params, found


FITTED = "fitted.npz"  # beside a section's checkpoints: what is fitted to the data, and not trained


def read_fitted(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays that were fitted to the data of a section with this folder, by name.

    Raises:
      UserError: there are none, or they cannot be read.
    """
    path = folder / FITTED
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot read what was fitted to the data ({error}); {path}; restore it or train again"
        ) from None


def with_codec(
    model: stages.Stage, section: Mapping[str, Any], folder: pathlib.Path, batches: Iterator[Mapping[str, np.ndarray]]
) -> stages.Stage:
    """Tells an autoregressive prior how to write embeddings, before it is trained, and keeps that in its folder.

    It is fitted to `codes.examples` embeddings of the training data; a run that starts from another keeps its codec.

    Args:
      model: the stage.
      section: its section.
      folder: its folder in the workdir.
      batches: of what its objective reads, the same in every process.

    Raises:
      UserError: the embeddings are too few or have too few dimensions.
    """
    c = section["codes"]
    if section["train"]["start_from"]:
        codec = codes.Codec(**read_fitted(pathlib.Path(section["train"]["start_from"]) / model.name))
    else:
        image, text = embedded = [], []
        while sum(map(len, image)) < c["examples"]:
            batch = next(batches)
            for rows, name in zip(embedded, ("image_embedding", "text_embedding"), strict=True):
                rows.append(batch[name])
        image, text = (np.concatenate(rows)[: c["examples"]] for rows in embedded)
        try:
            codec = codes.fit_codec(image, (image * text).sum(1), components=c["components"], buckets=c["buckets"])
        except ValueError as error:
            raise UserError(f"{error}; {model.name}.codes; fit fewer components or buckets to more examples") from None
        lost = np.mean((np.asarray(codes.read(codes.write(image, codec), codec)) - image) ** 2) / image.var(0).mean()
        print(f"{model.name}: codes of {len(image):,} embeddings lose {lost:.2%} of their variance", file=sys.stderr)
    _write_fitted(folder, codec._asdict())
    return dataclasses.replace(model, codec=codec)


def _write_fitted(folder: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    if parallel.process_index() == 0:
        images.write_atomically(folder / FITTED, lambda file: np.savez(file, **arrays))


# How many are enough for a function of the noise level as smooth as that; whichever comes first of the last two.
RESIDUAL_LEVELS, RESIDUAL_EXAMPLES, RESIDUAL_BATCHES = 25, 2000, 16


def fit_residual(
    model: stages.Stage,
    config: Mapping[str, Any],
    workdir: pathlib.Path,
    batches: Callable[[], Iterator[Mapping[str, np.ndarray]]],
) -> None:
    """Measures what a trained prior leaves open of embeddings, by noise level, and keeps that in its folder.

    Nothing is done where that is there already for the newest checkpoint.

    Args:
      model: the stage, whose variance is analytic.
      config: the whole config.
      workdir: where it was trained.
      batches: () -> batches of what its objective reads, the same in every process.
    """
    folder = workdir / model.name
    params, step = load_params(config, model.name, workdir, fitted=False)
    if (folder / FITTED).exists() and int(read_fitted(folder)["step"]) == step:
        return
    levels = min(RESIDUAL_LEVELS, model.train_steps or RESIDUAL_LEVELS)
    u = np.arange(levels, 0, -1) / levels  # by rising log-SNR
    run, found = parallel.map_batch(stages.residual_fn(model, u)), []
    for number, batch in enumerate(itertools.islice(batches(), RESIDUAL_BATCHES)):
        given = {name: batch[name] for name in ("image_embedding", *model.takes)}
        keys = jax.random.split(jax.random.key(number), len(given["image_embedding"]))
        found.append(np.asarray(run(params, given, keys), np.float64))
        if sum(map(len, found)) >= RESIDUAL_EXAMPLES:
            break
    found = {"logsnr": model.schedule(u).logsnr, "residual": np.maximum(np.concatenate(found).mean(0), 0)}
    _write_fitted(folder, {name: a.astype(np.float32) for name, a in found.items()} | {"step": np.int64(step)})


# ---- pictures -------------------------------------------------------------------------------------------------------


def spread_labels(n: int, num_classes: int) -> np.ndarray:
    """0, 1, ..., num_classes - 1, 0, 1, ... : [n] int32."""
    return np.arange(n, dtype=np.int32) % num_classes


def sample_conditions(sample_fn: SampleFn, n: int, prompts: Sequence[str] = ()) -> dict[str, Any]:
    """Conditions for n pictures without a wish of their own, by their names in a call of `sample_fn`.

    Labels in turn. Prompts in turn, by default those of the config's `sample.prompts`, else captions of the data. Of a
    decoder alone, the embeddings and captions of held-out pictures.
    """
    cond: dict[str, Any] = {}
    labelled = [s for s in sample_fn.stages if "label" in s.reads]
    if labelled:
        cond["label"] = spread_labels(n, labelled[0].num_classes)
    config, first = sample_fn.config, sample_fn.stages[0].name
    if "image_embedding" in sample_fn.takes:
        found = _held_out(config, first, n, captions=bool(sample_fn.tokenizers))
        turn = np.arange(n) % len(found["image"])
        cond["image_embedding"] = sample_fn.embed(found["image"])[turn]
        prompts = prompts or list(found.get("caption", ()))
    if sample_fn.tokenizers:
        prompts = prompts or config["sample"]["prompts"] or list(_held_out(config, first, n)["caption"])
        cond["prompt"] = [prompts[i % len(prompts)] for i in range(n)]
    return cond


def _held_out(config: Mapping[str, Any], name: str, limit: int, *, captions: bool = True) -> dict[str, np.ndarray]:
    """At most `limit` held-out examples of a section's data, as training reads them; with `captions` also these."""
    c, shape = config[name]["data"], configs.picture_shape(config, name)
    tokenize = (lambda texts: np.zeros((len(texts), 1))) if captions else None
    return data.examples(data.held_out(c, shape=shape), c, shape=shape, limit=limit, tokenize=tokenize)


def text_tokenizer(section: Mapping[str, Any]) -> tokenizer.Tokenizer | None:
    """The tokenizer of a section that takes 'text'; None for the others.

    Raises:
      UserError: its vocabulary cannot be had.
    """
    c = section["text"]
    return tokenizer.build(c["tokenizer"], vocab=c["vocab"], length=c["length"]) if "text" in section["takes"] else None


def with_frozen_clip(
    model: stages.Stage, config: Mapping[str, Any], workdir: str | os.PathLike[str]
) -> tuple[stages.Stage, Callable[[Mapping[str, Any]], dict[str, np.ndarray]]]:
    """Prepares the training of a stage that takes or makes embeddings by its CLIP, which was trained before.

    Args:
      model: the stage.
      config: the whole config.
      workdir: where the CLIP was trained, unless its section names another.

    Returns:
      The stage, told what stands for a withheld caption; and a function from a batch of 'image' (of `picture_shape`)
      and, for a stage that reads captions by its CLIP, 'caption', to the batch that its objective reads.

    Raises:
      UserError: there is no trained CLIP.
    """
    name = model.clip.name
    params, _ = load_params(config, name, workdir)
    read, run = text_tokenizer(config[name]), parallel.map_batch(stages.embed_batch(model))

    def prepare(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        given = {name: batch[name] for name in ("image", "image_embedding") if name in batch}
        if "clip_text" in model.reads:
            given["clip_text"] = read(list(batch["caption"]))
        rest = {k: v for k, v in batch.items() if k not in ("image", "image_embedding", "caption")}
        return rest | jax.tree.map(np.asarray, run(params, given))

    return stages.withholding_captions(model, params), prepare


def zero_shot_accuracy(
    model: stages.Clip,
    params: Params,
    section: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    template: str,
    batch_size: int,
) -> float:
    """The share of pictures to which the caption of their class is the nearest of all classes' (Radford et al. 2021).

    Args:
      model: a CLIP of clean pictures.
      params: its parameters.
      section: its section.
      batch: 'image' [N, H, W, C] and 'label' [N].
      names: of the classes.
      template: the caption of a class; {} stands for its name.
      batch_size: pictures at once.
    """
    texts = text_tokenizer(section)([template.format(name.replace("_", " ")) for name in names])
    classes = np.asarray(jax.jit(functools.partial(stages.embed_text, model))(params, texts)["text_embedding"])
    classes = classes / np.linalg.norm(classes, axis=1, keepdims=True)
    run, image = _embedder(model), batch["image"]
    parts = [np.asarray(run(params, image[i : i + batch_size])) for i in range(0, len(image), batch_size)]
    return float(np.mean(np.argmax(np.concatenate(parts) @ classes.T, axis=1) == batch["label"]))


def image_embedder(
    config: Mapping[str, Any], name: str, workdir: str | os.PathLike[str]
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """(pictures -> embeddings, what tells the network from others) of a section's CLIP, which was trained before.

    Raises:
      UserError: there is no trained CLIP.
    """
    clip = stages.build_clip(config, config[name]["clip"])
    params, step = load_params(config, clip.name, workdir)
    run = _embedder(clip)
    about = f"step {step}, logit scale {float(params['logit_scale']):.9g}, embeddings [{clip.net.image.features}]"
    return lambda image: np.asarray(run(params, image)), f"{about} of length {clip.norm:g}"


def starting_params(section: Mapping[str, Any], name: str) -> Params:
    """The parameters that a new run of a section starts from: those of its namesake in `train.start_from`, averaged.

    A network that inpaints and starts from one that does not gets channels for the known pixels, which are zero at
    first, so that it starts as the same function (GLIDE, section 2.3).

    Raises:
      UserError: there are none, or they are of a network that differs in more.
    """
    workdir = pathlib.Path(section["train"]["start_from"])
    with checkpoint.Checkpoints(workdir / name / "checkpoints", read_only=True) as checkpoints:
        saved = configs.complete_section(checkpoints.read_meta()["stage"])
        lines = checkpoint.config_difference(saved, section, ignore=(*NOT_IN_THE_NETWORK, "takes", "drop"))
        if lines:
            raise UserError(f"{lines[0]}; {checkpoints.directory}; start from a model of the same network")
        average = next((str(d) for d in saved["train"]["ema"]), None)
        _, params, _ = checkpoints.restore_ema(decay=average, raw=average is None)
    missing = [c for c in section["takes"] if c not in saved["takes"]]
    if missing not in ([], ["inpaint"]) or len(section["takes"]) != len(saved["takes"]) + len(missing):
        raise UserError(
            f"{name} takes {section['takes']}, but what it starts from {saved['takes']}; "
            f"config.{name}.train.start_from; they may differ by 'inpaint' alone"
        )
    channels = section["shape"][-1]
    return networks.widen_input(params, at=channels, by=channels + 1) if missing else params


def smaller(image: np.ndarray, factor: int) -> np.ndarray:
    """[N, H, W, C] -> [N, H / factor, W / factor, C], what a stage is trained to enlarge."""
    return np.asarray(augment.area_downsample(np.asarray(image), factor))


def draw_enlargements(path: str | os.PathLike[str], small: np.ndarray, made: np.ndarray, real=None) -> None:
    """Writes a column for each picture: the small one, enlarged bicubically, by the model, and the real one if given.

    Args:
      path: the PNG.
      small: [N, h, w, C] in [-1, 1]; made: [N, h * f, w * f, C]; real: like made, or None.
    """
    factor = made.shape[1] // small.shape[1]
    rows = [small.repeat(factor, 1).repeat(factor, 2), images.bicubic(small, factor), made]
    rows += [] if real is None else [real]
    names = ["input", "bicubic", "diffax", "real"]
    labels = [name if i == 0 else None for name in names[: len(rows)] for i in range(len(small))]
    draw_grid(path, np.concatenate(rows), columns=len(small), labels=labels)


def draw_grid(
    path: str | os.PathLike[str], pictures: np.ndarray, *, columns: int, labels: Sequence[str] | None = None
) -> None:
    """Writes pictures [n, H, W, C] in [-1, 1] as one PNG.

    Raises:
      RunError: a picture is not finite; nothing is written.
    """
    images.check_finite(pictures)
    images.save_png(path, images.grid(images.to_uint8(pictures), columns, labels))
