"""DALL-E 2: 1024x1024 pictures from text (Ramesh et al. 2022, arXiv:2204.06125): CLIP, prior, decoder, two upsamplers.

The stages of the configs dalle2_clip, dalle2_prior, dalle2_decoder_64, dalle2_upsample_256 and dalle2_upsample_1024,
which describe their sizes, scores and data. The CLIP is trained first and then frozen; its embeddings of pictures and
captions are computed as these are read.

Command: python -m diffax.main --config=configs/dalle2.py --stage=clip
     then the same with --stage=prior, decoder, up and up_1024, in any order or at the same time; then
         python -m diffax.main --config=configs/dalle2.py --mode=sample --prompt='a corgi that plays a trumpet'
Variant :ar has the autoregressive prior, of configs/dalle2_prior_ar.py, in the place of the diffusion prior.
With stages that were trained elsewhere: --config.clip.workdir=runs/dalle2_clip --config.prior.workdir=...
"""

from diffax.config import add_section, load, new, spec, split_variant
from diffax.configs._tiny import CAPTIONS

VARIANTS = {"tiny": "16x16 to 32x32 embedded captioned shapes", "ar": "the autoregressive prior"}
CONFIGS = {
    "clip": "dalle2_clip",
    "prior": "dalle2_prior",
    "decoder": "dalle2_decoder_64",
    "up": "dalle2_upsample_256",
    "up_1024": "dalle2_upsample_1024",
}


def get_config(variant: str = ""):
    parts = split_variant(variant, VARIANTS)
    is_tiny, is_ar = "tiny" in parts, "ar" in parts
    names = {name: file for name, file in CONFIGS.items() if not (is_tiny and name == "up_1024")}
    names |= {"prior": "dalle2_prior_ar"} if is_ar else {}
    loaded = {name: load(f"{file}:tiny" if is_tiny else file) for name, file in names.items()}
    config = new("dalle2" + "_ar" * is_ar + "_tiny" * is_tiny, stages=tuple(names))
    for name, its in loaded.items():
        add_section(config, name, its["up" if name == "up_1024" else name])
    config.sample = loaded["decoder"].sample
    config.eval = loaded["up"].eval
    config.eval.bpd_num = 0
    if is_tiny:
        config.eval.update(num=500, batch_size=100, guidance=(0.0, 1.0, 2.0, 3.0, 5.0))
        config.eval.classifier = spec("evaluation", CAPTIONS)
    return config
