"""The CLIP of DALL-E 2 (Ramesh et al. 2022, arXiv:2204.06125, appendix C): a ViT-H/16 at 256 pixels.

Width 1280 and 32 blocks for pictures, 1024 and 24 for captions. Numbers of heads and the length of a caption are not
printed; these are 16, and CLIP's 77. 986,339,841 parameters. Batch and optimizer are CLIP's (Radford et al. 2021).

The paper trains with sharpness-aware minimisation, rho 0.1, each of 512 devices climbing by its own 64 pairs, which
doubles the cost: with it, few principal components describe an embedding, as the autoregressive prior needs.

Data: a folder of pictures with captions, data/captions below the current one, or --config.clip.data.path=FOLDER. The
      paper mixes two sets half and half, 650 million pairs together: --config.clip.data=mix.
Cost: work for a TPU pod.
Command: python -m diffax.main --config=configs/dalle2_clip.py
Then: configs/dalle2_prior.py, configs/dalle2_decoder_64.py
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded captioned shapes"}


def get_config(variant: str = ""):
    config = new("dalle2_clip", stages=("clip",), model="clip")
    clip = config.clip
    clip.shape = (256, 256, 3)
    clip.data = spec("data", "captions", path="data/captions")
    clip.embedding.norm = 17.2  # the paper's factor on embeddings of unit length
    clip.tokenizer = spec("tokenizer", "clip", length=77)
    clip.noised = False
    clip.net.update(features=1024, activation="quick_gelu", remat="blocks")
    clip.net.image.update(width=1280, layers=32, heads=16, patch=16)
    clip.net.text.update(width=1024, layers=24, heads=16)
    clip.train.update(
        num_train_steps=390_000, batch_size=32_768, learning_rate=3e-4, warmup_steps=2000, anneal="cosine"
    )
    clip.train.update(
        optimizer=spec("optimizer", "adamw", weight_decay=0.2, decay="kernels", b2=0.98, eps=1e-6),
        grad_clip=0.0,
        ema=(),
        sam=0.1,
    )
    config.eval.num = 0
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "captioned_shapes")
        clip.embedding.norm = 3.0  # the paper's size of a coordinate
        clip.net.update(features=32, remat="none")
        clip.net.image.update(width=64, layers=3, heads=4, patch=2)
        clip.train.update(num_train_steps=2000, batch_size=64, warmup_steps=100, grad_clip=1.0)
        config.eval.update(num=320, batch_size=64)
    return config
