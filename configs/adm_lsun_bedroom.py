"""ADM on LSUN bedroom, 256x256, unconditional (Dhariwal & Nichol 2021, arXiv:2105.05233).

Tables 5 and 11. The paper's scores, 50,000 samples: FID 1.90, sFID 5.59, precision 0.66 and recall 0.51 from all 1000
steps; FID 2.31 from 250 even steps, and 2.02 from 250 split as 90,60,60,20,20, the best split of its sweep.
552.8M parameters: the network of configs/adm_imagenet_256_uncond.py, with dropout.

Data: a folder of images, data/lsun_bedroom below the current one, or --config.base.data.path=FOLDER.
Cost: 500,000 steps of 256 pictures, about 231 days of a V100 at the 6.4 pictures/s that the paper measured.
Command: python -m diffax.main --config=configs/adm_lsun_bedroom.py --workdir=runs/adm_lsun_bedroom
Sooner:  --config.base.steps=90,60,60,20,20
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded photos, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("adm_lsun_bedroom")
    stage = config.base
    stage.shape = (256, 256, 3)
    stage.data = spec("data", "folder", path="data/lsun_bedroom")
    stage.loader.flip = True
    stage.net.update(channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, dropout=0.1)
    stage.net.update(attention=(8, 16, 32), head_channels=64)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.train.update(num_train_steps=500_000, batch_size=256, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=0, batch_size=16)  # without labels there is nothing for a classifier to score
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "photos")
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=800, batch_size=64, anneal="cosine", ema=(0.995,))
    return config
