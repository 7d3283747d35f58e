"""Runners of the golden cases about CLIP: GLIDE's noised one and transformers' (kinds by name)."""

import jax
import jax.numpy as jnp
import numpy as np

from diffax import weights
from diffax.diffusion import guidance, process, schedules
from diffax.weights import clip as converter
from tests.parity import golden
from tests.parity.models import nchw, nhwc, supported


def network_of(architecture, **image):
    """The network of an architecture, with some options of its image encoder changed."""
    architecture.net.image.update(image)
    try:
        return architecture.build()
    except ValueError as error:
        raise NotImplementedError(str(error)) from error


def glide_network(image=None, text=None):
    """A noised CLIP; the encoder that a case leaves out is any."""
    features = (image or text)["n_embd"]
    image = image or dict(image_size=4, patch_size=4, n_head=1, n_xf_blocks=1, n_head_state=4, n_timestep=0)
    text = text or dict(n_bpe_vocab=2, max_text_len=2, n_head=1, n_xf_blocks=1, n_head_state=4)
    towers = {"image": image, "text": text}
    keys = ("n_head", "n_head_state", "n_xf_blocks")
    config = {f"{key}_{name}": tower.get(key, 64) for name, tower in towers.items() for key in keys}
    config |= dict(
        image_size=image["image_size"], patch_size=image["patch_size"], n_timesteps=image.get("n_timestep", 0)
    )
    config |= dict(n_vocab=text["n_bpe_vocab"], max_text_len=text["max_text_len"], n_embd=features)
    return network_of(converter.glide_config(config))


def captions(inputs):
    tokens = inputs["tokens"]
    return jnp.asarray(np.where(np.arange(tokens.shape[1]) < inputs["lens"][:, None], tokens, -1), jnp.int32)


def glide_image(meta, inputs, params):
    encoder = glide_network(image=meta["config"]).image
    params = weights.to_flax(params, converter.table(encoder, "glide"))
    time = jnp.asarray(inputs["t"], jnp.float32) if "t" in inputs else None
    z = jax.jit(encoder.apply)({"params": params}, nhwc(inputs["x"]), time)
    return {"z": z, "z_normalized": guidance.unit(z)}


def glide_text(meta, inputs, params):
    encoder = glide_network(text=meta["config"]).text
    params = weights.to_flax(params, converter.table(encoder, "glide"))
    z, _ = jax.jit(encoder.apply)({"params": params}, captions(inputs))
    return {"z": z, "z_normalized": guidance.unit(z)}


def glide_cond_fn(meta, inputs, params):
    c = meta["config"]
    network = glide_network(image=c["image_encoder"], text=c["text_encoder"])
    files = [
        {key: golden.weight(key, shape, c["norm_suffixes"]) for key, shape in meta[f"{name}_state_dict"].items()}
        for name in ("image", "text")
    ]
    params = converter.from_glide(*files, network, logit_scale=c["logit_scale"])

    @jax.jit
    def run(params, z, time, text, scale):
        text, _ = network.apply({"params": params}, text, method="encode_text")

        def image(z, t):
            return network.apply({"params": params}, z, t.time, method="encode_image")

        def similarity(z, t):
            return guidance.clip_similarity(image(z, t), text, params["logit_scale"])

        def denoise(z, step):
            return process.predict(jnp.zeros_like(z), z, step, predicts="eps", variance="fixed_small")

        t = schedules.NoiseLevel(time=time, logsnr=jnp.zeros_like(time))
        step = schedules.Transition(t, t, jnp.zeros_like(time), jnp.zeros_like(time))
        score = guidance.clip_guided(similarity, scale)(denoise)(z, step).score
        return score, guidance.unit(text), guidance.unit(image(z, t))

    time = jnp.asarray(inputs["t"], jnp.float32)
    score, z_t, z_i = run(params, nhwc(inputs["x"]), time, captions(inputs), c["grad_scale"])
    return {"grad": nchw(score), "z_t": z_t, "z_i": z_i}


def transformers_clip(meta, inputs, params):
    # the case's pixels are normalised already
    architecture = supported(converter.transformers_config, meta["config"])
    network = network_of(architecture, mean=(0.5,) * 3, std=(0.5,) * 3)
    params = weights.to_flax(params, converter.table(network, "transformers"))
    ids = jnp.asarray(np.where(inputs["attention_mask"], inputs["input_ids"], -1))

    @jax.jit
    def run(params, pixels, ids):
        last = f"block_{network.image.layers - 1}"
        (image, text, logit_scale), inside = network.apply(
            {"params": params}, pixels, ids, capture_intermediates=lambda module, _: module.name == last
        )
        _, sequence = network.apply({"params": params}, ids, method="encode_text")
        return image, text, logit_scale, sequence, inside["intermediates"]["image"][last]["__call__"][0]

    image, text, logit_scale, sequence, hidden = run(params, nhwc(inputs["pixel_values"]), ids)
    image_embeds, text_embeds = guidance.unit(image), guidance.unit(text)
    logits = np.exp(logit_scale) * np.asarray(image_embeds) @ np.asarray(text_embeds).T
    return {
        "image_embeds": image_embeds,
        "text_embeds": text_embeds,
        "logits_per_image": logits,
        "logits_per_text": logits.T,
        "image_pooler_output": image,
        "text_pooler_output": text,
        "image_last_hidden_state": hidden,
        "text_last_hidden_state": sequence,
    }


def before_the_end(inputs, outputs):
    """Behind the end of a caption the program masks keys, and nothing uses what it computes there."""
    seen = inputs["attention_mask"][..., None] > 0
    return {key: seen for key in outputs if key == "text_last_hidden_state"}


RUNNERS = {
    "glide.clip.ImageEncoder": glide_image,
    "glide.clip.TextEncoder": glide_text,
    "glide.clip.cond_fn": glide_cond_fn,
    "transformers.CLIPModel": transformers_clip,
}
# What of an output counts, by kind: (inputs, outputs) -> {output: mask}.
MASKS = {"transformers.CLIPModel": before_the_end}
