"""CLIP with a ViT-H/16 at 256 pixels, the size of DALL-E 2's (Ramesh et al. 2022, arXiv:2204.06125, appendix C).

986,339,841 parameters. Trained as CLIP is (configs/clip_vit_b16.py); configs/dalle2_clip.py is the same network with
sharpness-aware minimisation.

Data: a folder of pictures with captions, data/captions below the current one, or --config.clip.data.path=FOLDER.
Cost: 32 epochs of 400 million pairs, work for a TPU pod.
Command: python -m diffax.main --config=configs/clip_vit_h16.py
"""

from diffax.config import load, split_variant

VARIANTS = {"tiny": "16x16 embedded captioned shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    config = load("dalle2_clip:tiny" if is_tiny else "dalle2_clip")
    config.name = "clip_vit_h16" + "_tiny" * is_tiny
    config.clip.train.sam = 0.0
    return config
