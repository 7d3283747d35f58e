"""unCLIP's networks (DALL-E 2, karlo): the published weights' names, and laws of priors and decoders."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import networks, weights
from diffax.diffusion import augment, guidance, samplers
from diffax.models import codes
from diffax.weights import karlo
from tests.models_test import drawn
from tests.parity.diffusion import Chain
from tests.parity.unclip import denoiser

# ---- published models -----------------------------------------------------------------------------------------------

MANIFEST = pathlib.Path(__file__).parent / "golden" / "manifest_full_size.json"
PUBLISHED = {
    name: entry
    for name, entry in (json.loads(MANIFEST.read_text())["models"] if MANIFEST.exists() else {}).items()
    if "karlo" in name
}


def published_table(entry):
    if entry["class"] == "PriorTransformer":
        architecture = karlo.diffusers_net_config(entry["constructor"])
        return karlo.diffusers_table(architecture.build(), architecture.shape)
    if karlo.MODELS[entry["class"]] == "upsampler":
        architecture = karlo.net_config(entry["args"]["model"]["hparams"], model=entry["class"], image_size=256)
        return karlo.upsampler_table(architecture.build(), architecture.shape)
    architecture = karlo.net_config(entry["constructor"], model=entry["class"])
    return karlo.table(architecture.build(), architecture.shape, prefix="model.")


@pytest.mark.skipif(not PUBLISHED, reason="no manifest_full_size.json in the golden folder")
@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_count_of_a_published_model(name):
    entry = PUBLISHED[name]
    table = published_table(entry)
    shapes = {key: list(shape) for row in table for key, shape in zip(row.keys, row.shapes, strict=True)}
    assert shapes == entry["state_dict"]
    assert len(shapes) == entry["num_keys"]
    assert sum(math.prod(row.shape) for row in table) == entry["num_parameters"]


# ---- conversion -----------------------------------------------------------------------------------------------------

PRIOR = dict(text_ctx=4, xf_width=16, xf_layers=2, xf_heads=2, xf_final_ln=True, clip_dim=6)
DECODER = dict(
    text_ctx=4, xf_width=24, clip_dim=6, clip_emb_mult=4, clip_emb_type="image", clip_emb_drop=0.1, in_channels=3,
    model_channels=32, out_channels=6, num_res_blocks=1, attention_resolutions=[2], channel_mult=[1, 2],
    num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True,
)  # fmt: skip
UPSAMPLER = dict(channels=32, depth=1, channels_multiple=[1, 2], dropout=0.0)


def small_table(kind):
    if kind == "diffusers":
        architecture = karlo.diffusers_net_config(
            dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=6, num_embeddings=4)
        )
        return karlo.diffusers_table(architecture.build(), architecture.shape)
    model, options = {
        "prior": ("PriorTransformer", PRIOR),
        "decoder": ("PLMImUNet", DECODER),
        "upsamplers": ("ImprovedSupRes64to256ProgressiveModel", UPSAMPLER),
    }[kind]
    architecture = karlo.net_config(options, model=model, image_size=8)
    make = karlo.upsampler_table if kind == "upsamplers" else karlo.table
    return make(architecture.build(), architecture.shape)


def torch_shapes(table):
    return {key: shape for row in table for key, shape in zip(row.keys, row.shapes, strict=True)}


@pytest.mark.parametrize("kind", ["prior", "decoder", "upsamplers", "diffusers"])
def test_round_trip_is_exact(kind):
    table, rng = small_table(kind), np.random.default_rng(0)
    state_dict = {key: rng.standard_normal(shape, np.float32) for key, shape in torch_shapes(table).items()}
    params = weights.to_flax(state_dict, table)
    back = weights.to_torch(params, table)
    assert set(back) == set(state_dict)
    for key, value in state_dict.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(v.size for v in state_dict.values())
    assert (
        set(params)
        >= {
            "upsamplers": {"first", "last"},
            "diffusers": {"net", "stats"},
            "prior": {"prior", "text_features", "text_embedding"},
            "decoder": {"unet", "text_features", "text_embedding", "image_embedding"},
        }[kind]
    )


def test_a_prior_without_a_last_norm():
    """It has the other's arrays but for the norm, and gives the same where the norm's work is done by hand."""
    shapes, outputs = [], []
    for final_norm in (True, False):
        architecture = karlo.net_config(PRIOR | dict(xf_final_ln=final_norm), model="PriorTransformer")
        network = architecture.build()
        table = karlo.table(network, architecture.shape)
        shapes.append(torch_shapes(table))
        rng = np.random.default_rng(0)
        state = {key: rng.standard_normal(shapes[0][key], np.float32) for key in shapes[0]}
        params = weights.to_flax({key: state[key] for key in shapes[-1]}, table)
        z, time, cond = networks.example_inputs(network, architecture.shape, 2)
        y, inside = network.apply({"params": params}, z + 1, time, cond, capture_intermediates=True)
        outputs.append((y, inside["intermediates"]["prior"]["block_1"]["__call__"][0][:, -1], state))
    assert {*shapes[0]} - {*shapes[1]} == {"final_ln.weight", "final_ln.bias"} and {*shapes[1]} < {*shapes[0]}
    y, h, state = outputs[1]
    np.testing.assert_allclose(h, outputs[0][1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, h @ state["out_proj.weight"].T + state["out_proj.bias"], rtol=1e-4, atol=1e-4)


def test_the_tokens_of_an_image_embedding_by_hand():
    """Output c * 4 + k of karlo's layer is channel c of token k."""
    table = small_table("decoder")
    state_dict = {key: np.zeros(shape, np.float32) for key, shape in torch_shapes(table).items()}
    rows = np.arange(24 * 4, dtype=np.float32)
    state_dict["clip_tok_proj.bias"] = rows
    state_dict["clip_tok_proj.weight"] = np.tile(rows[:, None], (1, 6))
    tokens = weights.to_flax(state_dict, table)["image_embedding"]["tokens"]
    token, channel = np.indices((4, 24))
    np.testing.assert_array_equal(tokens["bias"], channel * 4 + token)
    np.testing.assert_array_equal(tokens["kernel"], np.broadcast_to(channel * 4 + token, (6, 4, 24)))


@pytest.mark.parametrize(
    "options, model, match",
    [
        (PRIOR, "UNetModel", "model 'UNetModel' is unknown; use one of .'PriorTransformer'"),
        ({}, "PriorTransformer", "PriorTransformer needs text_ctx"),
        (PRIOR | dict(spam=1), "PriorTransformer", "spam=1 cannot be converted; this option is unknown"),
        (PRIOR | dict(xf_heads=3), "PriorTransformer", "net.heads 3 does not divide net.width 16"),
        (DECODER | dict(clip_emb_type="text"), "PLMImUNet", "clip_emb_type='text'"),
        (DECODER | dict(spam=1), "PLMImUNet", "spam=1 .*unknown"),
        (UPSAMPLER | dict(spam=1), "ImprovedSupRes64to256ProgressiveModel", "spam=1 .*unknown"),
    ],
)
def test_karlo_refusals(options, model, match):
    with pytest.raises(ValueError, match=match):
        karlo.net_config(options, model=model, image_size=8).build()


def test_more_refusals():
    with pytest.raises(ValueError, match="embedding_proj_norm_type='layer' cannot be converted; only None is supp"):
        karlo.diffusers_net_config(dict(embedding_proj_norm_type="layer"))
    with pytest.raises(ValueError, match="spam=1 cannot be converted; this option is unknown"):
        karlo.diffusers_net_config(dict(spam=1, _class_name="PriorTransformer"))
    network = networks.build(dict(width=16, layers=1, heads=2, name="prior", text=dict(vocab_size=9, length=4)),
                           shape=(6,), takes=("text",), out_channels=6)  # fmt: skip
    with pytest.raises(ValueError, match="karlo's networks have no text/token/embedding"):
        karlo.table(network, (6,))


def test_statistics():
    stats = karlo.stats(np.array([[0.5, 1.0]]), np.array([[2.0, 4.0]]))
    scale = codes.Scale(**stats)
    np.testing.assert_allclose(codes.scaled(jnp.array([2.5, 1.0]), scale), [1.0, 0.0])
    np.testing.assert_allclose(codes.unscaled(jnp.array([1.0, 0.0]), scale), [2.5, 1.0])
    for mean, std in (([0.0, 1.0], [1.0]), ([0.0], [0.0]), ([np.nan], [1.0])):
        with pytest.raises(ValueError, match="give the mean and the standard deviation"):
            karlo.stats(mean, std)


# ---- the diffusion prior --------------------------------------------------------------------------------------------

D, CLIP, CAPTION = 6, dict(size=6, width=5, length=4), dict(vocab_size=9, length=4)
SMALL = dict(name="prior", width=16, layers=2, heads=2, clip=CLIP, text=CAPTION)
LAYOUTS = {"karlo": ("text_features", "text_embedding"), "paper": ("text", "text_embedding")}
CLOCK = jnp.array([3.0, 500.0, 999.0])


def prior_of(layout, **net):
    return networks.build(SMALL | net, shape=(D,), takes=LAYOUTS[layout], out_channels=D)


@functools.cache
def prior_case(layout):
    network = prior_of(layout)
    params = drawn(network, *networks.example_inputs(network, (D,)))
    return network, params, jax.jit(network.apply)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def captions(layout):
    """Conditions of three captions, the last of one token."""
    padded = jnp.arange(4) >= jnp.array([[4], [3], [1]])
    if layout == "karlo":
        caption = {"text_features": jnp.where(padded[..., None], jnp.nan, normal(1, 3, 4, 5))}
    else:
        caption = {"text": jnp.where(padded, -1, jnp.arange(12).reshape(3, 4) % 9)}
    return caption | {"text_embedding": normal(2, 3, D)}


def withheld(network, cond):
    return {name: jnp.full_like(cond[name], null) for name, null in networks.null_conditions(network).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_prior_reads_all_that_it_is_told(layout):
    network, params, apply = prior_case(layout)
    z, cond = normal(0, 3, D), captions(layout)
    want = apply(params, z, CLOCK, cond)
    assert (want.shape, want.dtype) == ((3, D), jnp.float32)
    first = jnp.array([1.0, 0, 0])[:, None]
    caption = LAYOUTS[layout][0]
    changed = cond[caption].at[0, 1].add(1)
    for got in (
        apply(params, z + first, CLOCK, cond),
        apply(params, z, CLOCK + first[:, 0], cond),
        apply(params, z, CLOCK, cond | {"text_embedding": cond["text_embedding"] + first}),
        apply(params, z, CLOCK, cond | {caption: changed}),
    ):
        assert np.abs(got[0] - want[0]).max() > 1e-3
        np.testing.assert_array_equal(got[1:], want[1:])  # an example is read on its own


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_withheld_prior_sees_z_alone(layout):
    network, params, apply = prior_case(layout)
    z, cond = normal(0, 3, D), captions(layout)
    null = withheld(network, cond)
    assert set(null) == set(LAYOUTS[layout])
    alone = apply(params, z, CLOCK, null)
    assert np.isfinite(alone).all()
    assert np.abs(alone - apply(params, z, CLOCK, cond)).max() > 1e-2
    assert np.abs(alone - apply(params, z + 1, CLOCK, null)).max() > 1e-2
    # one condition at a time
    for name in null:
        assert np.isfinite(apply(params, z, CLOCK, cond | {name: null[name]})).all()


def test_padding_says_nothing():
    """A caption in a longer row of padding is the same caption; what a mask hides has no slope either."""
    network, params, apply = prior_case("karlo")
    z, cond = normal(0, 3, D), captions("karlo")

    def total(features):
        return jnp.sum(network.apply(params, z, CLOCK, cond | {"text_features": features}) ** 2)

    slope = jax.jit(jax.grad(total))(cond["text_features"])
    padded = jnp.isnan(cond["text_features"])
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(jnp.where(padded, slope, 0.0), jnp.zeros_like(slope))
    assert (jnp.abs(slope).max(-1) > 0).sum() == 4 + 3 + 1


def test_the_prior_is_a_denoiser_of_vectors():
    """Noised, trained, guided, clipped and sampled by the functions that serve pictures."""
    network, params, _ = prior_case("karlo")
    cond, null = captions("karlo"), networks.null_conditions(network)
    chain = Chain(dict(steps=40, noise_schedule="cosine", timestep_respacing="5", model_mean_type="x0"))

    def net_of(params):
        return guidance.guided(
            denoiser(network, params["params"], chain),
            [guidance.classifier_free(jnp.array([1.0, 2.0, 4.0]), null), guidance.clip_denoised(10.0)],
        )

    keys = jax.random.split(jax.random.key(4), 3)

    @jax.jit
    def both(params):
        noise = samplers.picture_noise(keys, (D,))
        made = samplers.sample(net_of(params), noise(jnp.int32(-1)), noise, chain.sampling, samplers.ddpm(), **cond)
        one = samplers.sample(
            denoiser(network, params["params"], chain),
            noise(jnp.int32(-1)),
            noise,
            chain.sampling,
            samplers.ddpm(),
            **cond,
        )
        dropped = augment.drop(cond, keys, rate=1.0, null=null)
        return made, one, dropped

    made, one, dropped = both(params)
    assert made.shape == (3, D) and np.isfinite(made).all()
    np.testing.assert_allclose(made[0], one[0], rtol=1e-4, atol=1e-5)  # scale 1 is the conditional model
    assert np.abs(made[1:] - one[1:]).max() > 1e-2
    for name, value in withheld(network, cond).items():
        np.testing.assert_array_equal(dropped[name], value)


def test_contexts_encoded_once_can_be_guided():
    network, params, _ = prior_case("karlo")
    z, cond = normal(0, 3, D), captions("karlo")
    chain = Chain(dict(steps=40, noise_schedule="cosine", model_mean_type="x0"))
    step, null = chain.at([3, 20, 39]), networks.null_conditions(network)
    encode = functools.partial(network.apply, params, z=z, method="encode_conditions")
    plain = denoiser(network, params["params"], chain)

    @jax.jit
    def both():
        one = {name: jnp.full_like(value[0], null[name]) for name, value in cond.items()}
        encoded_null = jax.tree.map(lambda a: a[0], encode(jax.tree.map(lambda a: a[None], one)))
        raw = guidance.classifier_free(3.0, null)(plain)(z, step, **cond)
        encoded = guidance.classifier_free(3.0, encoded_null)(plain)(z, step, **encode(cond))
        return raw.x, encoded.x

    np.testing.assert_allclose(*both(), rtol=1e-4, atol=1e-5)


def test_prior_options_change_what_they_say():
    """remat keeps the values, bfloat16 is near them."""
    _, params, apply = prior_case("karlo")
    z, cond = normal(0, 3, D), captions("karlo")
    want = apply(params, z, CLOCK, cond)
    np.testing.assert_allclose(
        jax.jit(prior_of("karlo", remat="blocks").apply)(params, z, CLOCK, cond), want, rtol=1e-5, atol=1e-5
    )
    half = jax.jit(prior_of("karlo", dtype="bfloat16").apply)(params, z, CLOCK, cond)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.abs(half - want).max() / np.abs(want).max() < 0.05


@pytest.mark.parametrize(
    "net, shape, takes, match",
    [
        (dict(heads=3), (6,), LAYOUTS["karlo"], "net.heads 3 does not divide net.width 16"),
        ({}, (8, 8, 3), LAYOUTS["karlo"], r"a prior makes a vector; shape is \(8, 8, 3\)"),
        ({}, (6,), (), "a prior needs something to be told"),
        ({}, (6,), ("label",), "condition 'label' is unknown; use one of 'text', 'text_features', 'text_embedding'"),
        (dict(dtype="float16"), (6,), LAYOUTS["karlo"], "net.dtype 'float16' is unknown"),
        (dict(remat="all"), (6,), LAYOUTS["karlo"], "net.remat 'all' is unknown"),
        (dict(clip=dict(depth=1)), (6,), LAYOUTS["karlo"], "net.clip option 'depth' is unknown"),
        (dict(low_res_resize="nearest"), (6,), LAYOUTS["karlo"], "net.low_res_resize 'nearest' is unknown"),
        (dict(spam=1), (6,), LAYOUTS["karlo"], "net option 'spam' is unknown"),
    ],
)
def test_bad_options(net, shape, takes, match):
    with pytest.raises(ValueError, match=match):
        networks.build(SMALL | net, shape=shape, takes=takes, out_channels=6)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("text_embedding", jnp.zeros((3, 7)), r"'text_embedding' is \(3, 7\), not \(B, 6\); use the CLIP that"),
        ("text_features", jnp.zeros((3, 4, 6)), r"'text_features' is \(3, 4, 6\), not \(B, 4, 5\)"),
        ("text", jnp.zeros((3, 5), int), r"'text' is \(3, 5\), not \(B, 4\); cut captions or pad them"),
    ],
)
def test_bad_conditions(name, value, match):
    layout = "paper" if name == "text" else "karlo"
    network, params, _ = prior_case(layout)
    with pytest.raises(ValueError, match=match):
        network.apply(params, normal(0, 3, D), CLOCK, captions(layout) | {name: value})


# ---- the decoder and the upsamplers ---------------------------------------------------------------------------------

UNET = dict(
    channels=16, groups=8, channel_mult=(1, 2), num_res_blocks=1, attention=(2,), clip=CLIP | dict(sequence_width=8)
)
SHAPE = (8, 8, 3)
READS = ("image_embedding", "text_embedding", "text_features")


@functools.cache
def decoder_case():
    network = networks.build(UNET, shape=SHAPE, takes=READS, out_channels=6)
    return network, drawn(network, *networks.example_inputs(network, SHAPE)), jax.jit(network.apply)


def decoder_inputs():
    return normal(5, 3, *SHAPE), captions("karlo") | {"image_embedding": normal(6, 3, D)}


def test_the_decoder_reads_the_image_embedding_in_two_places():
    _, params, apply = decoder_case()
    z, cond = decoder_inputs()
    other = cond | {"image_embedding": cond["image_embedding"][::-1]}
    own = params["params"]["image_embedding"]

    def without(*layers):
        dead = {name: jax.tree.map(jnp.zeros_like, own[name]) for name in layers}
        return {"params": params["params"] | {"image_embedding": own | dead}}

    def difference(params):
        return np.abs(apply(params, z, CLOCK, cond)[0] - apply(params, z, CLOCK, other)[0]).max()

    assert difference(params) > 1e-2
    assert difference(without("vector")) > 1e-3
    assert difference(without("tokens")) > 1e-2
    assert difference(without("vector", "tokens")) == 0


def test_the_decoder_reads_the_text_in_two_places_and_no_padding():
    _, params, apply = decoder_case()
    z, cond = decoder_inputs()
    want = apply(params, z, CLOCK, cond)
    embedded = apply(params, z, CLOCK, cond | {"text_embedding": cond["text_embedding"] + 1})
    assert np.abs(embedded - want).max() > 1e-2
    features = cond["text_features"]
    for place in range(4):
        got = apply(params, z, CLOCK, cond | {"text_features": features.at[:, place].add(1)})
        changed = np.abs(got - want).max((1, 2, 3))
        for example, length in enumerate((4, 3, 1)):
            assert (changed[example] > 1e-4) if place < length else (changed[example] == 0)


def test_a_withheld_image_embedding_is_the_learned_one():
    network, params, apply = decoder_case()
    z, cond = decoder_inputs()
    assert {name for name, null in networks.null_conditions(network).items() if math.isnan(null)} == set(READS)
    learned = params["params"]["image_embedding"]["null"]
    assert np.abs(learned).min() > 0
    gone = cond["image_embedding"].at[1].set(jnp.nan)
    want = apply(params, z, CLOCK, cond | {"image_embedding": cond["image_embedding"].at[1].set(learned)})
    np.testing.assert_array_equal(apply(params, z, CLOCK, cond | {"image_embedding": gone}), want)
    assert np.isfinite(apply(params, z, CLOCK, withheld(network, cond))).all()


def test_a_mask_hides_what_a_shorter_sequence_does_not_have():
    """The attention of a U-Net by itself: key 0 and 2 of a sequence, or those alone."""
    block = networks.layers.AttentionBlock(networks.layers.Style(groups=4), heads=2)
    x, sequence = normal(7, 2, 4, 4, 8), normal(8, 2, 3, 5)
    params, apply = drawn(block, x, sequence), jax.jit(block.apply)
    mask = jnp.array([[True, False, True], [False, False, False]])
    got = apply(params, x, sequence, mask)
    np.testing.assert_allclose(got[0], apply(params, x, sequence[:, ::2])[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], apply(params, x, sequence[:, :0])[1], rtol=1e-5, atol=1e-5)
    assert (np.abs(got - apply(params, x, sequence)).max((1, 2, 3)) > 1e-3).all()


def test_masks_of_several_sequences_are_joined():
    whole = networks.Context(sequence=jnp.zeros((2, 3, 4)))
    masked = networks.Context(sequence=jnp.ones((2, 2, 4)), mask=jnp.array([[True, False], [True, True]]))
    joined = networks.merge([whole, networks.Context(vector=jnp.ones((2, 1))), masked])
    np.testing.assert_array_equal(joined.mask, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert networks.merge([whole, whole]).mask is None


def keys_kernel(x):
    """Keys' cubic convolution kernel with a = -1/2, float64."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def test_bicubic_against_float64():
    small, size = 5, 20
    place = (np.arange(size) + 0.5) * small / size - 0.5
    weights = keys_kernel(place[:, None] - np.arange(small))
    weights /= weights.sum(1, keepdims=True)
    picture = np.asarray(normal(9, 1, small, small, 3), np.float64)
    want = np.einsum("yi,xj,bijc->byxc", weights, weights, picture)
    low_res = networks.LowRes("bicubic").apply({}, jnp.asarray(picture, jnp.float32), jnp.zeros((1, size, size, 3)))
    np.testing.assert_allclose(low_res.planes, want, atol=2e-6)
    bilinear = networks.LowRes().apply({}, jnp.asarray(picture, jnp.float32), jnp.zeros((1, size, size, 3)))
    assert np.abs(bilinear.planes - want).max() > 0.05


# ---- the autoregressive prior ---------------------------------------------------------------------------------------

N, K, BUCKETS = 7, 11, 8
CODES = dict(name="code_prior", width=16, layers=2, heads=2, clip=CLIP,
             text=CAPTION | dict(width=12, layers=1, heads=2))  # fmt: skip


@functools.cache
def code_case():
    """(network, parameters, conditions, function of (codes, conditions), its context, that with all withheld).

    It reads captions twice, as its own tokens and as CLIP's features, whose padding is masked.
    """
    takes = ("text", "text_features", "text_embedding", "similarity")
    network = networks.build(CODES, shape=(N,), takes=takes, num_classes=BUCKETS, out_channels=K)
    params = drawn(network, *networks.example_inputs(network, (N,)))["params"]
    cond = captions("karlo") | captions("paper") | {"similarity": jnp.array([7, 5, 0])}

    @jax.jit
    def encode(cond):
        contexts = network.apply({"params": params}, cond, jnp.zeros((3, N)), method="encode_conditions")
        return networks.merge([contexts[name] for name in takes])

    apply = jax.jit(lambda codes, cond: network.apply({"params": params}, codes, None, cond))
    return network, params["code_prior"], cond, apply, encode(cond), encode(withheld(network, cond))


def rows(seed=0):
    return jax.random.randint(jax.random.key(seed), (3, N), 0, K)


def test_a_code_depends_on_those_before_it():
    *_, cond, apply, _, _ = code_case()
    codes_ = rows()
    want = apply(codes_, cond)
    assert (want.shape, want.dtype) == ((3, N, K), jnp.float32)
    for place in range(N):
        got = apply(codes_.at[0, place].add(1) % K, cond)
        np.testing.assert_allclose(got[0, : place + 1], want[0, : place + 1], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got[1:], want[1:])
        if place < N - 1:
            assert (np.abs(got[0, place + 1 :] - want[0, place + 1 :]).max(-1) > 1e-3).all()


def test_the_code_prior_reads_all_that_it_is_told():
    network, _, cond, apply, _, _ = code_case()
    want = apply(rows(), cond)
    assert networks.null_conditions(network)["similarity"] == BUCKETS
    for name, null in withheld(network, cond).items():
        got = apply(rows(), cond | {name: null})
        assert np.isfinite(got).all() and np.abs(got - want).max() > 1e-2, name


def test_cached_logits_are_those_of_the_whole_row():
    network, params, cond, apply, context, _ = code_case()
    prior, codes_ = network.unet, rows(1)

    @jax.jit
    def walk():
        first, state = prior.apply({"params": params}, jnp.zeros_like(codes_), None, context, mutable=["cache"])

        def step(state, n):
            got, state = prior.apply({"params": params, **state}, codes_, None, context, at=n, mutable=["cache"])
            return state, got[:, 0]

        return jnp.concatenate([first[:, :1].swapaxes(0, 1), jax.lax.scan(step, state, jnp.arange(1, N))[1]])

    np.testing.assert_allclose(walk().swapaxes(0, 1), apply(codes_, cond), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_sampled_codes_are_those_of_the_uncached_network(temperature):
    network, params, cond, apply, context, without = code_case()
    keys = jax.random.split(jax.random.key(3), 3)

    @jax.jit
    def run(scale):
        sample = functools.partial(networks.sample_codes, network.unet, params, temperature=temperature)
        # of the first row by itself and unguided, too
        alone = sample(jax.tree.map(lambda a: a[:1], context), keys[:1])
        return sample(context, keys, withheld=without, scale=scale), alone

    scale = jnp.array([1.0, 20.0, -10.0])
    got, alone = run(scale)
    assert (got.shape, got.dtype) == ((3, N), jnp.int32)
    given, bare = apply(got, cond), apply(got, withheld(network, cond))
    logits = bare + scale[:, None, None] * (given - bare)
    if temperature:
        draw = jax.vmap(lambda key, n, row: jax.random.categorical(jax.random.fold_in(key, n), row), (None, 0, 0))
        want = jax.vmap(draw, (0, None, 0))(keys, jnp.arange(N), logits / temperature)
    else:
        want = logits.argmax(-1)
    np.testing.assert_array_equal(got, want)
    assert (run(jnp.ones(3))[0][1:] != got[1:]).any()
    np.testing.assert_array_equal(alone, got[:1])  # scale 1 is the conditional model, row i knows of no other


# ---- codes of embeddings --------------------------------------------------------------------------------------------


def embeddings(count=3000, size=10, seed=0):
    """Of unit length, their spectrum falling."""
    rng = np.random.default_rng(seed)
    e = rng.standard_normal((count, size)) * 0.7 ** np.arange(size) @ np.linalg.qr(rng.standard_normal((size, size)))[0]
    e += 0.3
    return e / np.linalg.norm(e, axis=1, keepdims=True)


def test_components_lose_the_variance_of_those_left_out():
    e = embeddings()
    variances = np.linalg.eigvalsh(np.cov(e.T, bias=True))[::-1]
    for count in (1, 4, 10):
        components = codes.fit_components(e, count)
        coordinates = np.asarray(codes.project(e.astype(np.float32), components), np.float64)
        np.testing.assert_allclose(coordinates.var(0), variances[:count], rtol=1e-4)
        np.testing.assert_allclose(components.directions.T @ components.directions, np.eye(count), atol=1e-6)
        lost = np.mean(np.sum((np.asarray(codes.reconstruct(coordinates, components)) - e) ** 2, 1))
        np.testing.assert_allclose(lost, variances[count:].sum(), rtol=1e-3, atol=1e-10)
    few = codes.reconstruct(coordinates[:, :4], components)
    np.testing.assert_allclose(few, codes.reconstruct(coordinates[:, :4], codes.fit_components(e, 4)), atol=1e-6)
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"embeddings of size 10 have no {count} components"):
            codes.fit_components(e, count)


def test_buckets_hold_equally_many_and_centres_are_their_own():
    values = np.random.default_rng(1).standard_normal((3001, 4)) ** 3
    buckets = codes.fit_buckets(values, 16)
    found = np.asarray(jax.jit(codes.encode)(jnp.asarray(values, jnp.float32), buckets))
    assert found.dtype == np.int32
    for column in found.T:
        counts = np.bincount(column, minlength=16)
        assert counts.size == 16 and counts.min() >= 187 and counts.max() <= 188
    every = np.broadcast_to(np.arange(16)[:, None], (16, 4))
    np.testing.assert_array_equal(codes.encode(codes.decode(every, buckets), buckets), every)
    for column, code in ((0, 3), (2, 15)):
        mean = values[found[:, column] == code, column].mean()
        np.testing.assert_allclose(codes.decode(every, buckets)[code, column], mean, rtol=1e-5)
    # a value on an edge belongs above, values outside of the range to the outermost
    np.testing.assert_array_equal(codes.encode(buckets.edges[:, 4], buckets), np.full(4, 5))
    np.testing.assert_array_equal(codes.encode(np.full(4, 1e9, np.float32), buckets), np.full(4, 15))
    np.testing.assert_array_equal(codes.encode(np.full((2, 4), -1e9, np.float32), buckets), np.zeros((2, 4)))
    assert np.isnan(codes.decode(np.full(4, 16), buckets)).all()
    with pytest.raises(ValueError, match="15 values are too few for 16 buckets"):
        codes.fit_buckets(values[:15], 16)


def test_the_error_of_codes_falls_with_their_number():
    e = embeddings().astype(np.float32)
    components = codes.fit_components(e, 10)
    coordinates = codes.project(e, components)
    errors = []
    for count in (4, 16, 64, 256):
        buckets = codes.fit_buckets(coordinates, count)
        back = codes.reconstruct(codes.decode(codes.encode(coordinates, buckets), buckets), components)
        errors.append(float(np.mean(np.sum((back - e) ** 2, 1)) / np.sum(e.var(0))))
    assert all(after < before / 3 for before, after in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 2e-3


def test_scale():
    e = embeddings()
    scale = codes.fit_scale(e)
    x = codes.scaled(e, scale)
    np.testing.assert_allclose(x.mean(0), np.zeros(10), atol=1e-6)
    np.testing.assert_allclose(x.std(0), np.ones(10), rtol=1e-6)
    np.testing.assert_allclose(codes.unscaled(x, scale), e, rtol=1e-6)
    with pytest.raises(ValueError, match="1 of 2 dimensions are constant"):
        codes.fit_scale(np.array([[0.0, 1.0], [0.0, 2.0]]))


# ---- the paper's sizes (DALL-E 2, table 3) --------------------------------------------------------------------------

BIG = dict(
    text=dict(width=2048, layers=24, heads=32, length=256),
    clip=dict(size=1024, width=1024, length=256),
)
DOWN = dict(num_res_blocks=3, channel_mult=(1, 2, 3, 4), resample="biggan")
NO_ATTENTION = dict(attention=(), mid_attention=False, resample="biggan")
TOKENS = 50257 * 2048  # of GPT-2's vocabulary
BLOCKS = 24 * (12 * 2048**2 + 13 * 2048)  # of a text encoder


def size_of(net, shape, takes, out_channels, num_classes=0):
    """{part of the network: number of its parameters}, without making any."""
    network = networks.build(net, shape=shape, takes=takes, out_channels=out_channels, num_classes=num_classes)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *networks.example_inputs(network, shape))["params"]
    return {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}


def test_priors_of_the_papers_size():
    net = BIG | dict(name="prior", width=2048, layers=24, heads=32)
    features = size_of(net, (1024,), ("text_features", "text_embedding"), 1024)
    assert sum(features.values()) == 1_225_925_632  # karlo's code at this size
    tokens = size_of(net, (1024,), ("text", "text_embedding"), 1024)
    assert tokens == {"prior": features["prior"], "text_embedding": 1025 * 2048, "text": TOKENS}
    net = BIG | dict(name="code_prior", width=1664, layers=24, heads=26)
    takes = ("text", "text_embedding", "similarity")
    codes_ = size_of(net, (319,), takes, 1024, num_classes=1024)
    decoder_blocks = 24 * (12 * 1664**2 + 13 * 1664)
    assert decoder_blocks == 797_961_216 and BLOCKS == 1_208_598_528
    reading_the_text = 24 * 2049 * 2 * 1664
    rest = (319 + 1025 + 2) * 1664 + 1665 * 1024  # positions, codes and the start, the last norm; logits
    assert codes_["code_prior"] == decoder_blocks + reading_the_text + rest
    assert codes_["similarity"] == 1025 * 2048


def test_decoder_of_the_papers_size():
    net = BIG | DOWN | dict(channels=512, attention=(2, 4, 8), head_channels=64, scale_shift=True)
    got = size_of(net, (64, 64, 3), ("text", "image_embedding"), 6)
    assert got["unet"] == 2_238_164_486
    assert got["unet"] + got["text"] == 3_554_938_374  # GLIDE's code at this size
    assert got["image_embedding"] == 1024 + 1025 * 2048 + 1025 * 4 * 2048  # the null, into the clock, four tokens


@pytest.mark.parametrize(
    "net, want",
    [
        (DOWN | dict(channels=320), 691_579_523),
        (dict(channels=192, num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4)), 267_146_691),
    ],
)
def test_upsamplers_of_the_papers_size(net, want):
    """700M and 300M; the size of the pictures does not matter."""
    assert size_of(NO_ATTENTION | net, (64, 64, 3), ("low_res",), 3) == {"unet": want}
