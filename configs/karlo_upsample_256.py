"""The upsampler of karlo v1.0-alpha: 64x64 to 256x256, the last of its 7 steps by a second network (kakaobrain/karlo).

691,579,523 parameters. This is one network of configs/karlo.py, which describes the whole system, with what it needs.

Data: a folder of pictures with captions, data/captions below the current one, or --config.up.data.path=FOLDER.
Cost: 1,000,000 steps.
Command: python -m diffax.main --config=configs/karlo_upsample_256.py
The whole system: configs/karlo.py
"""

from diffax.config import load, spec, split_variant

VARIANTS = {"tiny": "32x32 to 64x64 embedded shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    config = load("karlo:tiny" if is_tiny else "karlo")
    config.name, config.stages = "karlo_upsample_256" + "_tiny" * is_tiny, ("up",)
    for name in ("clip", "prior", "decoder"):
        del config[name]
    config.eval.update(num=100 if is_tiny else 0, guidance=(), classifier=spec("evaluation", "svc"))
    return config
