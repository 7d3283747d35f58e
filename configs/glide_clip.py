"""The noised CLIP that guides GLIDE (Nichol et al. 2021, arXiv:2112.10741, section 2.4), at the size that was released.

A ViT with patches of 4 pixels in whose first place stands an embedding of the noise level, and CLIP's text encoder:
86,443,776 and 71,679,488 parameters, the released clip_image_enc.pt and clip_text_enc.pt. Trained on pictures noised by
the base model's schedule. The paper trained a ViT-L for 390,000 steps of 32,768 pairs with weight decay 0.0125; the
rest is CLIP's (Radford et al. 2021).

Data: a folder of pictures with captions, data/captions below the current one, or --config.clip.data.path=FOLDER.
Cost: work for a TPU pod slice; with fewer pairs in a batch it learns less from each.
Command: python -m diffax.main --config=configs/glide_clip.py
It guides: configs/glide_base_64.py:clip
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded captioned shapes"}


def get_config(variant: str = ""):
    config = new("glide_clip", stages=("clip",), model="clip")
    clip = config.clip
    clip.shape = (64, 64, 3)
    clip.data = spec("data", "captions", path="data/captions")
    clip.tokenizer = spec("tokenizer", "clip", length=77)
    clip.net.update(features=512, activation="gelu", remat="blocks")
    clip.net.image.update(width=768, layers=12, heads=12, patch=4)
    clip.net.text.update(width=512, layers=12, heads=8, vocab_size=65_536)  # more than there are ids, as released
    clip.schedule = spec("schedule", "cosine", num_timesteps=1000)
    clip.train.update(
        num_train_steps=390_000, batch_size=32_768, learning_rate=5e-4, warmup_steps=2000, anneal="cosine"
    )
    clip.train.update(
        optimizer=spec("optimizer", "adamw", weight_decay=0.0125, decay="kernels", b2=0.98, eps=1e-6),
        grad_clip=0.0,
        ema=(0.9999,),
    )
    config.eval.num = 0
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "captioned_shapes")
        clip.net.update(features=64, remat="none")
        clip.net.image.update(width=64, layers=3, heads=4, patch=2)
        clip.net.text.vocab_size = 0
        clip.train.update(num_train_steps=2000, batch_size=64, warmup_steps=100, grad_clip=1.0, ema=(0.995,))
        config.eval.update(num=320, batch_size=64)
    return config
