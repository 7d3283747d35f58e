"""ADM's upsampler of ImageNet from 64 to 256 pixels (Dhariwal & Nichol 2021, arXiv:2105.05233).

Tables 6 and 13. The paper's scores, 50,000 samples, of the model of configs/adm_imagenet_64.py enlarged by this
one, 250 steps each:

| the small pictures | FID  | sFID | Inception | precision | recall |
|--------------------|------|------|-----------|-----------|--------|
| not guided         | 7.49 | 5.13 | 127.49    | 0.72      | 0.63   |
| guided             | 3.94 | 6.14 | 215.84    | 0.83      | 0.53   |

The upsampler itself is not guided. It is trained on the means of 4 by 4 pixels, neither noised nor blurred.
311.8M parameters.

Data: a folder of images, one folder per class, data/imagenet_256 below the current one, or
      --config.up.data.path=FOLDER.
Cost: 500,000 steps of 256 pictures; the paper reports 329 days of a V100 for both models, and 30 for the classifier.
Command: python -m diffax.main --config=configs/adm_upsample_64_256.py --workdir=runs/adm_upsample_64_256
     and, after --mode=sample --config.sample.save=true of the small model, to enlarge its samples
         python -m diffax.main --workdir=runs/adm_upsample_64_256 --mode=sample
             --input=runs/adm_imagenet_64/base/samples_64x64x64x3.npz
"""

from diffax.config import each, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 to 64x64 embedded photos, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("adm_upsample_64_256", stages=("up",))
    stage = config.up
    stage.shape = (256, 256, 3)
    stage.conditions = each("condition", "label", "low_res")
    stage.conditions.label.num_classes = 1000
    stage.conditions.low_res.update(factor=4, round=False)
    stage.data = spec("data", "folder", path="data/imagenet_256")
    stage.loader.flip = True
    stage.net.update(channels=192, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2, dropout=0.0)
    stage.net.update(attention=(8, 16, 32), heads=4, head_channels=0)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "learned_range"
    stage.loss = spec("loss", "hybrid", weight=1.0)  # T / 1000
    stage.steps = "250"
    stage.train.update(num_train_steps=500_000, batch_size=256, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=0, batch_size=16)  # enlarging takes long at this size
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "photos")
        stage.shape = (64, 64, 3)
        stage.conditions.low_res.crop = 32
        stage.predicts = "v"  # with eps, reading the smaller picture takes far longer to learn than minutes
        stage.net.update(channel_mult=(1, 2, 2), attention=())
        stage.steps = "quad50"  # more of them near the picture: less grain
        stage.train.update(num_train_steps=800, batch_size=32, anneal="cosine", ema=(0.995,))
        config.eval.update(num=200, batch_size=50)
    return config
