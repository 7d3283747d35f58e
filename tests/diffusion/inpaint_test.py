"""Known pixels: masks that training draws, masks of smaller pictures, and replacement in any sampler."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.diffusion import augment, samplers, schedules
from diffax.diffusion.process import Prediction


def test_masks_are_boxes_or_their_surroundings():
    keys = jax.random.split(jax.random.key(0), 2000)
    known = np.asarray(augment.random_known(keys, (8, 8, 3), empty=0.25))
    assert known.shape == (2000, 8, 8, 1) and set(np.unique(known)) == {0.0, 1.0}
    nothing = ~known.any((1, 2, 3))
    assert 0.21 < nothing.mean() < 0.33, "a quarter, and a few boxes that fill the picture"
    for mask in known[~nothing][:50, :, :, 0]:
        inside = mask if mask.all((0, 1)) or mask.sum() == mask[mask.any(1)][:, mask.any(0)].sum() else 1 - mask
        box = inside[inside.any(1)][:, inside.any(0)]
        other = (1 - mask)[(1 - mask).any(1)][:, (1 - mask).any(0)]
        assert box.all() or other.all()


def test_small_masks_know_what_is_known_below():
    known = np.ones((1, 4, 4, 1), np.float32)
    known[0, 0, 1] = 0
    x, small = augment.shrink_known(jnp.arange(16.0).reshape(1, 4, 4, 1), jnp.asarray(known), 2)
    np.testing.assert_array_equal(np.asarray(small)[0, :, :, 0], [[0, 1], [1, 1]])
    np.testing.assert_allclose(x[0, 1, 1, 0], np.mean([10, 11, 14, 15]))
    for factor in (1, 3, 4):
        ones = augment.shrink_known(jnp.zeros((1, 12, 12, 1)), jnp.ones((1, 12, 12, 1)), factor)[1]
        assert (np.asarray(ones) == 1).all()


@pytest.mark.parametrize("make", [samplers.ddpm, samplers.ddim, samplers.dpm_solver_pp_2m])
def test_replacement_leaves_the_rest_to_the_sampler(make):
    """On independent pixels the unknown ones come out as without a mask, and the known ones as they are."""
    steps = schedules.build_steps(schedules.linear(num_timesteps=200), "20")

    def denoise(z, step, **cond):
        # of data N(0, 1/4), pixel by pixel
        x = z * (step.t.alpha / (step.t.alpha**2 + 4 * step.t.sigma**2))[:, None]
        eps = (z - step.t.alpha[:, None] * x) / step.t.sigma[:, None]
        logvar = step.min_logvar[:, None]
        return Prediction(x=x, eps=eps, variance=jnp.exp(logvar), logvar=logvar)

    keys = jax.random.split(jax.random.key(0), 4)
    noise = samplers.picture_noise(keys, (6,))
    known, x = jnp.array([1.0, 0, 1, 0, 0, 1]), jnp.full((4, 6), 0.25)
    sampler, start = make(), noise(jnp.int32(-1))
    plain = samplers.sample(denoise, start, noise, steps, sampler)
    made = samplers.sample(denoise, start, noise, steps, samplers.replace_known(sampler, x, known))
    np.testing.assert_array_equal(made[:, known > 0], 0.25)
    chex.assert_trees_all_close(made[:, known == 0], plain[:, known == 0], atol=1e-6)
