"""CLIP with a ViT-L/14 at 224 pixels (Radford et al. 2021, arXiv:2103.00020), whose embeddings karlo reads.

Width 1024 and 24 blocks for pictures, 768 and 12 for captions: 427,616,513 parameters, those of the released model. The
rest is of configs/clip_vit_b16.py.

Data: a folder of pictures with captions, data/captions below the current one, or --config.clip.data.path=FOLDER.
Cost: 32 epochs of 400 million pairs, work for a TPU pod.
Command: python -m diffax.main --config=configs/clip_vit_l14.py
"""

from diffax.config import load, split_variant

VARIANTS = {"tiny": "32x32 embedded captioned shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    config = load("clip_vit_b16:tiny" if is_tiny else "clip_vit_b16")
    config.name = "clip_vit_l14" + "_tiny" * is_tiny
    config.clip.train.learning_rate = config.clip.train.learning_rate if is_tiny else 4e-4
    if not is_tiny:
        config.clip.net.features = 768
        config.clip.net.image.update(width=1024, layers=24, heads=16, patch=14)
        config.clip.net.text.update(width=768, heads=12)
    return config
