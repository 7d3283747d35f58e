"""Runners of the golden cases about networks: published classes, their weights and gradients (kinds by name)."""

import jax
import jax.numpy as jnp
import numpy as np

from diffax import convert
from diffax.models import sinusoid


def nhwc(a):
    return jnp.asarray(np.moveaxis(a, 1, -1), jnp.float32)


def nchw(a):
    return np.moveaxis(np.asarray(a), -1, 1)


def load(architecture, table_of, params):
    """(network, parameters, table) of a published model."""
    network = architecture.build()
    table = table_of(network, architecture.shape)
    return network, convert.to_flax(params, table), table


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
    architecture = supported(convert.openai.net_config, config, model=model, image_size=size)

    def table_of(network, shape):
        return convert.openai.table(network, shape, attention_order=architecture.attention_order)

    return load(architecture, table_of, params)


def conditions(inputs):
    cond = {"label": jnp.asarray(inputs["y"])} if "y" in inputs else {}
    return cond | ({"low_res": nhwc(inputs["low_res"])} if "low_res" in inputs else {})


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
    grads = convert.to_torch(grads, table)
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
    architecture = supported(convert.diffusers.net_config, config, image_size=tuple(size))

    def table_of(network, shape):
        flip = config.get("flip_sin_to_cos", True)
        return convert.diffusers.table(network, shape, flip_sin_to_cos=flip)

    network, params, _ = load(architecture, table_of, params)
    time = jnp.broadcast_to(clock(inputs), inputs["x"].shape[:1])
    label = inputs.get("class_labels", inputs.get("y"))
    cond = {} if label is None else {"label": jnp.asarray(label)}
    return {"y": nchw(jax.jit(network.apply)({"params": params}, nhwc(inputs["x"]), time, cond))}


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
    "diffusers.UNet2DModel": diffusers_unet,
}
