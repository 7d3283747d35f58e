"""The noised classifier: the first half of the U-Net under a pooling head (Dhariwal & Nichol 2021, section 4)."""

from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffax.components import WIRED, component
from diffax.networks.layers import GroupNorm, SelfAttention, Style, choose, dense
from diffax.networks.unet import Encoder

Array = jax.Array


@component("network", "classifier")
class Classifier(Encoder):
    """p(y | z): the first half of the U-Net under a pooling head (Dhariwal & Nichol 2021, sec. 4).

    Attributes:
      num_classes: number of logits.
      pool: 'attention' (a token of the mean attends to all pixels, as in CLIP; binds the image
        size), 'adaptive' (mean over the pixels), 'spatial' or 'spatial_v2' (the means of all
        activations on the way down, into a hidden layer with ReLU or GroupNorm and SiLU, whose
        output is sown as 'features' into 'intermediates').
    """

    num_classes: Annotated[int, WIRED] = 1000
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"

    @nn.compact
    def __call__(self, z: Array, time: Array, *, dropout_keys: Array | None = None) -> Array:
        """z: [B, H, W, C], time: [B]. Returns logits [B, num_classes] float32."""
        h, skips = self.encode(z, self.embed_time(time), dropout_keys)
        head = self.style._replace(dtype="float32")
        pooled = choose(
            {
                "attention": self._attention,
                "adaptive": self._adaptive,
                "spatial": self._spatial,
                "spatial_v2": self._spatial,
            },
            self.pool,
            "pool",
        )
        return pooled(head, h, skips)

    def _attention(self, head: Style, h: Array, skips: list[Array]) -> Array:
        h = nn.silu(GroupNorm(head, name="norm_out")(h))
        tokens = h.reshape(h.shape[0], -1, h.shape[-1])
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], 1)
        width = tokens.shape[-1]
        position = self.param("position", nn.initializers.normal(width**-0.5), tokens.shape[1:])
        pool = SelfAttention(head, self.num_heads(width, self.heads), self.num_classes, name="attention")
        return pool(tokens + position)[:, 0]

    def _adaptive(self, head: Style, h: Array, skips: list[Array]) -> Array:
        h = nn.silu(GroupNorm(head, name="norm_out")(h)).mean((1, 2))
        return dense(head, self.num_classes, zero=True, name="logits")(h)

    def _spatial(self, head: Style, h: Array, skips: list[Array]) -> Array:
        means = [x.astype(jnp.float32).mean((1, 2)) for x in (*skips, h)]
        h = dense(head, 2048, name="hidden")(jnp.concatenate(means, -1))
        if self.pool == "spatial":
            h = nn.relu(h)
        else:
            h = nn.silu(GroupNorm(head, name="norm_hidden")(h))
        self.sow("intermediates", "features", h)
        return dense(head, self.num_classes, name="logits")(h)
