"""Runners of the golden cases about unCLIP (karlo, and diffusers' copy of it; kinds by name)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffax import weights
from diffax.diffusion import guidance, process, samplers, schedules
from diffax.weights import karlo
from tests.parity.diffusion import Chain
from tests.parity.models import supported


def nhwc(a):
    return jnp.asarray(np.moveaxis(a, -3, -1), jnp.float32)


def nchw(a):
    return np.moveaxis(np.asarray(a), -1, -3)


def network_of(constructor, model, params, *, prefix="", image_size=8):
    architecture = supported(karlo.net_config, constructor, model=model, image_size=image_size)
    model = architecture.model()
    return model.net, weights.to_flax(params, karlo.table(model, prefix=prefix))


def conditions(inputs, rows=slice(None)):
    """The conditions of karlo's networks that a caption makes."""
    text, features = inputs.get("text_emb", inputs.get("txt_feat")), inputs.get("text_enc", inputs.get("txt_feat_seq"))
    sequence = {"features": jnp.asarray(features[rows], jnp.float32), "mask": jnp.asarray(inputs["mask"][rows] > 0)}
    return {"text_embedding": jnp.asarray(text[rows]), "text_features": sequence}


def image_embedding(rows):
    """The condition of image embeddings [n, D] that are all there."""
    return {"image_embedding": {"embedding": jnp.asarray(rows), "present": jnp.ones(len(rows), bool)}}


def clock(inputs):
    return jnp.asarray(inputs["timesteps"], jnp.float32)


def prior(meta, inputs, params):
    network, params = network_of(meta["config"], "PriorTransformer", params)
    return {"y": jax.jit(network.apply)({"params": params}, inputs["x"], clock(inputs), conditions(inputs))}


def diffusers_prior(meta, inputs, params):
    architecture = supported(karlo.diffusers_net_config, meta["config"])
    model = architecture.model()
    network, params = model.net, weights.to_flax(params, karlo.diffusers_table(model))
    y = jax.jit(network.apply)({"params": params["net"]}, inputs["x"], clock(inputs), conditions(inputs))
    return {"y": y, "post_process_latents": y * params["stats"]["std"] + params["stats"]["mean"]}


def chain_of(diffusion, respacing, predicts, variance):
    config = dict(steps=diffusion["steps"], noise_schedule=diffusion["noise_schedule"], timestep_respacing=respacing)
    return Chain(config | dict(model_mean_type=predicts, model_var_type=variance))


def denoiser(network, params, chain):
    def denoise(z, step, **cond):
        out = network.apply({"params": params}, z, step.t.time, cond)
        return process.predict(out, z, step, predicts=chain.predicts, variance=chain.variance)

    return denoise


def sampler_of(respacing):
    return samplers.ddim(0.0) if respacing.startswith("ddim") else samplers.ddpm()


def prior_sampling(meta, inputs, params):
    """The published loop carries a second half of states, which the network never gets."""
    network, params = network_of(meta["config"]["model"], "PriorDiffusionModel", params, prefix="model.")
    given, null = conditions(inputs, slice(2)), conditions(inputs, slice(2, 4))
    (z, other), noise = jnp.split(jnp.asarray(inputs["x_T"]), 2), jnp.asarray(inputs["noise"])
    got = {}
    for respacing in meta["config"]["timestep_respacings"]:
        chain = chain_of(meta["config"]["diffusion"], respacing, "x0", "fixed_small")
        wraps = [
            guidance.classifier_free(jnp.asarray(inputs["cf_guidance_scales"]), null),
            guidance.clip_denoised(10.0),
        ]
        denoise = guidance.guided(denoiser(network, params, chain), wraps)
        walk = functools.partial(samplers.sample, denoise, steps=chain.sampling, sampler=sampler_of(respacing))
        made = jax.jit(lambda z, walk=walk: walk(z, lambda i: noise[i, :2], **given))(z)
        got[f"sample.{respacing}"] = made * inputs["clip_std"] + inputs["clip_mean"]
        if respacing == "5":
            np.testing.assert_array_equal(chain.kept, meta["timestep_map"])
            step = chain.at([4, 4])
            first_step = jax.jit(lambda z, d=denoise, s=step: samplers.ddpm().step(d, z, s, noise[0, :2], (), **given))
            first, p, _ = first_step(z)

            def as_seen(z, step, x=p.x):
                return process.predict(x, z, step, predicts="x", variance="fixed_small")

            second = samplers.ddpm().step(as_seen, other, step, noise[0, 2:], ())[0]
            got["first_step.sample"] = jnp.concatenate([first, second])
            got["first_step.pred_xstart"] = jnp.concatenate([p.x, p.x])
    return got


def decoder(meta, inputs, params):
    network, params = network_of(meta["config"], "PLMImUNet", params, image_size=16)
    cond = conditions(inputs) | image_embedding(inputs["img_feat"])
    return {"y": nchw(jax.jit(network.apply)({"params": params}, nhwc(inputs["x"]), clock(inputs), cond))}


def decoder_sampling(meta, inputs, params):
    network, params = network_of(meta["config"]["unet"], "Text2ImModel", params, prefix="model.")
    given = conditions(inputs, slice(1)) | image_embedding(inputs["img_feat"])
    size = inputs["img_feat"].shape[1]
    null = conditions(inputs, slice(1, 2)) | {"image_embedding": {"embedding": np.zeros(size), "present": False}}
    noise, got = nhwc(inputs["noise"]), {}
    for respacing in meta["config"]["timestep_respacings"]:
        chain = chain_of(meta["config"]["diffusion"], respacing, "eps", "learned_range")
        wraps = [
            guidance.classifier_free(jnp.asarray(inputs["cf_guidance_scales"]), null),
            guidance.clip_denoised(),
        ]
        denoise = guidance.guided(denoiser(network, params, chain), wraps)
        walk = functools.partial(samplers.sample, denoise, steps=chain.sampling, sampler=sampler_of(respacing))
        made = jax.jit(lambda z, walk=walk: walk(z, lambda i: noise[i, :1], **given))(nhwc(inputs["x_T"])[:1])
        got[f"sample.{respacing}"] = nchw(made)
    return got


def upsampler(meta, inputs, params):
    network, params = network_of(meta["config"], "SuperResUNetModel", params, image_size=16)
    y = jax.jit(network.apply)(
        {"params": params}, nhwc(inputs["x"]), clock(inputs), {"low_res": {"image": nhwc(inputs["low_res"])}}
    )
    return {"y": nchw(y)}


def upsampler_sampling(meta, inputs, params):
    """Seven steps, the last with a network of its own: two walks, of which the second starts where the first ends."""
    architecture = karlo.net_config(
        meta["config"]["model"], model="ImprovedSupRes64to256ProgressiveModel", image_size=8
    )
    model = architecture.model()
    network, params = model.net, weights.to_flax(params, karlo.upsampler_table(model))
    diffusion = meta["config"]["diffusion"]
    chain = chain_of(diffusion, diffusion["timestep_respacing"], "eps", "fixed_small")
    noise, low_res = nhwc(inputs["noise"]), nhwc(inputs["low_res"])

    @jax.jit
    def walk(params, z, steps):
        denoise = guidance.guided(denoiser(network, params, chain), [guidance.clip_denoised()])
        return samplers.sample(denoise, z, lambda i: noise[i], steps, samplers.ddpm(), low_res={"image": low_res})

    before_last = chain.sampling[:-1]
    z = walk(params["first"], nhwc(inputs["x_T"]), before_last)
    return {
        "after_first_step": nchw(walk(params["first"], nhwc(inputs["x_T"]), before_last[:1])),
        "sample": nchw(walk(params["last"], z, chain.sampling[-1:])),
    }


def unclip_scheduler(meta, inputs, params):
    config = meta["config"]["scheduler"]
    predicts = {"sample": "x0", "epsilon": "eps"}[config["prediction_type"]]
    variance = config["variance_type"].removesuffix("_log")
    layout = (nhwc, nchw) if inputs["x"].ndim == 4 else (jnp.asarray, np.asarray)
    z, out, noise = (layout[0](inputs[key]) for key in ("x", "model_output", "noise"))
    diffusion = dict(steps=config["num_train_timesteps"], noise_schedule=config["beta_schedule"])
    got = {"betas": schedules.cosine_betas(config["num_train_timesteps"])}
    for count in meta["config"]["num_inference_steps"]:
        chain = chain_of(diffusion, str(count), predicts, variance)
        got[f"{count}.timesteps"] = chain.kept[::-1]
        plain = chain.denoiser(lambda z, time: out, clip=False)
        denoise = guidance.clip_denoised(config["clip_sample_range"])(plain)
        for k in meta["config"]["step_indices"]:
            k %= count
            step = chain.at(np.full(len(z), count - 1 - k))
            z_s, p, _ = samplers.ddpm().step(denoise, z, step, noise, ())
            got[f"{count}.step{k}.prev_sample"] = layout[1](z_s)
            got[f"{count}.step{k}.pred_original_sample"] = layout[1](p.x)
    return got


RUNNERS = {
    "karlo.PriorTransformer": prior,
    "karlo.prior_sampling": prior_sampling,
    "karlo.PLMImUNet": decoder,
    "karlo.decoder_sampling": decoder_sampling,
    "karlo.SuperResUNetModel": upsampler,
    "karlo.sr_sampling": upsampler_sampling,
    "diffusers.PriorTransformer": diffusers_prior,
    "diffusers.UnCLIPScheduler": unclip_scheduler,
}
