"""Small files of weights, and a folder of the configs that they are of."""

import jax
import numpy as np

from diffax import weights
from diffax.weights.families import system_of


def blanks(shapes):
    """{name: array} of given shapes that take no memory."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def parameters(found):
    """Those of a file that holds one section."""
    (table,) = found.sections.values()
    return weights.to_flax(found.tensors, table)


def assert_equal(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, want)


def model_of(config, section):
    """The model of a section."""
    return system_of(config).model(section)


CONFIGS = {
    "small_guided": """
        from diffax.config import add_section, load, new
        from diffax.components import each, spec

        def get_config(variant=""):
            config = new("small_guided")
            section = config.base
            section.shape, section.conditions = (8, 8, 1), each("condition", "label")
            section.conditions.label.num_classes = 5
            section.net.update(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention=(2,), heads=2, groups=4)
            section.variance, section.loss, section.steps = "learned_range", spec("loss", "hybrid"), "2"
            section.train.update(num_train_steps=800, ema=(0.995,))
            section.guidance = each("guidance", "clip_denoised", "classifier")
            add_section(config, "classifier", load("small_classifier").classifier)
            config.stages = ("classifier", "base")
            config.eval.guidance = (1.0, 2.0)
            return config
        """,
    "small_classifier": """
        from diffax.config import new

        def get_config(variant=""):
            config = new("small_classifier", stages=("classifier",), model="classifier")
            section = config.classifier
            section.shape, section.num_classes = (8, 8, 1), 5
            section.net.update(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention=(2,), groups=4)
            section.train.update(num_train_steps=600, ema=())
            return config
        """,
}
