"""Improved DDPM on LSUN bedroom, 256x256, unconditional (Nichol & Dhariwal 2021, arXiv:2102.09672).

The program that comes with the paper, and no table of it: T = 1000, linear schedule, learned variance, no dropout, no
flips, without the scaled shift in its blocks. No score was published. 113.7M parameters: configs/ddpm_lsun_256.py, with
three more output channels for the variance.
  bs128  1.2M steps at 1e-4 (the default)
  bs64   2.4M steps at 2e-5; the file's name says 64 pictures in a batch, the program's page 128

Data: a folder of images, data/lsun_bedroom below the current one, or --config.base.data.path=FOLDER.
Cost: not published; 154M pictures through a network of the size of configs/ddpm_lsun_256.py, which saw as many.
Command: python -m diffax.main --config=configs/iddpm_lsun_256.py --workdir=runs/iddpm_lsun_256
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {
    "bs64": "twice the steps, half the pictures in each, a fifth of the learning rate",
    "tiny": "16x16 embedded photos, minutes on a CPU",
}


def get_config(variant: str = ""):
    parts = split_variant(variant, VARIANTS)
    config = new("iddpm_lsun_256_bs64" if "bs64" in parts else "iddpm_lsun_256")
    stage = config.base
    stage.shape = (256, 256, 3)
    stage.data = spec("data", "folder", path="data/lsun_bedroom")
    stage.net.update(channels=128, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, dropout=0.0)
    stage.net.update(attention=(16,), heads=1)  # at 16 pixels
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.train.update(num_train_steps=1_200_000, batch_size=128, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    if "bs64" in parts:
        stage.train.update(num_train_steps=2_400_000, batch_size=64, learning_rate=2e-5)
    config.sample.update(num=16, batch_size=16, columns=4)
    if "tiny" in parts:
        tiny(config, "photos")
    return config
