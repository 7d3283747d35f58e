"""Small systems of each lineage, built once: {name: System}."""

import functools

from diffax.config import spec
from diffax.models.system import System
from tests.models import micro

CFG = dict(classifier_free=dict(scale=2.0))


@functools.cache
def classes() -> System:
    """Pictures of a class, with classifier-free guidance."""
    label = micro.conditions(label=dict(num_classes=micro.CLASSES))
    guidance = micro.guidance(**CFG, clip_denoised={})
    return micro.system(base=micro.section(conditions=label, condition_dropout=0.1, guidance=guidance))


@functools.cache
def guided() -> System:
    """Pictures of a class, by a noised classifier."""
    net = spec("network", "classifier", channels=8, channel_mult=(1,), num_res_blocks=1, attention=(1,), groups=4,
               head_channels=4)  # fmt: skip
    classifier = micro.section("classifier", num_classes=micro.CLASSES, net=net)
    guidance = micro.guidance("clip_denoised", classifier=dict(section="classifier", scale=3.0))
    made = micro.config(base=micro.section(guidance=guidance), classifier=classifier)
    return micro.system(("base",), **{name: made[name] for name in ("base", "classifier")})


@functools.cache
def cascade(truncated: bool = False) -> System:
    """8 to 16 pixels, with noise on the smaller picture."""
    label = dict(num_classes=micro.CLASSES)
    low_res = dict(factor=2, noise=1.0, level=0.5, truncated=truncated)
    return micro.system(
        base=micro.section(conditions=micro.conditions(label=label)),
        up=micro.section(shape=(16, 16, 3), conditions=micro.conditions(label=label, low_res=low_res)),
    )


@functools.cache
def glide() -> System:
    """Captions to pictures of 8 and 16 pixels, and inpainting by the first."""
    guidance = micro.guidance("insert_known", **CFG, clip_denoised={})
    base = micro.conditions(text=micro.text(), inpaint=dict(empty=0.5))
    return micro.system(
        base=micro.section(conditions=base, condition_dropout=0.2, guidance=guidance),
        up=micro.section(shape=(16, 16, 3), conditions=micro.conditions(text=micro.text(), low_res=dict(factor=2))),
    )


@functools.cache
def clip_guided() -> System:
    """Captions to pictures, by a noised CLIP."""
    guidance = micro.guidance("clip_denoised", clip=dict(section="clip", scale=3.0))
    return micro.system(
        ("base",),
        base=micro.section(conditions=micro.conditions(text=micro.text()), guidance=guidance),
        clip=micro.clip(noised=True),
    )


def _transformer(name: str):
    return spec("network", name, width=8, layers=1, heads=2)


@functools.cache
def dalle2(prior: str = "diffusion") -> System:
    """CLIP, a prior ('diffusion' or 'code_prior'), a decoder and an upsampler."""
    tokens = dict(tokenizer=spec("tokenizer", "demo", length=micro.LENGTH))
    how = dict(shape=(micro.EMBEDDING,), clip="clip", condition_dropout=0.1)
    if prior == "diffusion":
        first = micro.section(
            **how,
            net=_transformer("prior"),
            conditions=micro.conditions(tokens=tokens, text_embedding=dict(enters="token")),
            predicts="x",
            variance="analytic",
            guidance=micro.guidance(**CFG),
            candidates=2,
        )
    else:
        first = micro.configs.section(
            prior,
            **how,
            net=_transformer("code_prior"),
            conditions=micro.conditions(text=micro.text(), text_embedding=dict(enters="token", width=8)),
            guidance=micro.guidance(**CFG),
        )
        first.codes.update(components=3, buckets=5, examples=16)
        first.train.update(batch_size=8)
    decoder = micro.section(
        conditions=micro.conditions(text=micro.text(dropout=0.5), image_embedding=dict(tokens=2, width=8)),
        condition_dropout=0.1,
        guidance=micro.guidance(**CFG, clip_denoised={}),
    )
    made = dict(clip=micro.clip(), prior=first, decoder=decoder)
    made["clip"].embedding.norm = 3.0
    made["up"] = micro.section(shape=(16, 16, 3), conditions=micro.conditions(low_res=dict(factor=2)))
    return micro.system(**made)


@functools.cache
def karlo() -> System:
    """CLIP, prior and decoder that read its text encoder, an upsampler whose last step is another network's."""
    features = dict(width=8)
    prior = micro.section(
        shape=(micro.EMBEDDING,),
        clip="clip",
        net=_transformer("prior"),
        conditions=micro.conditions(text_features=features, text_embedding=dict(enters="token")),
        predicts="x",
        condition_dropout=0.1,
        guidance=micro.guidance(**CFG, clip_denoised=dict(clip_range=10.0)),
    )
    decoder = micro.section(
        conditions=micro.conditions(
            text_features=dict(width=8, norm=True), text_embedding={}, image_embedding=dict(tokens=2, width=8)
        ),
        condition_dropout=0.1,
        guidance=micro.guidance(**CFG, clip_denoised={}),
    )
    up = dict(shape=(16, 16, 3), conditions=micro.conditions(low_res=dict(factor=2)))
    last = micro.guidance(last_step=dict(name="finish_with", section="up_last"))
    last.update(micro.guidance("clip_denoised"))
    return micro.system(
        ("clip", "prior", "decoder", "up"),
        clip=micro.clip(),
        prior=prior,
        decoder=decoder,
        up=micro.section(**up, guidance=last),
        up_last=micro.section(**up),
    )


EVERY = {
    "classes": classes,
    "classifier-guided": guided,
    "cascade": cascade,
    "GLIDE": glide,
    "CLIP-guided": clip_guided,
    "DALL-E 2": dalle2,
    "DALL-E 2, autoregressive": functools.partial(dalle2, "code_prior"),
    "karlo": karlo,
}
