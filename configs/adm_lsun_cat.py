"""ADM on LSUN cat, 256x256, unconditional (Dhariwal & Nichol 2021, arXiv:2105.05233).

Tables 5 and 11. The paper's scores, 50,000 samples: FID 5.57, sFID 6.69, precision 0.63 and recall 0.52 from all 1000
steps; FID 7.03 from 250 even steps, and 5.94 from 250 split as 90,60,60,20,20, the best split of its sweep.
552.8M parameters: the network and the recipe of configs/adm_lsun_bedroom.py (dropout 0.1), with fewer steps.

Data: a folder of images, data/lsun_cat below the current one, or --config.base.data.path=FOLDER.
Cost: 200,000 steps of 256 pictures, about 93 days of a V100 at the 6.4 pictures/s that the paper measured.
Command: python -m diffax.main --config=configs/adm_lsun_cat.py --workdir=runs/adm_lsun_cat
Sooner:  --config.base.steps=90,60,60,20,20
"""

from diffax.config import load, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded photos, minutes on a CPU"}


def get_config(variant: str = ""):
    config = load("adm_lsun_bedroom")
    config.name = "adm_lsun_cat"
    stage = config.base
    stage.data.path = "data/lsun_cat"
    stage.train.num_train_steps = 200_000
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "photos")
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=800, batch_size=64, anneal="cosine", ema=(0.995,))
    return config
