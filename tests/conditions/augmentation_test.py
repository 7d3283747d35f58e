"""Non-leaking augmentation: the network learns how a picture was changed, and sampling gives no change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import config as configs
from diffax.conditions.augmentation import Augmentation, AugmentationEncoder
from diffax.models.system import System
from diffax.networks.layers import Style

X = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
KEYS = jax.random.split(jax.random.key(1), 64)


def changed(**fields):
    condition = Augmentation(name="augmentation", shape=(8, 8, 3), **fields)
    return jax.jit(lambda x, keys: condition.in_training({}, x, keys))(X, KEYS)


def test_no_change_is_zeros_and_adds_nothing():
    x, changes = changed(probability=0.0)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(changes, np.zeros((64, 5)))
    encoder = AugmentationEncoder(Style(), 16)
    params = encoder.init(jax.random.key(0), changes, X)
    np.testing.assert_array_equal(encoder.apply(params, changes, X).vector, np.zeros((64, 16)))


def test_a_picture_is_what_its_changes_say():
    x, changes = changed(probability=1.0, rotate=True, shift=0.25)
    assert len(np.unique(np.round(changes, 3), axis=0)) > 30
    for before, after, (flip, cosine, sine, down, right) in zip(np.asarray(X), np.asarray(x), changes, strict=True):
        want = before[:, ::-1] if flip else before
        want = np.rot90(want, round(float(np.arctan2(sine, cosine + 1)) / (np.pi / 2)) % 4)
        wide = np.pad(want, [(2, 2), (2, 2), (0, 0)], mode="reflect")
        top, left = 2 - round(2 * float(down)), 2 - round(2 * float(right))
        np.testing.assert_allclose(after, wide[top : top + 8, left : left + 8], atol=1e-6)


def test_changes_happen_as_often_as_they_should():
    keys = jax.random.split(jax.random.key(2), 4000)
    condition = Augmentation(name="augmentation", shape=(4, 4, 1), probability=0.3, shift=0.25)
    _, changes = condition.in_training({}, jnp.zeros((4000, 4, 4, 1)), keys)
    assert abs(float(jnp.mean(changes[:, 0])) - 0.15) < 0.03  # half of the chosen ones are mirrored
    assert abs(float(jnp.mean(jnp.any(changes[:, 3:] != 0, axis=1))) - 0.3 * 8 / 9) < 0.03
    assert not np.any(changes[:, 1:3])


def test_a_config_has_it_and_sampling_needs_no_argument():
    config = configs.load("ddpm_cifar10:augmented,tiny")
    configs.check(config)
    model = System(config).model("base")
    assert [*model.conditions] == ["augmentation"]
    np.testing.assert_array_equal(model.conditions["augmentation"].absent(2), np.zeros((2, 5)))


def test_turning_needs_squares():
    config = configs.load("ddpm_cifar10:augmented,tiny", ["config.base.conditions.augmentation.rotate=true"])
    config.base.shape = (16, 8, 1)
    with pytest.raises(configs.UserError, match="rotate needs square pictures"):
        configs.check(config)
