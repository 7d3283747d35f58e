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

from diffax.config import config_defaults, load, split_variant, tiny

VARIANTS = {"tiny": "16x16 embedded captioned shapes"}


def get_config(variant: str = ""):
    config = config_defaults("glide_clip", stages=("clip",))
    clip = config.clip
    clip.shape = (64, 64, 3)
    clip.takes = ("text",)
    clip.data.update(name="captions", path="data/captions")
    clip.text.update(tokenizer="clip", length=77)
    clip.net.update(name="clip", features=512, activation="gelu", remat="blocks")
    clip.net.image.update(width=768, layers=12, heads=12, patch=4)
    clip.net.text.update(width=512, layers=12, heads=8, vocab_size=65_536)  # more than there are ids, as released
    clip.schedule.update(name="cosine", steps=1000)
    clip.train.update(steps=390_000, batch_size=32_768, learning_rate=5e-4, warmup_steps=2000, anneal="cosine")
    clip.train.update(optimizer="adamw", weight_decay=0.0125, decay="kernels", b2=0.98, eps=1e-6, clip=0.0)
    clip.train.update(ema=(0.9999,))
    config.eval.num = 0
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "shapes")
        clip.data.update(single=True, holdout=load("glide_base_64:tiny").base.data.holdout)
        clip.net.update(features=64, remat="none")
        clip.net.image.update(width=64, layers=3, heads=4, patch=2)
        clip.net.text.vocab_size = 0
        clip.train.update(steps=2000, batch_size=64, warmup_steps=100, clip=1.0, ema=(0.995,))
        config.eval.update(num=320, batch_size=64)
    return config
