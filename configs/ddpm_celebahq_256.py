"""DDPM on CelebA-HQ, 256x256 (Ho et al. 2020, arXiv:2006.11239).

Appendix B. The paper shows samples and interpolations of this model and prints no score for it.
114M parameters, the same network as on LSUN; the variance is the posterior's, as in the published
256-pixel sampler.

Data: a folder of images, data/celebahq below the current one, or --config.base.data.path=FOLDER.
Cost: the paper trained 500,000 steps at 2.2 steps/s on a TPU v3-8, about 63 hours.
Command: python -m diffax.main --config=configs/ddpm_celebahq_256.py --workdir=runs/celebahq
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded photos, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("ddpm_celebahq_256")
    stage = config.base
    stage.shape = (256, 256, 3)
    stage.data = spec("data", "folder", path="data/celebahq")
    stage.loader.flip = True
    stage.net.update(channels=128, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, dropout=0.0)
    stage.net.update(attention=(16,), heads=1)  # at 16 pixels
    stage.net.update(sinusoid="ho", norm_eps=1e-6, downsample_pad="end", kernel_init="ho")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "fixed_small"
    stage.train.update(num_train_steps=500_000, batch_size=64, learning_rate=2e-5, warmup_steps=5000)
    stage.train.update(grad_clip=1.0, ema=(0.9999,))
    config.sample.update(num=16, batch_size=16, columns=4)
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "photos")
    return config
