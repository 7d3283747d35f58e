"""The prior of karlo v1.0-alpha: embeddings of pictures, of CLIP's ViT-L/14, from captions (kakaobrain/karlo).

1,022,028,544 parameters. This is one network of configs/karlo.py, which describes the whole system, with what it needs.

Data: a folder of pictures with captions, data/captions below the current one, or --config.prior.data.path=FOLDER.
Cost: 1,000,000 steps.
Command: python -m diffax.main --config=configs/karlo_prior.py --config.clip.workdir=runs/clip_vit_l14
The whole system: configs/karlo.py
"""

from diffax.config import load, spec, split_variant

VARIANTS = {"tiny": "embeddings of 32x32 embedded captioned shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    config = load("karlo:tiny" if is_tiny else "karlo")
    config.name, config.stages = "karlo_prior" + "_tiny" * is_tiny, ("prior",)
    for name in ("decoder", "up", "up_last"):
        del config[name]
    config.eval.update(num=0, guidance=(), classifier=spec("evaluation", "svc"))
    return config
