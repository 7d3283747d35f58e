"""Guidance as components: how sampling steers a model, beyond the functions of `diffax.diffusion.guidance`.

A guidance wraps the denoiser of a model. It may have a scale, which a call can choose, conditions of its own, such as
the label of a classifier, and sections whose parameters it needs. To write one, make a `Guidance`:

    def sharper(*, amount: Annotated[float, In(0)] = 0.1) -> Guidance:
        return Guidance(wrap=lambda site: guidance.edit_x(lambda x: jnp.clip((1 + amount) * x, -1, 1)))
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffax.components import In, Section, component
from diffax.conditions.base import Condition
from diffax.diffusion import guidance
from diffax.diffusion.schedules import NoiseLevel

Array = jax.Array
Params = Any


class Site(NamedTuple):
    """Where a guidance is applied.

    Attributes:
      params: {section: parameters}.
      scale: of the guidance, scalar or [B].
      nulls: {condition: its null value, encoded or not}, of those that training dropped.
    """

    params: Mapping[str, Params]
    scale: Array | None
    nulls: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Guidance:
    """One guidance of a model.

    Attributes:
      wrap: site -> (denoiser -> denoiser).
      scale: where a call gives none; None: it has no scale.
      conditions: that it reads besides the model's, {name: condition}.
      sections: whose parameters it needs.
      check: (model) -> None raises ValueError if it does not fit the model.
    """

    wrap: Callable[[Site], guidance.Guidance]
    scale: float | None = None
    conditions: Mapping[str, Condition] = dataclasses.field(default_factory=dict)
    sections: tuple[str, ...] = ()
    check: Callable[[Any], None] = lambda model: None


Scale = Annotated[float, In(-(10**4), 10**4)]


@component("guidance", "clip_denoised")
def clip_denoised(*, clip_range: Annotated[float, In(0, 10**4, above=True)] = 1.0) -> Guidance:
    """Clips the estimate of x (DDPM's code).

    Args:
      clip_range: it is clipped to [-clip_range, clip_range].
    """
    return Guidance(wrap=lambda site: guidance.clip_denoised(clip_range))


@component("guidance", "dynamic_threshold")
def dynamic_threshold(*, percentile: Annotated[float, In(0, 100, above=True)] = 99.5) -> Guidance:
    """Clips the estimate of x to a percentile of its values (Imagen, section 2.3).

    Args:
      percentile: of |x|, at least 1.
    """
    return Guidance(wrap=lambda site: guidance.dynamic_threshold(percentile))


@component("guidance", "insert_known")
def insert_known() -> Guidance:
    """Puts the known pixels into the estimate of x at every step (GLIDE's released code for inpainting)."""

    def check(model: Any) -> None:
        if "inpaint" not in model.conditions:
            raise ValueError("guidance insert_known needs the condition 'inpaint'; add it, or leave the guidance out")

    return Guidance(wrap=lambda site: guidance.insert_known(), check=check)


@component("guidance", "classifier_free")
def classifier_free(*, scale: Scale = 1.0) -> Guidance:
    """Classifier-free guidance (Ho & Salimans 2021).

    Args:
      scale: 1 is the conditional model, 0 the unconditional one; w of the paper is scale - 1.
    """

    def check(model: Any) -> None:
        if not model.condition_dropout and not any(c.dropout for c in model.conditions.values()):
            raise ValueError(
                "guidance classifier_free needs a network that was trained with dropped conditions; set "
                "condition_dropout to 0.1"
            )

    return Guidance(wrap=lambda site: guidance.classifier_free(site.scale, site.nulls), scale=scale, check=check)


def _check_same(model: Any, other: Any, *fields: str) -> None:
    """Raises ValueError if two models differ in fields, or in their noise schedules."""
    u = np.arange(1, 9) / 8
    mine, its = (jax.tree.leaves(m.schedule(u)) for m in (model, other))
    if model.schedule.num_timesteps != other.schedule.num_timesteps or not np.allclose(mine, its, equal_nan=True):
        raise ValueError(f"schedule must equal that of {other.name}, which guides it")
    for field in fields:
        if getattr(model, field) != getattr(other, field):
            raise ValueError(
                f"{field} must equal that of {other.name}, which guides it; got {getattr(model, field)} and "
                f"{getattr(other, field)}"
            )


@component("guidance", "classifier")
def classifier(
    *,
    scale: Scale = 1.0,
    section: Annotated[Any, Section(needs="log_prob", what="a classifier")] = "classifier",
) -> Guidance:
    """Classifier guidance (ADM, section 4).

    Args:
      scale: of the gradient of log p(y | z).
      section: of the noised classifier.
    """

    def wrap(site: Site) -> guidance.Guidance:
        def log_prob(z: Array, t: NoiseLevel, *, label: Array, **_: Any) -> Array:
            return section.log_prob(site.params[section.name], z, t, label)

        return guidance.classifier(log_prob, site.scale)

    def check(model: Any) -> None:
        _check_same(model, section, "shape")
        mine, its = (getattr(m.conditions.get("label"), "num_classes", None) for m in (model, section))
        if mine not in (None, its):
            raise ValueError(f"conditions.label.num_classes must equal that of {section.name}, {its}, got {mine}")

    return Guidance(
        wrap=wrap,
        scale=scale,
        conditions={"label": section.conditions["label"]},
        sections=(section.name,),
        check=check,
    )


@component("guidance", "clip")
def clip(
    *,
    scale: Scale = 1.0,
    section: Annotated[Any, Section(needs="embed_text", what="a CLIP")] = "clip",
) -> Guidance:
    """CLIP guidance: the gradient of the similarity of picture and caption (GLIDE, section 2.4).

    Args:
      scale: of that gradient.
      section: of the noised CLIP.
    """

    def wrap(site: Site) -> guidance.Guidance:
        own = site.params[section.name]

        def similarity(z: Array, t: NoiseLevel, *, clip_text: Array, **_: Any) -> Array:
            image = section.encode_image(own, z, t)
            return guidance.clip_similarity(image, clip_text, section.logit_scale(own))

        return guidance.clip_guided(similarity, site.scale)

    def check(model: Any) -> None:
        if not section.noised:
            raise ValueError(f"{section.name}.noised must be true for a CLIP that guides {model.name}")
        _check_same(model, section, "shape")

    return Guidance(
        wrap=wrap, scale=scale, conditions={"clip_text": section.caption}, sections=(section.name,), check=check
    )


@component("guidance", "finish_with")
def finish_with(*, section: Annotated[Any, Section(needs="denoiser", what="a diffusion model")] = "last") -> Guidance:
    """Another network takes the last step, to clean data, as in karlo's upsampler. To be named first.

    Args:
      section: of the model of that network.
    """

    def wrap(site: Site) -> guidance.Guidance:
        return guidance.finish_with(section.denoiser(site.params))

    def check(model: Any) -> None:
        _check_same(model, section, "shape", "predicts", "variance")
        if {*model.conditions} != {"low_res"}:
            raise ValueError(
                f"finish_with is for a model with the condition 'low_res' alone, got {[*model.conditions]}"
            )

    return Guidance(wrap=wrap, sections=(section.name,), check=check)


def guided(denoise: guidance.Denoiser, parts: Mapping[str, Guidance], site: Site) -> guidance.Denoiser:
    """A denoiser under all guidance, the first one innermost; those with a scale are left out without one."""
    chosen = [part for part in parts.values() if part.scale is None or site.scale is not None]
    return guidance.guided(denoise, [part.wrap(site) for part in chosen])


def scale_of(parts: Mapping[str, Guidance]) -> float | None:
    """The scale of the one guidance that has one; None if none has.

    Raises:
      ValueError: two have one.
    """
    scaled = [name for name, part in parts.items() if part.scale is not None]
    if len(scaled) > 1:
        raise ValueError(f"guidance has {' and '.join(scaled)}, which share one scale; choose one")
    return parts[scaled[0]].scale if scaled else None


def as_scale(scale: Any, own: float | None) -> Array | None:
    """The scale of a call, or the model's own, as an array."""
    chosen = own if scale is None else scale
    return None if chosen is None else jnp.asarray(chosen, jnp.float32)
