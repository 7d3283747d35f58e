"""The networks of unCLIP: priors of embeddings and of codes, and decoders that read a CLIP's embeddings."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffax import components
from diffax.conditions.embedding import ImageEmbedding, TextEmbedding, TextFeatures
from diffax.conditions.low_res import LowRes, LowResEncoder
from diffax.conditions.text import Text, Tokens
from diffax.conditions.tokenizers import LazyTokenizer
from diffax.models.code_prior import Similarity
from diffax.networks.conditioned import Conditioned
from diffax.networks.context import Context, merge
from diffax.networks.layers import AttentionBlock, Style
from diffax.networks.prior import sample_codes
from tests.networks.common import drawn

D, LENGTH, VOCABULARY = 6, 4, 9
TOKENIZER = LazyTokenizer("demo", "", LENGTH)
CLIP = types.SimpleNamespace(name="clip", features=D, text_width=5, tokenizer=TOKENIZER, shape=(8, 8, 3))
SMALL = dict(name="prior", width=16, layers=2, heads=2)
TIME = jnp.array([3.0, 500.0, 999.0])


def build(net, *conditions, shape, out_channels):
    """A network with conditions, built as a config builds it."""
    network = components.build(net, "network", path="config.base.net", out_channels=out_channels, **{"name": "net"})
    network.check(shape)
    return Conditioned(network, tuple((c.name, c.encoder(network)) for c in conditions))


def inputs_of(conditions, n):
    """n zeros of each condition's input."""
    zeros = {c.name: jax.tree.map(lambda a: jnp.zeros((n, *a.shape), a.dtype), c.example()) for c in conditions}
    return zeros


def nulls(conditions, n=3):
    """n null values of each condition."""
    found = {c.name: c.null({}) for c in conditions}
    return jax.tree.map(lambda a: jnp.broadcast_to(jnp.asarray(a), (n, *np.shape(a))), found)


EMBEDDING = TextEmbedding(name="text_embedding", clip=CLIP, enters="token")
LAYOUTS = {
    "karlo": (TextFeatures(name="text_features", clip=CLIP), EMBEDDING),
    "paper": (Tokens(name="text", tokenizer=TOKENIZER), EMBEDDING),
}


def prior_of(layout, **net):
    return build(SMALL | net, *LAYOUTS[layout], shape=(D,), out_channels=D)


@functools.cache
def prior_case(layout):
    network = prior_of(layout)
    params = drawn(network, jnp.zeros((1, D)), jnp.zeros(1), inputs_of(LAYOUTS[layout], 1))
    return network, params, jax.jit(network.apply)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def captions(layout):
    """Conditions of three captions, the last of one token."""
    there = jnp.arange(LENGTH) < jnp.array([[4], [3], [1]])
    if layout == "karlo":
        caption = {"text_features": {"features": normal(1, 3, LENGTH, 5), "mask": there}}
    else:
        caption = {"text": jnp.where(there, jnp.arange(12).reshape(3, 4) % VOCABULARY, -1)}
    return caption | {"text_embedding": normal(2, 3, D)}


def changed(caption, place, by=1):
    """The captions' input, with another value at a place of every example."""
    if isinstance(caption, dict):
        return {**caption, "features": caption["features"].at[:, place].add(by)}
    return caption.at[:, place].add(by)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_prior_reads_all_that_there_is(layout):
    _, params, apply = prior_case(layout)
    z, cond = normal(0, 3, D), captions(layout)
    want = apply(params, z, TIME, cond)
    assert (want.shape, want.dtype) == ((3, D), jnp.float32)
    first = jnp.array([1.0, 0, 0])[:, None]
    name = LAYOUTS[layout][0].name
    other = jax.tree.map(lambda a, b: b.at[0].set(a[0]), changed(cond[name], 1), cond[name])
    for got in (
        apply(params, z + first, TIME, cond),
        apply(params, z, TIME + first[:, 0], cond),
        apply(params, z, TIME, cond | {"text_embedding": cond["text_embedding"] + first}),
        apply(params, z, TIME, cond | {name: other}),
    ):
        assert np.abs(got[0] - want[0]).max() > 1e-3
        np.testing.assert_array_equal(got[1:], want[1:])  # an example is read on its own


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prior_whose_conditions_are_dropped_reads_z_alone(layout):
    _, params, apply = prior_case(layout)
    z, cond, null = normal(0, 3, D), captions(layout), nulls(LAYOUTS[layout])
    alone = apply(params, z, TIME, null)
    assert np.isfinite(alone).all()
    assert np.abs(alone - apply(params, z, TIME, cond)).max() > 1e-2
    assert np.abs(alone - apply(params, z + 1, TIME, null)).max() > 1e-2
    for name in null:  # one condition at a time
        assert np.isfinite(apply(params, z, TIME, cond | {name: null[name]})).all()


def test_padding_has_no_slope():
    network, params, _ = prior_case("karlo")
    z, cond = normal(0, 3, D), captions("karlo")
    mask = cond["text_features"]["mask"]

    def total(features):
        text = {"text_features": {"features": features, "mask": mask}}
        return jnp.sum(network.apply(params, z, TIME, cond | text) ** 2)

    slope = jax.jit(jax.grad(total))(cond["text_features"]["features"])
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(jnp.abs(slope).max(-1) > 0, mask)


def test_options_of_a_prior_keep_or_approach_its_values():
    """remat keeps the values, bfloat16 is near them."""
    _, params, apply = prior_case("karlo")
    z, cond = normal(0, 3, D), captions("karlo")
    want = apply(params, z, TIME, cond)
    again = jax.jit(prior_of("karlo", remat="blocks").apply)(params, z, TIME, cond)
    np.testing.assert_allclose(again, want, rtol=1e-5, atol=1e-5)
    half = jax.jit(prior_of("karlo", dtype="bfloat16").apply)(params, z, TIME, cond)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.abs(half - want).max() / np.abs(want).max() < 0.05


@pytest.mark.parametrize(
    "net, shape, match",
    [
        (dict(heads=3), (6,), "heads must divide width, 16, got 3"),
        ({}, (8, 8, 3), r"a prior makes a vector; shape is \(8, 8, 3\)"),
        (dict(dtype="float16"), (6,), "config.base.net.dtype"),
        (dict(remat="all"), (6,), "config.base.net.remat"),
    ],
)
def test_bad_options(net, shape, match):
    with pytest.raises(ValueError, match=match):
        build(SMALL | net, *LAYOUTS["karlo"], shape=shape, out_channels=6)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("text_embedding", jnp.zeros((3, 7)), r"'text_embedding' is \(3, 7\), not \(B, 6\); use the CLIP that"),
        ("text_features", {"features": jnp.zeros((3, 4, 6)), "mask": jnp.ones((3, 4), bool)}, r"not \(B, 4, 5\)"),
        ("text", jnp.zeros((3, 5), int), r"'text' is \(3, 5\), not \(B, 4\); cut captions or pad them"),
    ],
)
def test_bad_conditions(name, value, match):
    layout = "paper" if name == "text" else "karlo"
    network, params, _ = prior_case(layout)
    with pytest.raises(ValueError, match=match):
        network.apply(params, normal(0, 3, D), TIME, captions(layout) | {name: value})


# ---- the decoder and the upsamplers ---------------------------------------------------------------------------------

UNET = dict(name="unet", channels=16, groups=8, channel_mult=(1, 2), num_res_blocks=1, attention=(2,))
SHAPE = (8, 8, 3)
READS = (
    ImageEmbedding(name="image_embedding", clip=CLIP, tokens=4, width=8),
    TextEmbedding(name="text_embedding", clip=CLIP),
    TextFeatures(name="text_features", clip=CLIP, width=8),
)


@functools.cache
def decoder_case():
    network = build(UNET, *READS, shape=SHAPE, out_channels=6)
    params = drawn(network, jnp.zeros((1, *SHAPE)), jnp.zeros(1), inputs_of(READS, 1))
    return network, params, jax.jit(network.apply)


def decoder_inputs():
    image = {"embedding": normal(6, 3, D), "present": jnp.ones(3, bool)}
    return normal(5, 3, *SHAPE), captions("karlo") | {"image_embedding": image}


def test_the_decoder_reads_the_image_embedding_in_two_places():
    _, params, apply = decoder_case()
    z, cond = decoder_inputs()
    other = cond | {"image_embedding": jax.tree.map(lambda a: a[::-1], cond["image_embedding"])}
    own = params["params"]["image_embedding"]

    def without(*layers):
        dead = {name: jax.tree.map(jnp.zeros_like, own[name]) for name in layers}
        return {"params": params["params"] | {"image_embedding": own | dead}}

    def difference(params):
        return np.abs(apply(params, z, TIME, cond)[0] - apply(params, z, TIME, other)[0]).max()

    assert difference(params) > 1e-2
    assert difference(without("vector")) > 1e-3
    assert difference(without("tokens")) > 1e-2
    assert difference(without("vector", "tokens")) == 0


def test_the_decoder_reads_the_text_in_two_places_and_no_padding():
    _, params, apply = decoder_case()
    z, cond = decoder_inputs()
    want = apply(params, z, TIME, cond)
    embedded = apply(params, z, TIME, cond | {"text_embedding": cond["text_embedding"] + 1})
    assert np.abs(embedded - want).max() > 1e-2
    for place in range(LENGTH):
        got = apply(params, z, TIME, cond | {"text_features": changed(cond["text_features"], place)})
        difference = np.abs(got - want).max((1, 2, 3))
        for example, length in enumerate((4, 3, 1)):
            assert (difference[example] > 1e-4) if place < length else (difference[example] == 0)


def test_a_dropped_image_embedding_is_the_learned_one():
    _, params, apply = decoder_case()
    z, cond = decoder_inputs()
    learned = params["params"]["image_embedding"]["null"]
    assert np.abs(learned).min() > 0
    own = cond["image_embedding"]
    gone = {**own, "present": own["present"].at[1].set(False)}
    there = {**own, "embedding": own["embedding"].at[1].set(learned)}
    got, want = (apply(params, z, TIME, cond | {"image_embedding": e}) for e in (gone, there))
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(apply(params, z, TIME, nulls(READS))).all()


def test_a_mask_hides_what_a_shorter_sequence_does_not_have():
    """The attention of a U-Net by itself: key 0 and 2 of a sequence, or those alone."""
    block = AttentionBlock(Style(groups=4), heads=2)
    x, sequence = normal(7, 2, 4, 4, 8), normal(8, 2, 3, 5)
    params, apply = drawn(block, x, sequence), jax.jit(block.apply)
    mask = jnp.array([[True, False, True], [False, False, False]])
    got = apply(params, x, sequence, mask)
    np.testing.assert_allclose(got[0], apply(params, x, sequence[:, ::2])[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], apply(params, x, sequence[:, :0])[1], rtol=1e-5, atol=1e-5)
    assert (np.abs(got - apply(params, x, sequence)).max((1, 2, 3)) > 1e-3).all()


def test_masks_of_several_sequences_are_joined():
    whole = Context(sequence=jnp.zeros((2, 3, 4)))
    masked = Context(sequence=jnp.ones((2, 2, 4)), mask=jnp.array([[True, False], [True, True]]))
    joined = merge([whole, Context(vector=jnp.ones((2, 1))), masked])
    np.testing.assert_array_equal(joined.mask, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert merge([whole, whole]).mask is None


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
    image, z = {"image": jnp.asarray(picture, jnp.float32)}, jnp.zeros((1, size, size, 3))
    np.testing.assert_allclose(LowResEncoder("bicubic").apply({}, image, z).planes, want, atol=2e-6)
    assert np.abs(LowResEncoder().apply({}, image, z).planes - want).max() > 0.05


# ---- the autoregressive prior ---------------------------------------------------------------------------------------

N, K, BUCKETS = 7, 11, 8
CODE_CONDITIONS = (
    Text(name="text", tokenizer=TOKENIZER, width=12, layers=1, heads=2),
    TextFeatures(name="text_features", clip=CLIP, width=12),
    TextEmbedding(name="text_embedding", clip=CLIP, enters="token", width=12),
    Similarity(name="similarity", buckets=BUCKETS, width=12),
)


@functools.cache
def code_case():
    """(network, parameters, conditions, function of (codes, conditions), its context, that with all dropped).

    It reads captions twice, by a transformer of its own and as CLIP's features, whose padding is masked.
    """
    network = build(SMALL | dict(name="code_prior"), *CODE_CONDITIONS, shape=(N,), out_channels=K)
    params = drawn(network, jnp.zeros((1, N)), jnp.zeros(1), inputs_of(CODE_CONDITIONS, 1))["params"]
    cond = captions("karlo") | captions("paper") | {"similarity": jnp.array([7, 5, 0])}

    @jax.jit
    def encode(cond):
        contexts = network.apply({"params": params}, cond, jnp.zeros((3, N)), method="encode")
        return merge([contexts[condition.name] for condition in CODE_CONDITIONS])

    apply = jax.jit(lambda codes, cond: network.apply({"params": params}, codes, None, cond))
    return network.net, params["net"], cond, apply, encode(cond), encode(nulls(CODE_CONDITIONS))


def rows(seed=0):
    return jax.random.randint(jax.random.key(seed), (3, N), 0, K)


def test_a_code_depends_on_those_before_it():
    *_, cond, apply, _, _ = code_case()
    codes = rows()
    want = apply(codes, cond)
    assert (want.shape, want.dtype) == ((3, N, K), jnp.float32)
    for place in range(N):
        got = apply(codes.at[0, place].add(1) % K, cond)
        np.testing.assert_allclose(got[0, : place + 1], want[0, : place + 1], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got[1:], want[1:])
        if place < N - 1:
            assert (np.abs(got[0, place + 1 :] - want[0, place + 1 :]).max(-1) > 1e-3).all()


def test_the_code_prior_reads_all_that_there_is():
    _, _, cond, apply, _, _ = code_case()
    want, null = apply(rows(), cond), nulls(CODE_CONDITIONS)
    np.testing.assert_array_equal(null["similarity"], BUCKETS)
    for name in null:
        got = apply(rows(), cond | {name: null[name]})
        assert np.isfinite(got).all() and np.abs(got - want).max() > 1e-2, name


def test_cached_logits_are_those_of_the_whole_row():
    prior, params, cond, apply, context, _ = code_case()
    codes = rows(1)

    @jax.jit
    def walk():
        first, state = prior.apply({"params": params}, jnp.zeros_like(codes), None, context, mutable=["cache"])

        def step(state, n):
            got, state = prior.apply({"params": params, **state}, codes, None, context, at=n, mutable=["cache"])
            return state, got[:, 0]

        return jnp.concatenate([first[:, :1].swapaxes(0, 1), jax.lax.scan(step, state, jnp.arange(1, N))[1]])

    np.testing.assert_allclose(walk().swapaxes(0, 1), apply(codes, cond), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_sampled_codes_are_those_of_the_uncached_network(temperature):
    prior, params, cond, apply, context, without = code_case()
    keys = jax.random.split(jax.random.key(3), 3)

    @jax.jit
    def run(scale):
        sample = functools.partial(sample_codes, prior, params, temperature=temperature)
        # of the first row by itself and unguided, too
        alone = sample(jax.tree.map(lambda a: a[:1], context), keys[:1])
        return sample(context, keys, dropped=without, scale=scale), alone

    scale = jnp.array([1.0, 20.0, -10.0])
    got, alone = run(scale)
    assert (got.shape, got.dtype) == ((3, N), jnp.int32)
    given, bare = apply(got, cond), apply(got, nulls(CODE_CONDITIONS))
    logits = bare + scale[:, None, None] * (given - bare)
    if temperature:
        draw = jax.vmap(lambda key, n, row: jax.random.categorical(jax.random.fold_in(key, n), row), (None, 0, 0))
        want = jax.vmap(draw, (0, None, 0))(keys, jnp.arange(N), logits / temperature)
    else:
        want = logits.argmax(-1)
    np.testing.assert_array_equal(got, want)
    assert (run(jnp.ones(3))[0][1:] != got[1:]).any()
    np.testing.assert_array_equal(alone, got[:1])  # scale 1 is the conditional model, row i depends on no other


# ---- the paper's sizes (DALL-E 2, table 3) --------------------------------------------------------------------------

GLIDE = LazyTokenizer("glide", "", 256)
BIG_CLIP = types.SimpleNamespace(name="clip", features=1024, text_width=1024, tokenizer=GLIDE, shape=(64, 64, 3))
BIG_TEXT = Text(name="text", tokenizer=GLIDE, width=2048, layers=24, heads=32)
DOWN = dict(num_res_blocks=3, channel_mult=(1, 2, 3, 4), resample="biggan")
NO_ATTENTION = dict(attention=(), mid_attention=False, resample="biggan")
BLOCKS = 24 * (12 * 2048**2 + 13 * 2048)  # of a text encoder


def size_of(net, shape, conditions, out_channels):
    """{part of the network: number of its parameters}, without making any."""
    network = build(net, *conditions, shape=shape, out_channels=out_channels)
    shapes = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((1, *shape)), jnp.zeros(1), inputs_of(conditions, 1)
    )
    return {part: sum(math.prod(a.shape) for a in jax.tree.leaves(tree)) for part, tree in shapes["params"].items()}


def test_priors_of_the_papers_size():
    net = dict(name="prior", width=2048, layers=24, heads=32)
    embedding = TextEmbedding(name="text_embedding", clip=BIG_CLIP, enters="token")
    features = size_of(net, (1024,), (TextFeatures(name="text_features", clip=BIG_CLIP), embedding), 1024)
    assert sum(features.values()) == 1_225_925_632  # karlo's code at this size
    tokens = size_of(net, (1024,), (Tokens(name="text", tokenizer=GLIDE), embedding), 1024)
    vocabulary = GLIDE.vocab_size * 2048
    assert tokens == {"net": features["net"], "text_embedding": 1025 * 2048, "text": vocabulary}
    net = dict(name="code_prior", width=1664, layers=24, heads=26)
    embedding = TextEmbedding(name="text_embedding", clip=BIG_CLIP, enters="token", width=2048)
    reads = (BIG_TEXT, embedding, Similarity(name="similarity", buckets=1024, width=2048))
    codes = size_of(net, (319,), reads, 1024)
    decoder_blocks = 24 * (12 * 1664**2 + 13 * 1664)
    assert decoder_blocks == 797_961_216 and BLOCKS == 1_208_598_528
    reading_the_text = 24 * 2049 * 2 * 1664
    rest = (319 + 1025 + 2) * 1664 + 1665 * 1024  # positions, codes and the start, the last norm; logits
    assert codes["net"] == decoder_blocks + reading_the_text + rest
    assert codes["similarity"] == 1025 * 2048


def test_decoder_of_the_papers_size():
    net = dict(name="unet", channels=512, attention=(2, 4, 8), head_channels=64, scale_shift=True) | DOWN
    reads = (BIG_TEXT, ImageEmbedding(name="image_embedding", clip=BIG_CLIP, tokens=4, width=2048))
    got = size_of(net, (64, 64, 3), reads, 6)
    assert got["net"] == 2_238_164_486
    assert got["net"] + got["text"] == 3_554_938_374  # GLIDE's code at this size
    # the null, into the timestep embedding, four tokens
    assert got["image_embedding"] == 1024 + 1025 * 2048 + 1025 * 4 * 2048


@pytest.mark.parametrize(
    "net, want",
    [
        (DOWN | dict(channels=320), 691_579_523),
        (dict(channels=192, num_res_blocks=2, channel_mult=(1, 1, 2, 2, 4, 4)), 267_146_691),
    ],
)
def test_upsamplers_of_the_papers_size(net, want):
    """700M and 300M; the size of the pictures does not matter."""
    low_res = LowRes(name="low_res", factor=2, shape=(64, 64, 3))
    assert size_of(dict(name="unet") | NO_ATTENTION | net, (64, 64, 3), (low_res,), 3) == {"net": want}
