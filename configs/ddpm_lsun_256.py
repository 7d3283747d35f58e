"""DDPM on LSUN bedroom, cat or church, 256x256 (Ho et al. 2020, arXiv:2006.11239).

Table 3 and appendix B. The paper's FID, 50,000 samples of 1000 steps: bedroom 6.36, cat 19.75,
church 7.89. 114M parameters. The variance is the posterior's, as in the published 256-pixel
sampler. Flips follow the paper (all but bedroom); the published script leaves cat out instead.

Data: a folder of images, data/lsun_NAME below the current one, or --config.base.data.path=FOLDER.
Cost: the paper's speed was 2.2 steps/s on a TPU v3-8: bedroom 2.4M steps, about 12.5 days.
Command: python -m diffax.main --config=configs/ddpm_lsun_256.py:church --workdir=runs/lsun_church
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {
    "bedroom": "LSUN bedroom (the default)",
    "cat": "LSUN cat",
    "church": "LSUN church, outdoor",
    "tiny": "16x16 embedded photos, minutes on a CPU",
}
STEPS = {"bedroom": 2_400_000, "cat": 1_800_000, "church": 1_200_000}


def get_config(variant: str = ""):
    parts = split_variant(variant, VARIANTS, exclusive=tuple(STEPS))
    scene = next((part for part in parts if part in STEPS), "bedroom")
    config = new(f"ddpm_lsun_256_{scene}")
    stage = config.base
    stage.shape = (256, 256, 3)
    stage.data = spec("data", "folder", path=f"data/lsun_{scene}")
    stage.loader.flip = scene != "bedroom"
    stage.net.update(channels=128, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, dropout=0.0)
    stage.net.update(attention=(16,), heads=1)  # at 16 pixels
    stage.net.update(sinusoid="ho", norm_eps=1e-6, downsample_pad="end", kernel_init="ho")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "fixed_small"
    stage.train.update(num_train_steps=STEPS[scene], batch_size=64, learning_rate=2e-5, warmup_steps=5000)
    stage.train.update(grad_clip=1.0, ema=(0.9999,))
    config.sample.update(num=16, batch_size=16, columns=4)
    if "tiny" in parts:
        tiny(config, "photos")
    return config
