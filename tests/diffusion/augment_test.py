"""Smaller pictures on their way to a network, against numpy in float64: means, bytes, blur, noise, windows."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.data import images
from diffax.diffusion import augment, schedules

CHAIN = schedules.discrete(schedules.cosine_betas(1000))


def keys_of(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# ---- smaller pictures ----


@pytest.mark.parametrize(("shape", "factor"), [((2, 8, 8, 3), 2), ((3, 8, 12, 1), 4), ((1, 6, 9, 3), 3)])
def test_area_downsample_is_the_mean_of_squares(shape, factor):
    x = pictures(*shape)
    got = augment.area_downsample(x, factor)
    want = np.empty((shape[0], shape[1] // factor, shape[2] // factor, shape[3]))
    for row, column in np.ndindex(want.shape[1:3]):
        square = x[:, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
        want[:, row, column] = square.astype(np.float64).mean((1, 2))
    chex.assert_shape(got, want.shape)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_round_to_bytes_is_what_a_file_gives_back():
    every = images.from_uint8(np.arange(256, dtype=np.uint8))
    np.testing.assert_allclose(augment.round_to_bytes(every), every, atol=1e-6)
    x = 1.2 * pictures(500)  # some outside
    stored = np.round((np.clip(x.astype(np.float64), -1, 1) + 1) * 127.5).astype(np.uint8)
    got = augment.round_to_bytes(x)
    np.testing.assert_allclose(got, images.from_uint8(stored), atol=1e-6)
    np.testing.assert_array_equal(augment.round_to_bytes(got), got)


# ---- blur ----


def blurred(x, sigma):
    """A 3x3 Gaussian in float64, one picture [H, W, C], mirrored at the edges without repeating them."""
    side = np.exp(-0.5 / sigma**2)
    taps = np.array([side, 1, side]) / (1 + 2 * side)
    kernel, wide = np.outer(taps, taps), np.pad(x.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    out = np.zeros(x.shape)
    for row, column in np.ndindex(3, 3):
        out += kernel[row, column] * wide[row : row + x.shape[0], column : column + x.shape[1]]
    return out


class BlurTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_each_picture_has_its_own_sigma(self):
        x, sigma = pictures(4, 6, 5, 3), np.array([0.4, 0.5, 0.6, 3.0], np.float32)
        got = self.variant(augment.gaussian_blur)(x, sigma)
        want = [blurred(picture, float(s)) for picture, s in zip(x, sigma, strict=True)]
        np.testing.assert_allclose(got, want, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_sigma_0_leaves_the_picture(self):
        x = pictures(2, 6, 5, 3)
        got = self.variant(augment.gaussian_blur)(x, np.array([0.0, 0.5], np.float32))
        np.testing.assert_array_equal(got[0], x[0])
        assert np.abs(got[1] - x[1]).max() > 0.05


def test_taps_of_half_a_pixel():
    point = np.zeros((1, 5, 5, 1), np.float32)
    point[0, 2, 2] = 1
    got = np.asarray(augment.gaussian_blur(point, np.array([0.5])))[0, :, :, 0]
    taps = np.array([0.1065, 0.7870, 0.1065])
    np.testing.assert_allclose(got[1:4, 1:4], np.outer(taps, taps), atol=1e-4)
    np.testing.assert_allclose(got.sum(), 1, atol=1e-6)
    assert np.count_nonzero(got) == 9


def test_a_constant_picture_stays():
    x = np.full((3, 4, 4, 3), 0.7, np.float32)
    np.testing.assert_allclose(augment.gaussian_blur(x, np.array([0.0, 0.4, 50.0])), x, atol=1e-6)


class RandomBlurTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_a_share_is_blurred_each_with_its_own_sigma(self):
        n, low, high = 2000, 0.4, 0.6
        point = np.zeros((n, 5, 5, 1), np.float32)
        point[:, 2, 2] = 1

        @self.variant
        def blur(x, keys):
            return augment.random_blur(x, keys, share=0.5, low=low, high=high)

        got = np.asarray(blur(point, keys_of(n)))
        is_blurred = got[:, 2, 2, 0] < 1
        np.testing.assert_allclose(is_blurred.mean(), 0.5, atol=0.04)
        np.testing.assert_array_equal(got[~is_blurred], point[~is_blurred])
        # The middle of the blurred point gives its sigma away: ((1 / (1 + 2 exp(-1 / 2 sigma^2)))^2.
        side = (1 / np.sqrt(got[is_blurred][:, 2, 2, 0]) - 1) / 2
        sigma = np.sqrt(-0.5 / np.log(side))
        assert low - 1e-3 < sigma.min() < low + 0.01 and high - 0.01 < sigma.max() < high + 1e-3
        np.testing.assert_allclose(sigma.mean(), 0.5, atol=0.01)


def test_blur_depends_on_the_examples_own_key():
    x, keys = pictures(8, 6, 6, 3), keys_of(8)
    settings = {"share": 0.5, "low": 0.4, "high": 0.6}
    whole = augment.random_blur(x, keys, **settings)
    np.testing.assert_allclose(augment.random_blur(x[3:5], keys[3:5], **settings), whole[3:5], atol=1e-6)
    np.testing.assert_array_equal(augment.random_blur(x, keys, **settings | {"share": 0.0}), x)
    all_of_them = augment.random_blur(x, keys, **settings | {"share": 1.0})
    assert np.all(np.abs(all_of_them - x).max((1, 2, 3)) > 0.01)


# ---- noise ----


class NoiseTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_moments(self):
        x, n = 0.6, 4000
        u = np.repeat([0.1, 0.5, 0.9], n)

        @self.variant
        def noised(keys, level):
            return augment.noise_to(jnp.full((3 * n, 2, 2, 1), x), level, keys)

        level = CHAIN(u)
        got = np.asarray(noised(keys_of(3 * n), jax.tree.map(jnp.asarray, level))).reshape(3, n, -1)
        np.testing.assert_allclose(got.mean((1, 2)), level.alpha[::n] * x, atol=0.03)
        np.testing.assert_allclose(got.std((1, 2)), level.sigma[::n], atol=0.02)
        pixels = np.corrcoef(got[1].T)
        np.testing.assert_allclose(pixels, np.eye(4), atol=0.06)


def test_clean_data_are_let_through_and_noise_is_the_examples_own():
    x, keys = pictures(4, 4, 4, 3), keys_of(4)
    level = CHAIN(np.array([0.0, 0.2, 0.0, 0.9]))
    got = augment.noise_to(x, level, keys)
    np.testing.assert_array_equal(got[::2], x[::2])
    assert np.abs(got[1::2] - x[1::2]).max() > 0.1
    alone = augment.noise_to(x[3:], jax.tree.map(lambda a: a[3:], level), keys[3:])
    np.testing.assert_allclose(alone, got[3:], atol=1e-6)


# ---- windows ----


class CropTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_windows_are_aligned_and_lie_everywhere(self):
        n, factor, side, (height, width) = 400, 2, 4, (8, 12)
        x = np.broadcast_to(np.indices((height, width)).transpose(1, 2, 0), (n, height, width, 2)).astype(np.float32)
        small = augment.area_downsample(x, factor)

        @self.variant
        def crop(x, small, keys):
            return augment.crop_together(x, small, keys, side=side)

        window, small_window = crop(x, small, keys_of(n))
        chex.assert_shape((window, small_window), [(n, side, side, 2), (n, side // factor, side // factor, 2)])
        np.testing.assert_allclose(augment.area_downsample(window, factor), small_window, atol=1e-6)
        corners = np.asarray(window[:, 0, 0]).astype(int)
        np.testing.assert_array_equal(
            window - corners[:, None, None], np.broadcast_to(x[0, :side, :side], window.shape)
        )
        rows, columns = (range(0, size - side + 1, factor) for size in (height, width))
        assert {(int(y), int(x)) for y, x in corners} == set(itertools.product(rows, columns))


def test_windows_of_a_batch_have_their_own_places():
    x, keys = pictures(6, 16, 16, 3), keys_of(6)
    small = augment.area_downsample(x, 4)
    window, small_window = augment.crop_together(x, small, keys, side=8)
    np.testing.assert_allclose(augment.area_downsample(window, 4), small_window, atol=1e-6)
    again = augment.crop_together(x[2:4], small[2:4], keys[2:4], side=8)
    chex.assert_trees_all_equal(again, (window[2:4], small_window[2:4]))
    whole = augment.crop_together(x, small, keys, side=16)
    chex.assert_trees_all_equal(whole, (jnp.asarray(x), small))
