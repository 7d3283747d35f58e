"""DDPM on CIFAR-10, 32x32, unconditional (Ho et al. 2020, arXiv:2006.11239).

Table 1, last row (L_simple, fixed isotropic variance), and the details of appendix B. The paper's
scores, 50,000 samples of 1000 steps: FID 3.17 (train set), 5.24 (test set); IS 9.46 +- 0.11;
NLL <= 3.75 bits/dim. 35.7M parameters. Scores are of the EMA weights at the best checkpoint.

Cost: the paper trained 800,000 steps in 10.6 hours on a TPU v3-8.
Command: python -m diffax.main --config=configs/ddpm_cifar10.py --workdir=runs/ddpm_cifar10
"""

from diffax.config import each, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {
    "augmented": "with non-leaking augmentation (Karras et al. 2022), for small data sets",
    "tiny": "16x16 embedded digits, minutes on a CPU",
}


def get_config(variant: str = ""):
    config = new("ddpm_cifar10")
    stage = config.base
    stage.shape = (32, 32, 3)
    stage.data = spec("data", "cifar10")
    stage.loader.flip = True
    stage.net.update(channels=128, channel_mult=(1, 2, 2, 2), num_res_blocks=2, dropout=0.1)
    stage.net.update(attention=(2,), heads=1)  # at 16 pixels
    stage.net.update(sinusoid="ho", norm_eps=1e-6, downsample_pad="end", kernel_init="ho")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "fixed_large"
    stage.train.update(num_train_steps=800_000, batch_size=128, learning_rate=2e-4, warmup_steps=5000)
    stage.train.update(grad_clip=1.0, ema=(0.9999,))
    parts = split_variant(variant, VARIANTS)
    if "augmented" in parts:
        stage.conditions = each("condition", "augmentation")
        stage.loader.flip = False  # the network is to know of it
    if "tiny" in parts:
        tiny(config)
    return config
