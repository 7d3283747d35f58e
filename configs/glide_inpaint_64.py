"""GLIDE's base model taught to fill holes (Nichol et al. 2021, arXiv:2112.10741, section 2.3), as it was released.

It goes on from configs/glide_base_64.py with the known part of the picture, and which part that is, as four more
channels, whose weights are zero at first: 385,037,638 parameters, the released base_inpaint.pt. What the paper erases
is not published; see `diffax.diffusion.augment.random_known`. A quarter of the pictures are erased whole, so that the
model still generates from text alone.

Data: as for the base model.
Cost: part of 500,000 steps, in which the released model learned guidance and inpainting.
Command: python -m diffax.main --config=configs/glide_inpaint_64.py --config.base.train.start_from=runs/glide_base_64
Then: ... --mode=sample --input=photo.png --mask=mask.png --prompt='a hat'; white is kept, black filled.
"""

from diffax.config import add_section, each, load, new, spec, split_variant

VARIANTS = {"tiny": "16x16 embedded captioned shapes"}


def get_config(variant: str = ""):
    is_tiny = "tiny" in split_variant(variant, VARIANTS)
    base = load("glide_base_64:tiny" if is_tiny else "glide_base_64")
    config = new("glide_inpaint_64_tiny" if is_tiny else "glide_inpaint_64")
    stage = add_section(config, "base", base.base)
    config.sample, config.eval = base.sample, base.eval
    stage.conditions.inpaint = spec("condition", "inpaint", empty=0.25)
    stage.guidance = each("guidance", "classifier_free", "insert_known", "clip_denoised")
    stage.guidance.classifier_free.scale = 5.0
    stage.train.num_train_steps = 2000 if is_tiny else 500_000
    return config
