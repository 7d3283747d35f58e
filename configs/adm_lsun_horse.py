"""ADM on LSUN horse, 256x256, unconditional (Dhariwal & Nichol 2021, arXiv:2105.05233).

Tables 5 and 11. The paper's scores, 50,000 samples of all 1000 steps:

| dropout         | FID  | sFID | precision | recall |
|-----------------|------|------|-----------|--------|
| 0.1             | 2.57 | 6.81 | 0.71      | 0.55   |
| 0 (`nodropout`) | 2.95 | 5.94 | 0.69      | 0.55   |

FID 3.45 from 250 even steps, and 2.83 from 250 split as 90,60,60,20,20, the best split of its sweep. 552.8M parameters:
the network and the recipe of configs/adm_lsun_bedroom.py, with fewer steps.

Data: a folder of images, data/lsun_horse below the current one, or --config.base.data.path=FOLDER.
Cost: 250,000 steps of 256 pictures, about 116 days of a V100 at the 6.4 pictures/s that the paper measured.
Command: python -m diffax.main --config=configs/adm_lsun_horse.py --workdir=runs/adm_lsun_horse
Sooner:  --config.base.steps=90,60,60,20,20
"""

from diffax.config import load, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {
    "nodropout": "without dropout: FID 2.95",
    "tiny": "16x16 embedded photos, minutes on a CPU",
}


def get_config(variant: str = ""):
    parts = split_variant(variant, VARIANTS)
    config = load("adm_lsun_bedroom")
    config.name = "_".join(["adm_lsun_horse", *(p for p in parts if p != "tiny")])
    stage = config.base
    stage.data.path = "data/lsun_horse"
    stage.train.num_train_steps = 250_000
    stage.net.dropout = 0.0 if "nodropout" in parts else 0.1
    if "tiny" in parts:
        tiny(config, "photos")
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=800, batch_size=64, anneal="cosine", ema=(0.995,))
    return config
