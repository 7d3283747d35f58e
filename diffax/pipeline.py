"""From a trained workdir to pictures, in one call (floor 4)."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffax import (
    checkpoint,
    conditioning,
    convert,
    data,
    images,
    models,
    parallel,
    reporting,
    samplers,
    schedules,
    stages,
    tokenizer,
)
from diffax import config as configs
from diffax.errors import UserError

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
    "low_res.crop",
    "inpaint",
    "text.vocab",
    "net.dropout",
    "net.dtype",
    "net.remat",
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
        level: float | Sequence[float] | Mapping[str, Any] | None = None,
        steps: str | int | None = None,
        sampler: str | None = None,
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
          key: a seed or a typed PRNG key.
          n: how many; by default as many as there are conditions, else 1.
          first: the number i of the first one: with n, pictures that an earlier call did not come to.
          prompt: what the pictures show, if a stage reads text: one text for all, or one each; a long one is cut.
          guidance: scale of the classifier's or of classifier-free guidance, one for all pictures or one each; see
            `diffax.guidance` for what 0 and 1 mean. {stage: scale} where stages differ. By default the config's.
          image: [h, w, C] or [n, h, w, C], uint8 or floats in [-1, 1]. Without `mask` and `strength` it is what the
            first stage enlarges, if that takes 'low_res', of any size that its network can halve often enough once
            enlarged. With either it is edited, and has the size of the last stage's pictures.
          mask: [h, w] or [n, h, w], true or 1 where `image` is known and stays as it is, bit by bit; the rest is filled
            in: by a model that was trained to (it takes 'inpaint'), else by replacement at every step.
          strength: how far from `image` the result may go, in (0, 1]: the share of the steps that are walked from
            `image` made noisy. 1, or none: from noise alone.
          level: noise on the smaller picture that a stage enlarges, as u in [0, 1], up to what it was trained with;
            given like guidance. By default the config's.
          steps: another choice of steps than the config's, such as 50, 'ddim25' or 'logsnr10'.
          sampler: another sampler than the config's, a key of `samplers.SAMPLERS`.
          eta: of DDIM, if it is named here.
          keep: also return this many estimates of each picture on the way (DDPM's progressive generation).
          every_stage: return {stage: pictures} of all stages.
          batch_size: pictures made at once.
          **cond: a value for every picture, or one for all: label, an integer or a list of them; image_embedding, from
            `embed`, of a decoder without a prior before it.

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
        if prompt is not None:
            cond |= self._read(prompt)
        n = self._count(n, {**cond, **edit}, guidance, level)
        cond = self._conditions(cond, n)
        numbers = {"guidance": self._scales(guidance, n), "level": self._levels(level, n)}
        numbers |= {name: _one_each(name, array, n, 3) for name, array in edit.items()}
        if sampler is not None and sampler not in samplers.SAMPLERS:
            near = configs.closest(str(sampler), samplers.SAMPLERS)
            raise UserError(f"unknown sampler {sampler!r}{near}; sample_fn; use one of {', '.join(samplers.SAMPLERS)}")
        if batch_size < 1 or keep < 0 or (keep and every_stage):
            raise UserError(f"batch_size is {batch_size} and keep {keep}; sample_fn; use at least 1 and 0")
        if keep and self.stages[-1].emits != "low_res":
            raise UserError(f"keep is {keep}, but {self.stages[-1].name} makes no pictures; sample_fn; leave it out")
        try:
            run = _compiled(
                self.stages,
                None if steps is None else str(steps),
                sampler,
                float(eta),
                keep,
                every_stage,
                float(strength or 1),
            )
        except ValueError as error:
            raise UserError(f"{error}; sample_fn(steps={steps!r})") from error
        key = jax.random.key(key) if isinstance(key, int | np.integer) else key
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.arange(first, first + n))
        size = min(batch_size, 2 ** math.ceil(math.log2(n)))
        done = []
        for start in reporting.progress_bar(range(0, n, size), "sampling"):
            # The last batch is filled up: one program serves all.
            index = np.minimum(np.arange(start, start + size), n - 1)
            out = run(self.params, keys[index], *jax.tree.map(lambda v, i=index: v[i], (numbers, cond)))
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
        clip = next((s.clip for s in self.stages if s.clip), None)
        if clip is None:
            raise UserError("no stage takes embeddings; sample_fn.embed; load a model with a CLIP")
        image = images.as_floats(image)
        if image.ndim not in (3, 4) or image.shape[-1] != clip.shape[-1] or not image.size:
            raise UserError(
                f"image is {image.shape}; sample_fn.embed; pass one picture [h, w, {clip.shape[-1]}] or several"
            )
        run, params = _embedder(clip), self.params[clip.name]
        rows = image[None] if image.ndim == 3 else image
        parts = [np.asarray(run(params, rows[i : i + batch_size])) for i in range(0, len(rows), batch_size)]
        return np.concatenate(parts)[0] if image.ndim == 3 else np.concatenate(parts)

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
        if not np.isfinite(image).all() or np.abs(image).max() > 1 + 1e-3:
            raise UserError("image has values outside [-1, 1]; sample_fn; pass uint8, or floats in [-1, 1]")
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
        arrays = {}
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
        if not np.isfinite(image).all() or np.abs(image).max() > 1 + 1e-3:
            raise UserError("image has values outside [-1, 1]; sample_fn; pass uint8, or floats in [-1, 1]")

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
CONDITIONS = {"low_res": 3, "text": 1, "clip_text": 1, "image_embedding": 1, "picture": 3, "known": 3}


def _one_each(name: str, array: np.ndarray, n: int, rank: int) -> np.ndarray:
    """One value for all pictures, or one each -> [n, ...]."""
    if array.ndim > rank and len(array) != n:
        raise UserError(f"{len(array)} values of {name} for {n} pictures; sample_fn; pass one each, or one for all")
    return array if array.ndim > rank else np.broadcast_to(array, (n, *array.shape))


@functools.lru_cache(maxsize=32)
def _compiled(
    built: tuple[stages.Stage, ...],
    steps: str | None,
    sampler: str | None,
    eta: float,
    keep: int,
    every_stage: bool,
    strength: float,
):
    """The sampler over all devices, one for all parameters: (params, keys, numbers, cond) -> pictures."""
    if steps is not None:
        built = tuple(
            dataclasses.replace(s, sampling=schedules.build_steps(s.schedule, s.train_steps, steps)) for s in built
        )
    if sampler is not None:
        built = tuple(dataclasses.replace(s, sampler=samplers.SAMPLERS[sampler](eta)) for s in built)
    pure = stages.sample_fn(built, keep=keep, every_stage=every_stage, strength=strength)

    def run(params, keys, numbers, cond):
        out = pure(params, keys, **numbers, **cond)
        return (out[0], out[1].swapaxes(0, 1)) if keep else out

    return parallel.map_batch(run)


@functools.lru_cache(maxsize=8)
def _embedder(clip: stages.Clip):
    """(parameters, pictures) -> embeddings, over all devices."""
    return parallel.map_batch(functools.partial(stages.embed_image, clip))


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
        weights are in `checkpoint`; or a published file, such as '64x64_diffusion.pt' (see `diffax.convert`).
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
    files = next((f for f in (checkpoint, source) if f is not None and convert.is_weights(f)), None)
    if files is not None:
        config, params, steps = convert.load(files, source if files is checkpoint else None)
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
    built = stages.build_stages(config)
    if not built:
        raise UserError(f"no stage makes pictures in {workdir}: it holds a classifier; load the model that it guides")
    params, steps = {}, {}
    for name in dict.fromkeys(name for stage in built for name in stage.sections):
        params[name], steps[name] = load_params(config, name, workdir, step=step, decay=decay, raw=raw)
    return SampleFn(tuple(built), params, config, steps)


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


def load_params(
    config: Mapping[str, Any],
    name: str,
    workdir: str | os.PathLike[str],
    *,
    step: int | None = None,
    decay: str | None = None,
    raw: bool = False,
) -> tuple[Params, int]:
    """The trained parameters of one section, and their training step.

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
    return params, found


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
        given = {"image": batch["image"]}
        if "clip_text" in model.reads:
            given["clip_text"] = read(list(batch["caption"]))
        rest = {k: v for k, v in batch.items() if k not in ("image", "caption")}
        return rest | jax.tree.map(np.asarray, run(params, given))

    return stages.withholding_captions(model, params), prepare


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
    return models.widen_input(params, at=channels, by=channels + 1) if missing else params


def smaller(image: np.ndarray, factor: int) -> np.ndarray:
    """[N, H, W, C] -> [N, H / factor, W / factor, C], what a stage is trained to enlarge."""
    return np.asarray(conditioning.area_downsample(np.asarray(image), factor))


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
