"""ADM's upsampler of ImageNet from 128 to 512 pixels (Dhariwal & Nichol 2021, arXiv:2105.05233).

Tables 6 and 13. The paper's scores, 50,000 samples, of a model of 128 pixels enlarged by this one:

| the small pictures | steps     | FID  | sFID  | Inception | precision | recall |
|--------------------|-----------|------|-------|-----------|-----------|--------|
| not guided         | 250 + 250 | 9.96 | 5.62  | 121.78    | 0.75      | 0.64   |
| guided             | 250 + 250 | 3.85 | 5.86  | 221.72    | 0.84      | 0.53   |
| guided             | 250 + 25  | 4.11 | 9.57  | 219.29    | 0.83      | 0.55   |
| guided             | 25 + 25   | 5.96 | 12.10 | 187.87    | 0.81      | 0.54   |

The upsampler itself is not guided. It is trained on the means of 4 by 4 pixels, neither noised nor blurred. The small
model is that of configs/adm_imagenet_128.py, guided in the paper by a classifier of its own. 308.8M parameters.

Data: a folder of images, one folder per class, data/imagenet_512 below the current one, or
      --config.up.data.path=FOLDER.
Cost: 1,050,000 steps of 256 pictures; the paper reports 1878 days of a V100 for both models, and 36 for the classifier.
Command: python -m diffax.main --config=configs/adm_upsample_128_512.py --workdir=runs/adm_upsample_128_512
     and, after --mode=sample --config.sample.save=true of the small model, to enlarge its samples
         python -m diffax.main --workdir=runs/adm_upsample_128_512 --mode=sample
             --input=runs/adm_imagenet_128/base/samples_64x128x128x3.npz
Sooner:  --config.up.sampler=ddim --config.up.steps=ddim25
"""

from diffax.config import load, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 to 64x64 embedded photos, minutes on a CPU"}


def get_config(variant: str = ""):
    config = load("adm_upsample_64_256")
    config.name = "adm_upsample_128_512"
    stage = config.up
    stage.shape = (512, 512, 3)
    stage.data.path = "data/imagenet_512"
    stage.net.update(attention=(16, 32), head_channels=64)  # at 32 and 16 pixels
    stage.train.num_train_steps = 1_050_000
    config.sample.update(num=4, batch_size=4, columns=2)
    config.eval.batch_size = 4
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "photos")
        stage.shape = (64, 64, 3)
        stage.conditions.low_res.crop = 32
        stage.net.update(channel_mult=(1, 2, 2), attention=())
        stage.train.update(num_train_steps=800, batch_size=32, anneal="cosine", ema=(0.995,))
        config.eval.update(num=200, batch_size=50)
    return config
