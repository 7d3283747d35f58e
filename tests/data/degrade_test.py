"""The degradations of BSRGAN: laws of the parts, and of the whole; batches of windows beside what is made of them."""

import numpy as np
import pytest

from diffax.data import Loader, Source, batches, image_ops

HOW = image_ops.DEGRADATIONS


def picture(side=64):
    y, x = np.mgrid[:side, :side]
    waves = [128 + 90 * np.sin(x / 9), 128 + 90 * np.cos(y / 7), 40 + 170 * ((x + y) / (2 * side))]
    return np.stack(waves, -1).astype(np.uint8)


def test_convolution_equals_a_sum_over_shifts():
    rng = np.random.default_rng(0)
    x, kernel = rng.random((9, 14, 3)).astype(np.float32), rng.random((5, 5))
    wide = np.pad(x, [(2, 2), (2, 2), (0, 0)], mode="symmetric")
    want = sum(kernel[i, j] * wide[4 - i :, 4 - j :][:9, :14] for i in range(5) for j in range(5))
    np.testing.assert_allclose(image_ops.convolve(x, kernel), want, atol=1e-5)


def test_kernels_have_their_deviations():
    place = np.arange(-12, 13)
    for sigmas, angle in (((1.5, 1.5), 0.0), ((3.0, 1.0), 0.0), ((3.0, 1.0), np.pi / 2)):
        kernel = image_ops.gaussian(12, *sigmas, angle)
        np.testing.assert_allclose(kernel.sum(), 1)
        found = [np.sqrt((kernel * place[None] ** 2).sum()), np.sqrt((kernel * place[:, None] ** 2).sum())]
        np.testing.assert_allclose(found, sigmas[::-1] if angle else sigmas, rtol=0.01)
    assert image_ops.gaussian(3, 0.0, 0.0)[3, 3] == 1, "no blur at all"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [2, 4])
def test_a_degraded_picture_is_still_that_picture(factor, channels):
    pixels = picture()[..., :channels]
    plain = image_ops.smaller(pixels, factor).astype(float)
    distance = {}
    for name, how in HOW.items():
        made = [image_ops.degrade(pixels, factor, np.random.default_rng(i), how) for i in range(12)]
        assert all((m.shape, m.dtype) == (plain.shape, np.uint8) for m in made)
        distance[name] = np.mean([np.abs(m - plain).mean() for m in made])
        assert np.mean([np.corrcoef(m.ravel(), plain.ravel())[0, 1] for m in made]) > 0.75
        assert len({m.tobytes() for m in made}) == 12, "every draw is another"
    again = image_ops.degrade(pixels, factor, np.random.default_rng(3), HOW["bsr_light"])
    np.testing.assert_array_equal(again, made[3])
    assert distance["bsr_light"] < distance["bsr"]


def test_the_order_is_random_but_for_the_two_resizes(monkeypatch):
    orders = set()
    for seed in range(40):
        seen = []

        def log(name, real, seen=seen):
            def call(x, *args, **kwargs):
                seen.append((name, args[0] if name == "resize" else None))
                return real(x, *args, **kwargs)

            return call

        for name, attribute in (("blur", "_random_blur"), ("noise", "_random_noise"), ("resize", "_resize")):
            monkeypatch.setattr(image_ops, attribute, log(name, getattr(image_ops, attribute)))
        image_ops.degrade(picture(32), 2, np.random.default_rng(seed), HOW["bsr"])
        monkeypatch.undo()
        assert seen.count(("blur", None)) == 2 and seen.count(("noise", None)) == 1
        sizes = [size for name, size in seen if name == "resize"]
        assert sizes[-1] == (16, 16) and len(sizes) in (1, 2), "the resize to the final size is the last"
        orders.add(tuple(name for name, _ in seen))
    assert len(orders) > 10


def test_batches_hold_windows_and_what_was_made_of_them():
    whole = picture(64)
    source = Source("one", 8, lambda index: {"image": whole})

    def stream(crop=32):
        edit = image_ops.degraded(4, "bsr_light", crop)
        return next(batches(source, Loader(), shape=(64, 64, 3), batch_size=8, seed=0, edit=edit))

    batch = stream()
    assert batch["image"].shape == (8, 32, 32, 3) and batch["low_res"].shape == (8, 8, 8, 3)
    floats = whole / 127.5 - 1
    for window, small in zip(batch["image"], batch["low_res"], strict=True):
        corners = np.argwhere(np.abs(floats[:33, :33] - window[0, 0]).max(-1) < 1e-5)
        at = [(y, x) for y, x in corners if np.abs(floats[y : y + 32, x : x + 32] - window).max() < 1e-5]
        assert len(at) == 1, "cut from the picture"
        plain = window.reshape(8, 4, 8, 4, 3).mean((1, 3))
        assert np.corrcoef(small.ravel(), plain.ravel())[0, 1] > 0.7
    assert len({w.tobytes() for w in batch["image"]}) > 4
    for one, other in zip(batch.values(), stream().values(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert stream(crop=0)["image"].shape == (8, 64, 64, 3)
