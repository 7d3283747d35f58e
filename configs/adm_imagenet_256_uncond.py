"""ADM on ImageNet, 256x256, unconditional, guided by a classifier (Dhariwal & Nichol 2021, arXiv:2105.05233).

Table 4. The paper's scores, 50,000 samples of 250 steps:

| guidance | FID   | sFID  | Inception | precision | recall |
|----------|-------|-------|-----------|-----------|--------|
| none     | 26.21 | 6.35  | 39.70     | 0.61      | 0.63   |
| 1.0      | 33.03 | 6.99  | 32.92     | 0.56      | 0.65   |
| 10.0     | 12.00 | 10.40 | 95.41     | 0.76      | 0.44   |

552.8M parameters: the network and the recipe of configs/adm_imagenet_256.py without the label, and 20,000 steps more.
Guided by the classifier of configs/adm_classifier_256.py, the same as there.

Data: a folder of images, one folder per class, data/imagenet_256 below the current one, or
      --config.base.data.path=FOLDER (which may be unsorted) and --config.classifier.data.path=FOLDER.
Cost: 2,000,000 steps of 256 pictures, about 926 days of a V100 at the 6.4 pictures/s that the paper measured.
Command: python -m diffax.main --config=configs/adm_imagenet_256_uncond.py --workdir=runs/adm_uncond --stage=base
     and the same with --stage=classifier, at the same time or before; --mode=sample needs both.
"""

from diffax.config import load, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded digits, minutes on a CPU"}


def get_config(variant: str = ""):
    config = load("adm_imagenet_256")  # with its classifier
    config.name = "adm_imagenet_256_uncond"
    stage = config.base
    del stage.conditions.label
    stage.train.num_train_steps = 2_000_000
    stage.guidance.classifier.scale = 10.0
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config)
        config.classifier.train.update(num_train_steps=600, batch_size=64)
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=800, batch_size=64, anneal="cosine", ema=(0.995,))
        config.eval.update(num=500, batch_size=100, guidance=(0.0, 1.0, 2.0, 5.0, 10.0))
    return config
