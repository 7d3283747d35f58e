"""Improved DDPM on ImageNet, 64x64 (Nichol & Dhariwal 2021, arXiv:2102.09672).

T = 4000, cosine schedule, learned variance, no dropout, no flips. The paper's scores:
  (none)  Table 1, unconditional, 1.5M steps: 3.57 bits/dim, FID 19.2 (10,000 samples). 121M.
  vlb     Table 1, unconditional, 1.5M steps: 3.53 bits/dim, FID 40.1 (10,000 samples). 121M.
  cond    precision and recall table, 250,000 steps, 250 sampled: FID 2.92, precision 0.82,
          recall 0.71 (50,000 samples). 273M.

Data: a folder of images, one folder per class, data/imagenet_64 below the current one, or
      --config.base.data.path=FOLDER.
Cost: not in the paper; `cond` sees 512M images, so it is work for a TPU pod slice or many GPUs.
Command: python -m diffax.main --config=configs/iddpm_imagenet_64.py:cond --workdir=runs/imagenet_64
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {
    "vlb": "unconditional, L_vlb with timesteps drawn by importance",
    "cond": "class-conditional, 192 channels, batch 2048",
    "tiny": "16x16 embedded digits, minutes on a CPU",
}


def get_config(variant: str = ""):
    parts = split_variant(variant, VARIANTS, exclusive=("vlb", "cond"))
    config = new("_".join(["iddpm_imagenet_64", *(p for p in parts if p != "tiny")]))
    stage = config.base
    stage.shape = (64, 64, 3)
    stage.data = spec("data", "folder", path="data/imagenet_64")
    stage.net.update(channels=128, channel_mult=(1, 2, 3, 4), num_res_blocks=3, dropout=0.0)
    stage.net.update(attention=(4, 8), heads=4, scale_shift=True)  # at 16 and 8 pixels
    stage.schedule = spec("schedule", "cosine", num_timesteps=4000, rescale_time=True)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=4.0)  # T / 1000
    stage.train.update(num_train_steps=1_500_000, batch_size=128, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    if "vlb" in parts:
        stage.loss = spec("loss", "vlb", weight=4000.0)  # T: the whole sum
        stage.timesteps = spec("timesteps", "loss_second_moment")
    if "cond" in parts:
        stage.conditions.label = spec("condition", "label", num_classes=1000)
        stage.net.channels = 192
        stage.schedule.rescale_time, stage.loss.weight = False, 1.0  # as published, unlike the rest
        stage.steps = "250"
        stage.train.update(num_train_steps=250_000, batch_size=2048, learning_rate=3e-4)
        config.eval.num = 0  # small evaluation classifiers are for small data
    if "tiny" in parts:
        tiny(config)
    return config
