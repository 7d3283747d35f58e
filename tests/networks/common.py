"""Small networks for the tests, and parameters as after training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffax import components
from diffax.networks.conditioned import Conditioned

SHAPE = (8, 8, 3)


NET = dict(name="unet", channels=16, groups=8, channel_mult=(1, 2), num_res_blocks=1, attention=(2,))


VARIANTS = {
    "ddpm": dict(downsample_pad="end", sinusoid="ho", norm_eps=1e-6, kernel_init="ho"),
    "improved": dict(heads=4, scale_shift=True),
    "adm": dict(head_channels=8, scale_shift=True, resample="biggan"),
    "pool": dict(resample="pool", heads=2, heads_up=4, mid_attention=False, attention_up=(1,)),
}


def build(*conditions, **net):
    """A network with conditions, built as a config builds it."""
    network = components.build(NET | net, "network", path="config.base.net", out_channels=3, **{"name": "net"})
    network.check(SHAPE)
    return Conditioned(network, tuple((c.name, c.encoder(network)) for c in conditions))


EXAMPLES = {
    "label": jnp.zeros(1, jnp.int32),
    "text": jnp.full((1, 6), -1),
    "inpaint": jnp.zeros((1, 8, 8, 4)),
    "low_res": {"image": jnp.zeros((1, 4, 4, 3))},
}


def example_inputs(network):
    return jnp.zeros((1, *SHAPE)), jnp.zeros(1), {name: EXAMPLES[name] for name, _ in network.encoders}


def initial(network):
    return jax.jit(network.init)(jax.random.key(0), *example_inputs(network))


def trained(network, seed=0):
    """Parameters that are nowhere zero, as after training: kernels of unit gain, scales near 1."""
    return drawn(network, *example_inputs(network), seed=seed)


def drawn(module, *inputs, seed=0):
    """`trained`, of any module."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.1 * noise
        fan_in = np.prod(leaf.shape) / leaf.shape[-1] if len(leaf.shape) > 1 else 100.0
        return noise / np.sqrt(fan_in)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def network_and_weights(variant):
    """(function (params, z, time, dropout_keys) -> out, params) of a variant, compiled once per shape."""
    network = build(**VARIANTS[variant])

    @jax.jit
    def run(params, z, time, dropout_keys=None):
        return network.apply(params, z, time, {}, dropout_keys=dropout_keys)

    return run, trained(network)


def images(batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, *SHAPE))


TIME = jnp.array([3.0, 500.5])
