"""The diffusion model: every parameterisation trains and samples; export; the bound; what edits leave as it is."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.config import spec
from diffax.diffusion import augment, samplers
from diffax.errors import UserError
from diffax.models import cascade
from diffax.models.base import Sampling, Start
from tests.models import micro, systems

PARAMETERISATIONS = [
    ("eps", "fixed_large", "simple", "uniform"),
    ("x", "fixed_small", "simple", "stratified"),
    pytest.param("v", 0.3, "simple", "uniform", marks=pytest.mark.slow),
    ("previous_x", "learned_range", "vlb", "loss_second_moment"),
    ("eps", "learned_range", "hybrid", "uniform"),
    pytest.param("eps", "learned", "hybrid", "uniform", marks=pytest.mark.slow),
    ("eps", "analytic", "simple", "uniform"),
]


@pytest.mark.parametrize(("predicts", "variance", "loss", "timesteps"), PARAMETERISATIONS)
def test_every_parameterisation_trains_and_samples(predicts, variance, loss, timesteps):
    model = micro.model(
        predicts=predicts, variance=variance, loss=spec("loss", loss), timesteps=spec("timesteps", timesteps)
    )

    @jax.jit
    def both(key):
        params = model.init(key)

        def total(params):
            value, metrics, feedback = micro.loss_of(model, params, micro.batch_of(model), micro.keys_of())
            return jnp.mean(value), (value, metrics, feedback)

        (_, aux), grads = jax.value_and_grad(total, has_aux=True)(params)
        if model.analytic:
            table = dict(logsnr=jnp.linspace(-9, 9, 25), residual=jnp.linspace(1, 0, 25))
            params = {**params, "statistics": table}
        return aux, grads, cascade.cascade([model])({"base": params}, micro.keys_of(), {"base": {}})

    (value, metrics, feedback), grads, out = both(jax.random.key(0))
    chex.assert_shape([value, out], [(4,), (4, 8, 8, 3)])
    chex.assert_tree_all_finite((value, grads, out))
    assert np.abs(grads["net"]["conv_out"]["kernel"]).max() > 0
    assert float(metrics["loss"][1]) == 4
    chex.assert_tree_all_finite(model.update_extra(model.init_extra(), feedback))


def test_a_continuous_schedule_trains_and_samples():
    model = micro.model(schedule=spec("schedule", "cosine_logsnr"), variance=0.3)
    assert model.num_steps == 4 and not model.has_bound
    params = micro.drawn(model)
    value, _, _ = jax.jit(lambda p: micro.loss_of(model, p, micro.batch_of(model), micro.keys_of()))(params)
    out = jax.jit(cascade.cascade([model]))({"base": params}, micro.keys_of(), {})
    chex.assert_tree_all_finite((value, out))
    assert np.abs(out).max() <= 1


def test_the_first_loss_is_one():
    """A fresh network answers zero (its last layer starts there), so eps costs its variance."""
    model, n = micro.model(), 64
    params = jax.jit(model.init)(jax.random.key(0))
    value, _, _ = jax.jit(lambda p: micro.loss_of(model, p, micro.batch_of(model, n), micro.keys_of(n)))(params)
    np.testing.assert_allclose(np.mean(value), 1, atol=0.05)


def test_dropout_is_of_an_example():
    model = micro.model(net=micro.unet(dropout=0.5), timesteps=spec("timesteps", "stratified"))
    params, batch, keys = micro.drawn(model), micro.batch_of(model), micro.keys_of()
    loss = jax.jit(lambda b, k, i: model.loss(params, (), b, k, i, 4)[0])
    whole = loss(batch, keys, jnp.arange(4))
    parts = [
        loss(jax.tree.map(lambda a, s=s: a[s], batch), keys[s], jnp.arange(4)[s]) for s in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-5)


def test_sampling_is_exportable_and_compiles_once():
    system = systems.classes()
    (model,), params = system.generators, micro.params_of(system)
    pure = cascade.cascade([model])

    @jax.jit
    @chex.assert_max_traces(n=1)
    def sample(params, keys, label, scale):
        return pure(params, keys, {"base": {"label": label}}, {"base": scale})

    label = jnp.array([0, 1, 2, 2])
    first, again = (sample(params, micro.keys_of(), label, 2.0) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, sample(params, micro.keys_of(seed=1), label, 3.0))
    exported = jax.export.export(
        jax.jit(lambda p, data, label: pure(p, jax.random.wrap_key_data(data), {"base": {"label": label}}))
    )(params, jax.random.key_data(micro.keys_of()), label)
    found = exported.call(params, jax.random.key_data(micro.keys_of()), label)
    np.testing.assert_allclose(found, first, atol=1e-5)  # the scale of the config is 2


def test_progressive_generation_ends_in_the_sample():
    model = micro.model()
    params = {"base": micro.drawn(model)}
    out, kept = jax.jit(cascade.cascade([model], keep=3))(params, micro.keys_of(), {})
    chex.assert_shape(kept, (3, 4, 8, 8, 3))
    np.testing.assert_allclose(kept[-1], out, atol=1e-6)


def test_another_grid_and_sampler():
    model = micro.model()
    other = model.resampled(Sampling(steps="7", sampler=samplers.ddim()))
    assert (model.num_steps, other.num_steps) == (4, 7)
    with pytest.raises(ValueError):
        model.resampled(Sampling(steps="41"))


def test_bits_per_dim_of_a_fresh_network_is_that_of_a_blind_model():
    """Also of a model that enlarges, and whose last step another network takes."""
    system = systems.karlo()
    for model in (micro.model(steps=""), system.generators[-1].resampled(Sampling(steps=""))):
        params = jax.jit(model.init)(jax.random.key(0))
        image = micro.filled(jax.ShapeDtypeStruct(model.shape, jnp.float32))
        given = {name: c.from_batch({"image": image}) for name, c in model.conditions.items()}
        bound = jax.jit(model.bits_per_dim)(params, image, micro.keys_of(), given)
        chex.assert_shape(bound.terms, (4, 40))
        chex.assert_tree_all_finite(bound._asdict())
        np.testing.assert_allclose(bound.total, bound.prior + bound.terms.sum(1), rtol=1e-5)
        assert np.all(np.asarray(bound.total) > 5), "uniform pixels have 8 bits"


def test_what_is_left_open_is_measured_on_the_same_window():
    """Var[x | z] of a network that answers x = 0 is E[x^2], here of windows of crops."""
    low_res = micro.conditions(low_res=dict(factor=2, crop=8))
    model = micro.model(shape=(16, 16, 3), predicts="x", conditions=low_res)
    params, batch = jax.jit(model.init)(jax.random.key(0)), micro.batch_of(model)
    got = jax.jit(lambda p: model.residual(p, batch, micro.keys_of(), np.array([1.0, 0.5])))(params)
    windows, _ = model._conditions_in_training(batch, jnp.asarray(batch["image"]), micro.keys_of())
    assert windows.shape == (4, 8, 8, 3)
    want = np.mean(np.square(windows), axis=(1, 2, 3))
    np.testing.assert_allclose(got, np.stack([want, want], 1), rtol=1e-5)


# ---- edits ----------------------------------------------------------------------------------------------------------


def edited(system, params, start, n=2):
    models = system.generators
    return jax.jit(cascade.cascade(models))(params, micro.keys_of(n), micro.given_of(models, n), {}, start)


@pytest.mark.parametrize("lineage", ["classes", "cascade", "GLIDE"])
def test_known_pixels_are_returned_bit_by_bit(lineage):
    """By replacement, and by inpainting channels in GLIDE's first model."""
    system = systems.EVERY[lineage]()
    params, shape, rng = micro.params_of(system), system.generators[-1].shape, np.random.default_rng(0)
    image = np.float32(rng.uniform(-1, 1, (2, *shape)))
    known = np.float32(rng.random((2, *shape[:2], 1)) < 0.5)
    made = np.asarray(edited(system, params, Start(image=image, known=known)))
    there = np.broadcast_to(known > 0, made.shape)
    np.testing.assert_array_equal(made[there], image[there])
    assert (np.abs(made - image)[~there] > 0).mean() > 0.9
    whole = edited(system, params, Start(image=image, known=np.ones_like(known)))
    np.testing.assert_array_equal(whole, image)


def test_inpainting_channels_are_those_of_the_start():
    """What a call gives for 'inpaint' is what a start with that picture shows."""
    model = systems.glide().generators[0]
    params, given = {"base": micro.drawn(model)}, micro.given_of([model])["base"]
    image, known = given["inpaint"][..., :3], np.float32(given["inpaint"][..., 3:] > 0)
    nothing = {**given, "inpaint": np.zeros_like(given["inpaint"])}
    run = jax.jit(lambda given, start: model.sample(params, micro.keys_of(), given, start=start))
    shown = run({**given, "inpaint": augment.masked(image, known)}, None)
    started = run(nothing, Start(image=image, known=known))
    hidden = np.broadcast_to(known == 0, shown.shape)
    np.testing.assert_allclose(np.asarray(started)[hidden], np.asarray(shown)[hidden], atol=1e-4)
    assert np.abs(shown - run(nothing, None)).max() > 1e-3


def test_strength_says_how_far_one_goes():
    system = systems.classes()
    params = jax.tree.map(lambda a: 0.1 * a, micro.params_of(system))
    (model,) = system.generators
    image = np.full((4, *model.shape), -0.8, np.float32)
    image[:, :4] = 0.8
    given = micro.given_of([model])
    slow = cascade.cascade([model.resampled(Sampling(steps="20"))])
    run = jax.jit(lambda start: slow(params, micro.keys_of(), given, {}, start))
    far = [np.abs(run(Start(image=image, strength=s)) - image).mean() for s in (0.2, 0.6, 1.0)]
    assert far[0] < far[1] < far[2] and far[0] < 0.5 * far[2], far
    free = jax.jit(lambda: slow(params, micro.keys_of(), given))()
    np.testing.assert_allclose(run(Start(image=image, strength=1.0)), free, atol=1e-5)


def test_inversion_finds_the_noise_of_a_picture():
    """The way up and down again, along the steps of DDIM; it is the picture again, the better the more steps."""
    label = micro.conditions(label=dict(num_classes=3))
    schedule = spec("schedule", "linear", num_timesteps=100, beta_end=0.02)
    how = dict(sampler=spec("sampler", "ddim"), guidance=micro.guidance(), schedule=schedule)
    model = micro.model(conditions=label, **how)
    start, drawn = jax.jit(model.init)(jax.random.key(0)), micro.drawn(model)
    params = {"base": jax.tree.map(lambda a, b: a + 0.02 * b, start, drawn)}  # of a smooth function
    given = micro.given_of([model])
    image = micro.filled(jax.ShapeDtypeStruct(model.shape, jnp.float32))

    def lost(steps):
        up = cascade.cascade([model.climbing(steps)])
        down = cascade.cascade([model.resampled(Sampling(steps=steps))])
        noise = up(params, micro.keys_of(), given, {}, Start(noise=image))
        return noise, down(params, micro.keys_of(seed=9), given, {}, Start(noise=noise))

    errors = []
    for steps in ("5", "50"):
        _, back = jax.jit(lambda steps=steps: lost(steps))()
        errors.append(float(np.abs(back - image).mean()))
    assert errors[1] < 0.3 * errors[0], errors
    with pytest.raises(ValueError, match="one way"):
        dataclasses.replace(model, predicts="previous_x").climbing(None)
    with pytest.raises(ValueError, match="two steps"):
        model.climbing("1")


def test_pictures_of_other_sizes_are_enlarged_by_an_inpainting_model():
    low_res = dict(low_res=dict(factor=2), inpaint={})
    model = micro.model(shape=(16, 16, 3), conditions=micro.conditions(**low_res))
    params, keys = {"base": micro.drawn(model)}, micro.keys_of(2)
    given = {"low_res": {"image": np.zeros((2, 4, 6, 3), np.float32)}, "inpaint": model.given["inpaint"].absent(2)}
    out = jax.jit(lambda: model.sample(params, keys, given))()
    assert out.shape == (2, 8, 12, 3) and np.isfinite(out).all()


# ---- choices that do not go together --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(shape=(8, 8)), "config.base: shape must be .height, width, channels."),
        (dict(shape=(32,)), "config.base: shape must be .height, width, channels."),
        (dict(condition_dropout=0.1), "config.base: condition_dropout is 0.1, but no condition"),
        (dict(variance="learned_range"), "config.base: variance 'learned_range' is not trained by the loss"),
        (dict(loss=spec("loss", "hybrid")), "config.base: the loss trains a variance"),
        (dict(predicts="previous_x", schedule=spec("schedule", "cosine_logsnr")), "predicts needs discrete"),
        (dict(conditions=micro.conditions(label=dict(dropout=0.1))), "conditions.label.dropout needs"),
        (dict(conditions=micro.conditions(low_res=dict(dropout=0.1))), "low_res.dropout is 0.1, but it cannot"),
        (dict(conditions=micro.conditions(low_res=dict(factor=3))), "config.base.conditions.low_res: factor must"),
        (dict(conditions=micro.conditions(low_res=dict(crop=7))), "crop must be a multiple of 4"),
        (dict(conditions=micro.conditions(text=dict(heads=3))), "conditions.text: heads must divide width, 512"),
        (dict(guidance=micro.guidance("insert_known")), "insert_known needs the condition 'inpaint'"),
        (dict(guidance=micro.guidance("classifier_free")), "classifier_free needs a network that was trained with"),
        (dict(candidates=2), "candidates must be 1 without the condition 'text_embedding'"),
        (dict(steps="41"), "config.base"),
        (dict(net=micro.unet(heads=3)), "config.base.*3 heads"),
    ],
)
def test_choices_that_do_not_fit_get_one_line(fields, words):
    with pytest.raises(UserError, match=words) as caught:
        micro.model(**fields)
    assert "\n" not in str(caught.value)
