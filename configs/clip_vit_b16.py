"""CLIP with a ViT-B/16 at 224 pixels (Radford et al. 2021, arXiv:2103.00020): which caption goes with which picture.

Width 768 and 12 blocks for pictures, 512 and 12 for captions: 149,620,737 parameters, those of the released model.

Data: a folder of pictures with captions, data/captions below the current one, or --config.clip.data.path=FOLDER; where
      the data have classes, training reports zero-shot accuracy on held-out pictures.
Cost: 32 epochs of 400 million pairs, work for a TPU pod.
Command: python -m diffax.main --config=configs/clip_vit_b16.py
Larger: configs/clip_vit_l14.py, configs/clip_vit_h16.py
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "32x32 embedded captioned shapes"}


def get_config(variant: str = ""):
    config = new("clip_vit_b16", stages=("clip",), model="clip")
    clip = config.clip
    clip.shape = (224, 224, 3)
    clip.data = spec("data", "captions", path="data/captions")
    clip.loader.crop = "random"
    clip.tokenizer = spec("tokenizer", "clip", length=77)
    clip.noised = False
    clip.net.update(features=512, activation="quick_gelu", remat="blocks")
    clip.net.image.update(width=768, layers=12, heads=12, patch=16)
    clip.net.text.update(width=512, layers=12, heads=8)
    clip.schedule = spec("schedule", "cosine", num_timesteps=1000)  # not used
    clip.train.update(
        num_train_steps=390_000, batch_size=32_768, learning_rate=5e-4, warmup_steps=2000, anneal="cosine"
    )
    clip.train.update(
        optimizer=spec("optimizer", "adamw", weight_decay=0.2, decay="kernels", b2=0.98, eps=1e-6),
        grad_clip=0.0,
        ema=(),
    )
    config.eval.num = 0
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "captioned_shapes")
        clip.shape = (32, 32, 3)
        clip.net.update(features=32, remat="none")
        clip.net.image.update(width=64, layers=3, heads=4, patch=4)
        clip.train.update(num_train_steps=2000, batch_size=64, warmup_steps=100, grad_clip=1.0)
        config.eval.update(num=320, batch_size=64)
    return config
