"""Runners of the golden cases about networks: published classes, their weights and gradients (kinds by name)."""

import jax
import jax.numpy as jnp
import numpy as np

from diffax import weights
from diffax.diffusion import guidance, process, samplers
from diffax.networks.layers import sinusoid
from tests.parity.diffusion import Chain


def nhwc(a):
    return jnp.asarray(np.moveaxis(a, 1, -1), jnp.float32)


def nchw(a):
    return np.moveaxis(np.asarray(a), -1, 1)


def load(architecture, table_of, params):
    """(network, parameters, table) of a published model."""
    model = architecture.model()
    table = table_of(model)
    return model.net, weights.to_flax(params, table), table


def supported(translate, *args, **kwargs):
    """The architecture, or NotImplementedError with the reason why there is none."""
    try:
        architecture = translate(*args, **kwargs)
        architecture.build()
    except ValueError as error:
        raise NotImplementedError(str(error)) from error
    return architecture


def openai(model, meta, inputs, params):
    """(network, parameters, table) of one of OpenAI's classes."""
    extras = ("grads_of", "classifier_scale")
    config = {k: v for k, v in meta["config"].items() if k not in extras}
    # a classifier is bound to the size it was made for, a U-Net is not
    size = None if model == "EncoderUNetModel" else inputs["x"].shape[2]
    architecture = supported(weights.openai.net_config, config, model=model, image_size=size)

    def table_of(model):
        return weights.openai.table(model, attention_order=architecture.attention_order)

    return load(architecture, table_of, params)


def conditions(inputs):
    cond = {"label": jnp.asarray(inputs["y"])} if "y" in inputs else {}
    return cond | ({"low_res": {"image": nhwc(inputs["low_res"])}} if "low_res" in inputs else {})


def clock(inputs):
    return jnp.asarray(inputs["timesteps"], jnp.float32)


def unet_model(model):
    def run(meta, inputs, params):
        network, params, _ = openai(model, meta, inputs, params)
        y = jax.jit(network.apply)({"params": params}, nhwc(inputs["x"]), clock(inputs), conditions(inputs))
        return {"y": nchw(y)}

    return run


def loss_grad(meta, inputs, params):
    network, params, table = openai("UNetModel", meta, inputs, params)
    target = nhwc(inputs["target"])

    def loss(params, x):
        y = network.apply({"params": params}, x, clock(inputs), conditions(inputs))
        return jnp.mean((y - target) ** 2)

    value, (grads, grad_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, nhwc(inputs["x"]))
    grads = weights.to_torch(grads, table)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    chosen = {f"grad.{key}": grads[key] for key in meta["config"]["grads_of"]}
    return {"loss": np.asarray(value), "grad_x": nchw(grad_x), "grad_norm": np.asarray(norm)} | chosen


def classifier(meta, inputs, params):
    network, params, _ = openai("EncoderUNetModel", meta, inputs, params)

    def log_prob(x):
        logits = network.apply({"params": params}, x, clock(inputs))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(inputs["y"])[:, None], 1)[:, 0]
        return picked.sum(), (logits, picked)

    grad, (logits, picked) = jax.jit(jax.grad(log_prob, has_aux=True))(nhwc(inputs["x"]))
    scale = meta["config"].get("classifier_scale", 1.0)
    return {"logits": np.asarray(logits), "log_prob": np.asarray(picked), "grad": scale * nchw(grad)}


def diffusers_unet(meta, inputs, params):
    config = meta["config"]
    size = inputs["x"].shape[2:]
    architecture = supported(weights.diffusers.net_config, config, image_size=tuple(size))

    def table_of(model):
        return weights.diffusers.table(model, flip_sin_to_cos=config.get("flip_sin_to_cos", True))

    network, params, _ = load(architecture, table_of, params)
    time = jnp.broadcast_to(clock(inputs), inputs["x"].shape[:1])
    label = inputs.get("class_labels", inputs.get("y"))
    cond = {} if label is None else {"label": jnp.asarray(label)}
    return {"y": nchw(jax.jit(network.apply)({"params": params}, nhwc(inputs["x"]), time, cond))}


def diffusers_decoder(meta, inputs, params):
    """karlo's decoder in diffusers' two modules; the first half of the pictures has the null image embedding."""
    unet, proj = meta["config"]["decoder"], meta["config"]["text_proj"]
    channels, levels = unet["block_out_channels"], len(unet["block_out_channels"])
    constructor = dict(
        text_ctx=inputs["text_enc"].shape[1],
        xf_width=proj["cross_attention_dim"],
        clip_dim=proj["clip_embeddings_dim"],
        clip_emb_mult=proj["clip_extra_context_tokens"],
        clip_emb_type="image",
        clip_emb_drop=0.1,
        in_channels=unet["in_channels"],
        model_channels=channels[0],
        out_channels=unet["out_channels"],
        num_res_blocks=unet["layers_per_block"],
        attention_resolutions=[2**level for level in range(1, levels)],
        channel_mult=[width // channels[0] for width in channels],
        num_head_channels=unet["attention_head_dim"],
        use_scale_shift_norm=True,
        resblock_updown=True,
    )
    architecture = weights.karlo.net_config(constructor, model="PLMImUNet", image_size=unet["sample_size"])

    def table_of(model):
        parts = ("decoder", "text_proj")
        return [entry for part in parts for entry in weights.karlo.diffusers_decoder_table(model, part=part)]

    network, params, _ = load(architecture, table_of, params)
    given, rows = len(inputs["image_emb"]), len(inputs["text_emb"])
    image = jnp.zeros_like(jnp.asarray(inputs["text_emb"])).at[-given:].set(inputs["image_emb"])
    cond = {
        "image_embedding": {"embedding": image, "present": jnp.arange(rows) >= rows - given},
        "text_embedding": jnp.asarray(inputs["text_emb"]),
        "text_features": {"features": jnp.asarray(inputs["text_enc"]), "mask": jnp.asarray(inputs["mask"] > 0)},
    }
    return {"y": nchw(jax.jit(network.apply)({"params": params}, nhwc(inputs["x"]), clock(inputs), cond))}


def diffusers_super_res(meta, inputs, params):
    channels = meta["config"]["block_out_channels"]
    constructor = dict(
        channels=channels[0],
        depth=meta["config"]["layers_per_block"],
        channels_multiple=[width // channels[0] for width in channels],
        dropout=0.0,
    )
    architecture = weights.karlo.net_config(
        constructor, model="ImprovedSupRes64to256ProgressiveModel", image_size=inputs["x"].shape[2]
    )
    network, params, _ = load(architecture, weights.diffusers.table, params)
    y = jax.jit(network.apply)({"params": params}, nhwc(inputs["x"]), clock(inputs), conditions(inputs))
    return {"y": nchw(y)}


def glide(model, config, inputs, params):
    """(network, parameters) of one of GLIDE's classes."""
    size = inputs["x"].shape[2]
    architecture = supported(weights.glide.net_config, config, model=model, image_size=size)
    network, params, _ = load(architecture, weights.glide.table, params)
    return network, {"params": params}


def caption(inputs):
    mask = inputs.get("mask", np.ones_like(inputs["tokens"]))
    return jnp.asarray(np.where(mask, inputs["tokens"], -1), jnp.int32)


def text_to_image(model):
    def run(meta, inputs, params):
        network, params = glide(model, meta["config"], inputs, params)
        z, cond = nhwc(inputs["x"]), conditions(inputs) | {"text": caption(inputs)}
        if "Inpaint" in model:
            zeros = np.zeros_like(inputs["x"])
            parts = inputs.get("inpaint_image", zeros), inputs.get("inpaint_mask", zeros[:, :1])
            cond["inpaint"] = nhwc(np.concatenate(parts, 1))
        text = jax.jit(network.apply, static_argnames="method")(params, cond, z, method="encode")["text"]
        y = jax.jit(network.apply)(params, z, clock(inputs), cond)
        return {"y": nchw(y), "xf_proj": np.asarray(text.vector), "xf_out": nchw(text.sequence)}

    return run


def guided_text_to_image(meta, inputs, params):
    """The published sampler carries a second half of states, of which it shows the network nothing: their eps is that
    of the first half, their variance the unconditional one. Here only the first half exists; the second is made by
    hand."""
    chosen = ("guidance_scale", "timestep_respacing", "noise_schedule")
    scale, respacing, schedule = (meta["config"][key] for key in chosen)
    config = {key: value for key, value in meta["config"].items() if key not in chosen}
    network, params = glide("Text2ImUNet", config, inputs, params)
    chain = Chain(
        dict(steps=1000, noise_schedule=schedule, timestep_respacing=respacing, model_var_type="learned_range")
    )
    apply = jax.jit(network.apply)
    clip = [guidance.clip_denoised()]

    def denoise(z, step, text):
        out = apply(params, z, step.t.time, {"text": text})
        return process.predict(out, z, step, predicts=chain.predicts, variance=chain.variance)

    (z, other), (noise, other_noise) = (jnp.split(nhwc(inputs[key]), 2) for key in ("x", "sample_noise"))
    steps = [chain.at(t) for t in np.split(inputs["t"], 2)]
    text, empty = jnp.split(caption(inputs), 2)
    null = {"text": np.full(text.shape[1], -1, np.int32)}
    np.testing.assert_array_equal(empty, np.broadcast_to(null["text"], empty.shape))

    classifier_free = guidance.classifier_free(scale, null)(denoise)
    eps = classifier_free(z, steps[0], text=text).eps
    values = [apply(params, z, steps[0].t.time, {"text": tokens})[..., z.shape[-1] :] for tokens in (text, empty)]
    out = [jnp.concatenate([eps, v], -1) for v in values]

    def mirrored(z, step):
        return process.predict(out[1], z, step, predicts=chain.predicts, variance=chain.variance)

    guided = guidance.guided(classifier_free, clip)
    mirrored = guidance.guided(mirrored, clip)

    def both(sampler):
        first = sampler.step(guided, z, steps[0], noise, (), text=text)
        second = sampler.step(mirrored, other, steps[1], other_noise, ())
        return [nchw(jnp.concatenate(pair)) for pair in (first[:1] + second[:1], (first[1].x, second[1].x))]

    p_sample, pred_xstart = both(samplers.ddpm())
    return {
        "model_fn": nchw(jnp.concatenate(out)),
        "p_sample": p_sample,
        "pred_xstart": pred_xstart,
        "ddim_sample": both(samplers.ddim(0.0))[0],
    }


def timestep_embedding(meta, inputs, params):
    time = jnp.asarray(inputs["timesteps"])
    return {
        f"emb.{dim}.{period}": np.asarray(sinusoid(time, dim, max_period=period))
        for dim in meta["config"]["dims"]
        for period in meta["config"]["max_periods"]
    }


RUNNERS = {
    "guided_diffusion.timestep_embedding": timestep_embedding,
    "guided_diffusion.UNetModel": unet_model("UNetModel"),
    "guided_diffusion.UNetModel.loss_grad": loss_grad,
    "guided_diffusion.SuperResModel": unet_model("SuperResModel"),
    "guided_diffusion.EncoderUNetModel": classifier,
    "improved_diffusion.UNetModel": unet_model("UNetModel"),
    "improved_diffusion.SuperResModel": unet_model("SuperResModel"),
    "glide.cfg_model_fn": guided_text_to_image,
    "diffusers.UNet2DModel": diffusers_unet,
    "diffusers.UNet2DConditionModel": diffusers_decoder,
    "diffusers.UNet2DModel.super_res": diffusers_super_res,
} | {f"glide.{model}": text_to_image(model) for model in weights.glide.MODELS}
