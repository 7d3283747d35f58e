"""The smallest models that still have every part, and parameters and inputs for them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffax import config as configs
from diffax.components import Fields
from diffax.config import spec
from diffax.models.system import System

CLASSES, LENGTH, EMBEDDING = 3, 6, 4  # labels, ids of a caption, size of CLIP's embeddings
TOKENIZER = dict(name="demo", length=LENGTH)


def unet(**fields: Any) -> ConfigDict:
    """A U-Net of 8 channels with attention, without a place to halve its pictures."""
    net = dict(channels=8, channel_mult=(1,), num_res_blocks=1, attention=(1,), groups=4, heads=2)
    return spec("network", "unet", **net | fields)


def each(kind: str, **sections: Any) -> ConfigDict:
    """Components by name: `each('condition', label=dict(num_classes=3))`; `name` where it is another than the key."""
    found = Fields()
    for key, fields in sections.items():
        fields = dict(fields)
        found[key] = spec(kind, fields.pop("name", key), **fields)
    return found


def conditions(**sections: Any) -> ConfigDict:
    """The conditions of a section, see `each`."""
    return each("condition", **sections)


def guidance(*names: str, **sections: Any) -> ConfigDict:
    """The guidance of a section, see `each`."""
    return each("guidance", **dict.fromkeys(names, {}), **sections)


def section(model: str = "diffusion", **fields: Any) -> ConfigDict:
    """The section of a model of pictures of 8 x 8 pixels with 40 noise levels."""
    small = {"shape": (8, 8, 3), "schedule": spec("schedule", "cosine", num_timesteps=40)}
    if model == "diffusion":
        small |= {"net": unet(), "steps": "4"}
    made = configs.section(model, **small | fields)
    made.train.update(batch_size=8, num_train_steps=4, warmup_steps=0)
    return made


def text(**fields: Any) -> dict[str, Any]:
    """The condition 'text', small."""
    return dict(tokenizer=spec("tokenizer", "demo", length=LENGTH), width=8, layers=1, heads=2) | fields


def clip(**fields: Any) -> ConfigDict:
    """The section of a CLIP of clean pictures."""
    net = spec("network", "clip", features=EMBEDDING)
    net.image.update(patch=4, width=8, layers=1, heads=2)
    net.text.update(width=8, layers=1, heads=2)
    tokenizer = spec("tokenizer", "demo", length=LENGTH)
    return section("clip", **dict(net=net, tokenizer=tokenizer, noised=False) | fields)


def config(**sections: ConfigDict) -> ConfigDict:
    """A config of these sections, all of them stages in that order."""
    made = configs.new("micro", stages=())
    for name, its in sections.items():
        configs.add_section(made, name, its)
    made.stages = tuple(sections)
    return made


def system(stages: tuple[str, ...] | None = None, **sections: ConfigDict) -> System:
    """The checked system of `config`."""
    made = config(**sections)
    if stages is not None:
        made.stages = stages
    configs.check(made)
    return System(made)


def model(**fields: Any) -> Any:
    """The one diffusion model of a config."""
    return system(base=section(**fields)).generators[0]


def drawn(model: Any, seed: int = 0) -> Any:
    """Parameters that are nowhere zero, as after training: kernels of unit gain, scales near 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.1 * noise
        fan_in = np.prod(leaf.shape) / leaf.shape[-1] if len(leaf.shape) > 1 else 10.0
        return noise / np.float32(np.sqrt(fan_in))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def params_of(system: System) -> dict[str, Any]:
    """{section: parameters} of all sections."""
    return {name: drawn(system.model(name), seed) for seed, name in enumerate(system.trained)}


def keys_of(n: int = 4, seed: int = 0) -> jax.Array:
    """[n] keys, of which the i-th is the same for any n."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def filled(example: Any, n: int = 4, seed: int = 0) -> Any:
    """n values like the `ShapeDtypeStruct`s of one example: numbers in [-1, 1], labels 0, 1, ..., all there."""
    rng = np.random.default_rng(seed)

    def fill(a: jax.ShapeDtypeStruct) -> np.ndarray:
        shape = (n, *a.shape)
        if a.dtype == jnp.bool_:
            return np.ones(shape, bool)
        if jnp.issubdtype(a.dtype, jnp.integer):
            return np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % CLASSES
        return rng.uniform(-1, 1, shape).astype(np.float32)

    return jax.tree.map(fill, example)


def batch_of(model: Any, n: int = 4, seed: int = 0) -> dict[str, Any]:
    """n training examples as the loss of a model reads them."""
    return filled(model.batch_example(), n, seed)


def given_of(models: Any, n: int = 4, seed: int = 0) -> dict[str, dict[str, Any]]:
    """{model: {condition: n values}} of what no earlier model makes, as a call of the sampler has them."""
    found, made = {}, set()
    for number, model in enumerate(models):
        found[model.name] = {
            name: filled(c.given_example(), n, seed + number) for name, c in model.given.items() if name not in made
        }
        made.add(model.output)
    return found


def loss_of(model: Any, params: Any, batch: Mapping[str, Any], keys: jax.Array, position: Any = None, total: int = 0):
    """The loss of examples, by default of a whole global batch."""
    n = len(keys)
    position = jnp.arange(n) if position is None else position
    return model.loss(params, model.init_extra(), batch, keys, position, total or n)
