"""Embeddings as the priors of DALL-E 2 meet them: scaled, in principal components, as codes.

Ramesh et al. 2022, section 2.2. What is fitted is fitted on the host in float64 and cast once; what is applied to
embeddings are pure functions of arrays, to be traced.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


# ---- scale ---------------------------------------------------------------------------------------------------------


class Scale(NamedTuple):
    """Mean and standard deviation of embeddings, [D] or scalars: the diffusion prior works on (e - mean) / std.

    DALL-E 2 multiplies by 17.2, which is `Scale(0, 1 / 17.2)`; karlo's statistics differ by dimension.
    """

    mean: Array | float
    std: Array | float


def fit_scale(embeddings: np.ndarray) -> Scale:
    """The statistics of embeddings [M, D], each of their dimensions on its own.

    Raises:
      ValueError: a dimension is constant.
    """
    embeddings = np.asarray(embeddings, np.float64)
    mean, std = embeddings.mean(0), embeddings.std(0)
    if not (std > 0).all():
        raise ValueError(f"{int((std == 0).sum())} of {len(std)} dimensions are constant; give more embeddings")
    return Scale(mean.astype(np.float32), std.astype(np.float32))


def scaled(embeddings: Array, scale: Scale) -> Array:
    """Embeddings [..., D] as the diffusion prior makes them."""
    return (embeddings - scale.mean) / scale.std


def unscaled(x: Array, scale: Scale) -> Array:
    """The inverse of `scaled`."""
    return x * scale.std + scale.mean


# ---- principal components ------------------------------------------------------------------------------------------


class Components(NamedTuple):
    """The first P principal components of embeddings, by decreasing variance.

    Attributes:
      mean: [D].
      directions: [D, P], of unit length and at right angles.
    """

    mean: Array
    directions: Array


def fit_components(embeddings: np.ndarray, count: int) -> Components:
    """Principal components of embeddings [M, D]; DALL-E 2 keeps 319 of 1,024.

    Raises:
      ValueError: there are not as many.
    """
    embeddings = np.asarray(embeddings, np.float64)
    if not 1 <= count <= min(embeddings.shape):
        raise ValueError(f"{embeddings.shape[0]} embeddings of size {embeddings.shape[1]} have no {count} components")
    mean = embeddings.mean(0)
    _, directions = np.linalg.eigh((embeddings - mean).T @ (embeddings - mean))  # by increasing variance
    return Components(mean.astype(np.float32), directions[:, ::-1][:, :count].astype(np.float32))


def project(embeddings: Array, components: Components) -> Array:
    """Coordinates [..., P] of embeddings [..., D]."""
    # the TPU's default product is bfloat16, which has fewer digits than there are buckets
    return jnp.matmul(embeddings - components.mean, components.directions, precision="highest")


def reconstruct(coordinates: Array, components: Components) -> Array:
    """The embeddings [..., D] with coordinates [..., k] in the first k components, k up to P."""
    kept = coordinates.shape[-1]
    return components.mean + jnp.matmul(coordinates, components.directions[:, :kept].T, precision="highest")


# ---- codes ---------------------------------------------------------------------------------------------------------


class Buckets(NamedTuple):
    """A division of the values of P numbers, each on its own, into K buckets.

    Attributes:
      edges: [P, K - 1], not decreasing; a value on an edge belongs to the bucket above it.
      centres: [P, K], what stands for a bucket.
    """

    edges: Array
    centres: Array


def fit_buckets(values: np.ndarray, count: int) -> Buckets:
    """Buckets of values [M, P] that hold equally many of them, each with their mean as its centre.

    The paper has 1,024 of them for a coordinate, and does not say where they lie.

    Raises:
      ValueError: fewer values than buckets.
    """
    values = np.sort(np.asarray(values, np.float64), axis=0)
    if values.shape[0] < count:
        raise ValueError(f"{values.shape[0]} values are too few for {count} buckets; give more embeddings")
    starts = np.arange(count + 1) * len(values) // count
    edges = (values[starts[1:-1] - 1] + values[starts[1:-1]]) / 2
    centres = np.add.reduceat(values, starts[:-1], axis=0) / np.diff(starts)[:, None]
    return Buckets(edges.T.astype(np.float32), centres.T.astype(np.float32))


def encode(values: Array, buckets: Buckets) -> jax.Array:
    """The buckets of values [..., P]: int32, 0 .. K - 1."""
    flat = jnp.reshape(values, (-1, buckets.edges.shape[0]))
    above = jax.vmap(lambda edges, column: jnp.searchsorted(edges, column, side="right"), (0, 1), 1)
    return above(jnp.asarray(buckets.edges), flat).reshape(values.shape).astype(jnp.int32)


def decode(codes: Array, buckets: Buckets) -> jax.Array:
    """The centres of codes [..., P], float32; a code out of range gives NaN."""
    place = jnp.arange(buckets.centres.shape[0])
    return jnp.asarray(buckets.centres).at[place, codes].get(mode="fill", fill_value=jnp.nan)


# ---- embeddings as rows of codes -----------------------------------------------------------------------------------


class Codec(NamedTuple):
    """How the autoregressive prior writes an embedding: a code for each of its first P principal components.

    Attributes:
      mean, directions: see `Components`.
      edges, centres: see `Buckets`.
      similarity_edges: [S - 1], between the buckets of a caption's and a picture's product, at quantiles.
    """

    mean: Array
    directions: Array
    edges: Array
    centres: Array
    similarity_edges: Array


def blank_codec(size: int, components: int, buckets: int) -> Codec:
    """A codec of embeddings [size] that nothing is known of yet: zeros."""
    shapes = (size,), (size, components), (components, buckets - 1), (components, buckets), (buckets - 1,)
    return Codec(*(np.zeros(shape, np.float32) for shape in shapes))


def fit_codec(embeddings: np.ndarray, similarities: np.ndarray, *, components: int, buckets: int) -> Codec:
    """The codec of embeddings [M, D] whose products with their captions' are `similarities` [M].

    Raises:
      ValueError: there are too few.
    """
    found = fit_components(embeddings, components)
    values = fit_buckets(project(embeddings, found), buckets)
    products = fit_buckets(np.asarray(similarities)[:, None], buckets)
    return Codec(*found, *values, products.edges[0])


def write(embeddings: Array, codec: Codec) -> jax.Array:
    """Embeddings [..., D] as codes [..., P], int32."""
    return encode(project(embeddings, Components(codec.mean, codec.directions)), Buckets(codec.edges, codec.centres))


def read(codes: Array, codec: Codec) -> jax.Array:
    """The embeddings [..., D] that codes [..., P] stand for."""
    return reconstruct(decode(codes, Buckets(codec.edges, codec.centres)), Components(codec.mean, codec.directions))


def similarity_bucket(image: Array, text: Array, codec: Codec) -> jax.Array:
    """The bucket, 0 .. S - 1, of the products of embeddings [..., D], as the paper's token for z_i . z_t."""
    product = jnp.sum(image * text, axis=-1)
    return jnp.searchsorted(jnp.asarray(codec.similarity_edges), product, side="right").astype(jnp.int32)
