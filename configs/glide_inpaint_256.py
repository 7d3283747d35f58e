"""GLIDE's upsampler for pictures with holes (Nichol et al. 2021, arXiv:2112.10741, section 2.3), as it was released.

It goes on from configs/glide_upsample_256.py, reads the whole smaller picture and the known part of the larger one:
398,368,198 parameters, the released upsample_inpaint.pt. Sampled in 27 ancestral steps.

Data: as for the upsampler.
Cost: not published.
Command: python -m diffax.main --config=configs/glide_inpaint_256.py \\
             --config.up.train.start_from=runs/glide_upsample_256
"""

from diffax.config import add_section, each, load, new, spec, split_variant

VARIANTS = {"tiny": "16x16 to 32x32 embedded captioned shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    up = load("glide_upsample_256:tiny" if is_tiny else "glide_upsample_256")
    config = new("glide_inpaint_256_tiny" if is_tiny else "glide_inpaint_256", stages=("up",))
    stage = add_section(config, "up", up.up)
    config.sample, config.eval = up.sample, up.eval
    text, low_res = stage.conditions.text, stage.conditions.low_res
    stage.conditions = each("condition", text=text, inpaint="inpaint", low_res=low_res)  # in the released order
    stage.conditions.inpaint.empty = 0.25
    stage.guidance = each("guidance", "insert_known", "clip_denoised")
    stage.sampler = spec("sampler", "ddpm")
    stage.train.num_train_steps = 500 if is_tiny else 200_000
    return config
