"""GLIDE: 256x256 pictures from text (Nichol et al. 2021, arXiv:2112.10741): a base model and an upsampler.

The stages of configs/glide_base_64.py and configs/glide_upsample_256.py, where their sizes, scores and data are told.

Command: python -m diffax.main --config=configs/glide.py --stage=base
     and the same with --stage=up, at the same time or before; then
         python -m diffax.main --config=configs/glide.py --mode=sample --prompt='a painting of a fox in the snow'
With stages that were trained elsewhere: --config.base.workdir=runs/glide_base_64 --config.up.workdir=...
"""

from diffax.config import add_section, config_defaults, load, split_variant

VARIANTS = {
    "paper": "3.5 and 1.5 billion parameters, as in the paper",
    "tiny": "32x32 to 64x64 embedded captioned shapes",
}


def get_config(variant: str = ""):
    variants = split_variant(variant, VARIANTS)
    base = load(":".join(["glide_base_64", ",".join(variants)]) if variants else "glide_base_64")
    up = load(":".join(["glide_upsample_256", ",".join(variants)]) if variants else "glide_upsample_256")
    config = config_defaults("glide_tiny" if "tiny" in variants else "glide", stages=("base", "up"))
    add_section(config, "base", base.base)
    add_section(config, "up", up.up)
    config.sample, config.eval = base.sample, base.eval
    return config
