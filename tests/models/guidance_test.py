"""Guidance in models: scales, null values that are encoded once, classifiers, CLIP, and another network's last step."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax.conditions.base import drop
from diffax.diffusion import guidance as guidances
from diffax.models import cascade
from diffax.models.guidance import Guidance, as_scale, scale_of
from diffax.networks.context import Context
from tests.models import micro, systems


def step_of(model, n=4, at=1):
    """A step of the sampling grid."""
    return jax.tree.map(lambda a: jnp.broadcast_to(jnp.asarray(a)[at], n), model.steps)


def normal(model, n=4, seed=3):
    return jax.random.normal(jax.random.key(seed), (n, *model.shape))


@pytest.mark.parametrize("lineage, name", [("classes", "base"), ("GLIDE", "base"), ("DALL-E 2", "decoder"),
                                           ("karlo", "prior"), ("karlo", "decoder")])  # fmt: skip
def test_scale_1_is_the_conditional_model_and_0_the_one_without(lineage, name):
    system = systems.EVERY[lineage]()
    model, params = system.model(name), micro.params_of(system)
    bare = dataclasses.replace(model, guidance={})
    given = micro.given_of([model])[name]
    keys, z, step = micro.keys_of(), normal(model), step_of(model)

    @jax.jit
    def run():
        inputs, nulls = model._inputs(params, keys, given, None)
        raw = {key: c.in_sampling(given[key], keys, params) for key, c in model.conditions.items()}
        null = {key: c.null(params) for key, c in model.conditions.items() if key in nulls}
        null = {k: jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), null[k], raw[k]) for k in null}
        plain = bare.denoiser(params)
        only = {"classifier_free": model.guidance["classifier_free"]}
        steered = dataclasses.replace(model, guidance=only)
        found = {s: steered.guided_denoiser(params, jnp.float32(s), nulls)(z, step, **inputs) for s in (0, 1, 3)}
        return found, plain(z, step, **raw), plain(z, step, **{**raw, **null}), inputs

    found, conditional, without, inputs = run()
    assert all(isinstance(inputs[key], Context) == c.encoded_once for key, c in model.conditions.items())
    assert {key for key, c in model.conditions.items() if c.can_drop} == set(model.nulls)
    for field in ("x", "eps"):
        one, none = (np.asarray(getattr(p, field)) for p in (conditional, without))
        np.testing.assert_allclose(getattr(found[1], field), one, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(getattr(found[0], field), none, rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(getattr(found[3], field), none + 3 * (one - none), rtol=1e-3, atol=1e-4)
        assert np.abs(one - none).max() > 1e-3


def test_text_and_null_values_are_encoded_once():
    """Outside of the loop over steps."""
    model = systems.glide().generators[0]
    params = {"base": micro.drawn(model)}
    given = micro.given_of([model])["base"]
    program = jax.make_jaxpr(lambda p: model.sample(p, micro.keys_of(), given))(params)
    (scan,) = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    inside, whole = str(scan.params["jaxpr"]), str(program)
    table = f"f32[{model.conditions['text'].tokenizer.vocab_size},8]"
    assert table in whole and table not in inside, "no token is looked up in the loop"


def test_a_dropped_condition_is_the_null_one():
    """In training: of examples that are dropped nothing but the null value reaches the loss."""
    model = systems.classes().generators[0]
    always = dataclasses.replace(model, condition_dropout=1.0)
    params, batch, keys = micro.drawn(model), micro.batch_of(model), micro.keys_of()
    loss = jax.jit(lambda m, b: micro.loss_of(m, params, b, keys)[0], static_argnums=0)
    dropped = loss(always, batch)
    np.testing.assert_array_equal(dropped, loss(always, {**batch, "label": (batch["label"] + 1) % 3}))
    bare = dataclasses.replace(model, nulls={})
    null = np.full(4, model.nulls["label"], np.int32)
    np.testing.assert_allclose(dropped, loss(bare, {**batch, "label": null}), rtol=1e-6)
    assert np.abs(dropped - loss(bare, batch)).max() > 1e-4


def test_conditions_are_dropped_in_groups():
    """The image embedding of a tenth of the examples, what comes of the caption of half of them."""
    system = systems.karlo()
    conditions = dict(system.model("decoder").conditions)
    for name in ("text_features", "text_embedding"):
        conditions[name] = dataclasses.replace(conditions[name], dropout=0.5)
    nulls = {name: condition.null({}) for name, condition in conditions.items()}
    values = jax.tree.map(lambda a: np.ones((4000, *a.shape), a.dtype), {n: c.example() for n, c in conditions.items()})
    how = dict(conditions=conditions, rate=0.1, nulls=jax.tree.map(np.zeros_like, nulls))
    got = drop({**values, "low_res": np.ones(4000)}, micro.keys_of(4000), **how)
    gone = {
        "features": ~got["text_features"]["mask"][:, 0],
        "text": got["text_embedding"][:, 0] == 0,
        "image": ~got["image_embedding"]["present"],
        "embedding": got["image_embedding"]["embedding"][:, 0] == 0,
    }
    np.testing.assert_array_equal(gone["features"], gone["text"])
    np.testing.assert_array_equal(gone["image"], gone["embedding"])
    np.testing.assert_array_equal(got["low_res"], 1)
    shares = [np.mean(of) for of in (gone["image"], gone["text"], gone["image"] & gone["text"])]
    np.testing.assert_allclose(shares, [0.1, 0.5, 0.05], atol=0.03)


def test_the_empty_caption_stands_for_a_dropped_one():
    """Where a CLIP reads it: null values are made when its parameters are there, and zeros until then."""
    system = systems.karlo()
    prior, clip = system.model("prior"), system.model("clip")
    params = {"clip": micro.drawn(clip)}
    ids = clip.tokenizer(["", "a red circle"])
    np.testing.assert_array_equal(ids[0], clip.tokenizer.empty)
    found = jax.jit(lambda: clip.embed_text(params["clip"], ids))()
    null = jax.jit(lambda: prior.with_frozen(params).nulls)()
    chex.assert_trees_all_close(null["text_embedding"], found.embedding[0], atol=1e-6)
    chex.assert_trees_all_close(null["text_features"]["features"], found.features[0], atol=1e-6)
    np.testing.assert_array_equal(null["text_features"]["mask"], ids[0] >= 0)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(prior.nulls))
    clips = dataclasses.replace(clip.tokenizer, kind="clip", length=77)
    assert list(clips.empty[:3]) == [49406, 49407, -1]


def test_a_classifier_guides_by_its_gradient():
    system = systems.guided()
    model, classifier = system.model("base"), system.model("classifier")
    params = micro.params_of(system)
    assert set(model.given) == {"label"} and not model.conditions and model.scale == 3.0
    z, step, label = normal(model), step_of(model), jnp.array([0, 1, 2, 2])
    only = dataclasses.replace(model, guidance={"classifier": model.guidance["classifier"]})

    @jax.jit
    def run(z):
        def total(z):
            logits = classifier.net.apply({"params": params["classifier"]}, z, step.t.time)
            return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1))

        return only.guided_denoiser(params, jnp.float32(3))(z, step, label=label).score, jax.grad(total)(z)

    score, gradient = run(z)
    np.testing.assert_allclose(score, 3 * gradient, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3


def test_clip_guides_by_the_gradient_of_the_similarity():
    system = systems.clip_guided()
    model, clip = system.model("base"), system.model("clip")
    params = jax.tree.map(jnp.asarray, micro.params_of(system))
    assert [*model.given] == ["text", "clip_text"]
    ids = clip.tokenizer(["a red circle", "a blue ring", "", "a green cross"])
    z, step, keys = normal(model), step_of(model), micro.keys_of()
    only = dataclasses.replace(model, guidance={"clip": model.guidance["clip"]})

    @jax.jit
    def run(z):
        inputs, nulls = only._inputs(params, keys, {"text": ids, "clip_text": ids}, None)
        words = clip.embed_text(params["clip"], ids).embedding

        def similarity(z):
            image = clip.net.apply({"params": params["clip"]}, z, step.t.time, method="encode_image")
            cosine = jnp.sum(image * words, -1) / jnp.linalg.norm(image, axis=-1) / jnp.linalg.norm(words, axis=-1)
            return jnp.sum(jnp.exp(clip.logit_scale(params["clip"])) * cosine)

        return only.guided_denoiser(params, jnp.float32(3), nulls)(z, step, **inputs).score, jax.grad(similarity)(z)

    score, gradient = run(z)
    np.testing.assert_allclose(score, 3 * gradient, rtol=1e-3, atol=1e-5)


def test_another_network_takes_the_last_step():
    """Also from where the first one's steps end, by itself."""
    system = systems.karlo()
    model, last = system.model("up"), system.model("up_last")
    params, keys = micro.params_of(system), micro.keys_of()
    given = micro.given_of([model])["up"]
    run = jax.jit(lambda p: model.sample(p, keys, given))
    made = run(params)
    other = {**params, "up_last": micro.drawn(last, 77)}
    assert np.abs(run(other) - made).max() > 1e-3
    one = {**params, "up_last": params["up"]}
    alone = dataclasses.replace(model, guidance={"clip_denoised": model.guidance["clip_denoised"]})
    np.testing.assert_allclose(run(one), jax.jit(lambda: alone.sample(params, keys, given))(), atol=1e-4)
    z, step = normal(model), step_of(model, at=-1)
    small = {"low_res": model.conditions["low_res"].in_sampling(given["low_res"], keys, params)}
    finished = dataclasses.replace(model, guidance={"last_step": model.guidance["last_step"]})
    np.testing.assert_allclose(
        jax.jit(lambda: finished.guided_denoiser(params)(z, step, **small).x)(),
        jax.jit(lambda: last.denoiser(params)(z, step, **small).x)(),
        atol=1e-4,
    )


def test_guidance_of_ones_own_is_a_few_lines():
    """It needs no name, is applied where the config lists it, and may have a scale."""

    def brighter(*, amount: float = 0.5) -> Guidance:
        return Guidance(wrap=lambda site: guidances.edit_x(lambda x: x + site.scale), scale=amount)

    model = micro.model(conditions=micro.conditions())
    own = dataclasses.replace(model, guidance={"brighter": brighter()})
    assert own.scale == 0.5
    params = {"base": micro.drawn(model)}
    z, step = normal(model), step_of(model)
    plain = dataclasses.replace(model, guidance={}).guided_denoiser(params)(z, step).x
    moved = own.guided_denoiser(params, as_scale(None, own.scale))(z, step).x
    np.testing.assert_allclose(moved, plain + 0.5, atol=1e-5)
    with pytest.raises(ValueError, match="a and b, which share one scale"):
        scale_of({"a": brighter(), "b": brighter()})


def test_guidance_with_a_scale_is_left_out_without_one():
    model = systems.guided().model("base")
    found = model.guided_denoiser({"base": micro.drawn(model)})(normal(model), step_of(model))
    assert found.score is None and np.abs(found.x).max() <= 1


def test_a_scale_of_a_call_is_traced():
    system = systems.classes()
    params, models = micro.params_of(system), system.generators
    run = jax.jit(chex.assert_max_traces(cascade.cascade(models), n=1))
    given = micro.given_of(models)
    made = [run(params, micro.keys_of(), given, {"base": jnp.full(4, s)}) for s in (1.0, 2.0, 5.0)]
    assert np.abs(made[0] - made[1]).max() > 1e-3 < np.abs(made[1] - made[2]).max()
    assert as_scale(None, None) is None and float(as_scale(2, 3.0)) == 2 and float(as_scale(None, 3.0)) == 3
