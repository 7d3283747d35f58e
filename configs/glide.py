"""GLIDE: 256x256 pictures from text (Nichol et al. 2021, arXiv:2112.10741): a base model and an upsampler.

The stages of configs/glide_base_64.py and configs/glide_upsample_256.py, which describe their sizes, scores and data.

Command: python -m diffax.main --config=configs/glide.py --stage=base
     and the same with --stage=up, at the same time or before; then
         python -m diffax.main --config=configs/glide.py --mode=sample --prompt='a painting of a fox in the snow'
With stages that were trained elsewhere: --config.base.workdir=runs/glide_base_64 --config.up.workdir=...
"""

from diffax.config import add_section, load, new, split_variant

VARIANTS = {
    "paper": "3.5 and 1.5 billion parameters, as in the paper",
    "clip": "the base guided by the noised CLIP of configs/glide_clip.py",
    "tiny": "16x16 to 32x32 embedded captioned shapes",
}


def get_config(variant: str = ""):
    variants = split_variant(variant, VARIANTS)
    base = load(":".join(["glide_base_64", *filter(None, [",".join(variants)])]))
    up = load(":".join(["glide_upsample_256", *filter(None, [",".join(v for v in variants if v != "clip")])]))
    config = new("glide_tiny" if "tiny" in variants else "glide", stages=("base", "up"))
    add_section(config, "base", base.base)
    add_section(config, "up", up.up)
    if "clip" in variants:
        add_section(config, "clip", base.clip)
    config.sample, config.eval = base.sample, base.eval
    return config
