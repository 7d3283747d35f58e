"""Improved DDPM's upsampler of ImageNet from 64 to 256 pixels (Nichol & Dhariwal 2021, arXiv:2102.09672).

T = 4000, linear schedule, learned variance. The model of configs/iddpm_imagenet_64.py:cond enlarged by this one has FID
12.26, as the ADM paper gives it (arXiv:2105.05233). It is trained on the means of 4 by 4 pixels, neither noised nor
blurred. 279.8M parameters. 250 steps, as for the small model; the paper does not say how many that score took.

Data: a folder of images, one folder per class, data/imagenet_256 below the current one, or
      --config.up.data.path=FOLDER.
Cost: 500,000 steps of 256 pictures, not in the paper: work for a TPU pod slice or many GPUs.
Command: python -m diffax.main --config=configs/iddpm_upsample_64_256.py --workdir=runs/iddpm_upsample_64_256
     and, after --mode=sample --config.sample.save=true of the small model, to enlarge its samples
         python -m diffax.main --workdir=runs/iddpm_upsample_64_256 --mode=sample
             --input=runs/imagenet_64/base/samples_64x64x64x3.npz
"""

from diffax.config import each, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "8x8 to 32x32 embedded digits, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("iddpm_upsample_64_256", stages=("up",))
    stage = config.up
    stage.shape = (256, 256, 3)
    stage.conditions = each("condition", "label", "low_res")
    stage.conditions.label.num_classes = 1000
    stage.conditions.low_res.update(factor=4, round=False)
    stage.data = spec("data", "folder", path="data/imagenet_256")
    stage.net.update(channels=192, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, dropout=0.0)
    stage.net.update(attention=(16, 32), heads=4, scale_shift=True, remat="blocks")  # at 16 and 8 pixels
    stage.schedule = spec("schedule", "linear", num_timesteps=4000)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # as published, not T / 1000
    stage.steps = "250"
    stage.train.update(num_train_steps=500_000, batch_size=256, learning_rate=3e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=0, batch_size=16)  # enlarging takes long at this size
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config)
        stage.shape = (32, 32, 1)
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=800, batch_size=64, anneal="cosine", ema=(0.995,))
        config.eval.update(num=200, batch_size=100)
    return config
