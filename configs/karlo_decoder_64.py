"""The decoder of karlo v1.0-alpha: 64x64 pictures from an image embedding and a caption (kakaobrain/karlo).

893,318,086 parameters. This is one network of configs/karlo.py, which describes the whole system, with what it needs.

Data: a folder of pictures with captions, data/captions below the current one, or --config.decoder.data.path=FOLDER.
Cost: 1,000,000 steps.
Command: python -m diffax.main --config=configs/karlo_decoder_64.py --config.clip.workdir=runs/clip_vit_l14
The whole system: configs/karlo.py
"""

from diffax.config import load, spec, split_variant

VARIANTS = {"tiny": "32x32 embedded captioned shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    config = load("karlo:tiny" if is_tiny else "karlo")
    config.name, config.stages = "karlo_decoder_64" + "_tiny" * is_tiny, ("decoder",)
    for name in ("prior", "up", "up_last"):
        del config[name]
    config.eval.update(num=0, guidance=(), classifier=spec("evaluation", "svc"))
    return config
