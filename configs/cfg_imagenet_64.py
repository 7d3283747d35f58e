"""Classifier-free guidance on ImageNet, 64x64 (Ho & Salimans 2022, arXiv:2207.12598).

Table 1: continuous log-SNR schedule over [-20, 20], labels dropped for a share of the examples (p_uncond), constant
interpolated variance v = 0.3. The paper's scores, 50,000 samples, p_uncond 0.1; its w is guidance - 1 here:

| guidance     | 1.0   | 1.1   | 1.3  | 2.0   | 5.0   |
|--------------|-------|-------|------|-------|-------|
| FID          | 1.80  | 1.55  | 3.03 | 12.60 | 26.22 |
| Inception    | 53.71 | 66.11 | 92.8 | 170.1 | 260.2 |

295.9M parameters (the network of ADM without a learned variance). 256 steps, which the paper recommends for 128
pixels; it does not say how many it took here. The network embeds the time 1000 u, as in the authors' later code; the
paper does not say.

Data: a folder of images, one folder per class, data/imagenet_64 below the current one, or
      --config.base.data.path=FOLDER.
Cost: 400,000 steps of 2048 pictures: work for a TPU pod slice or many GPUs.
Command: python -m diffax.main --config=configs/cfg_imagenet_64.py --workdir=runs/cfg_imagenet_64
"""

from diffax.config import each, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {
    "p20": "p_uncond 0.2: FID 1.62 and IS 64.58 at guidance 1.1",
    "p50": "p_uncond 0.5: FID 1.91 and IS 56.10 at guidance 1.1",
    "tiny": "16x16 embedded digits, minutes on a CPU",
}


def get_config(variant: str = ""):
    parts = split_variant(variant, VARIANTS, exclusive=("p20", "p50"))
    config = new("_".join(["cfg_imagenet_64", *(p for p in parts if p != "tiny")]))
    stage = config.base
    stage.shape = (64, 64, 3)
    stage.conditions.label = spec("condition", "label", num_classes=1000)
    stage.data = spec("data", "folder", path="data/imagenet_64")
    stage.loader.flip = True
    stage.net.update(channels=192, channel_mult=(1, 2, 3, 4), num_res_blocks=3, dropout=0.1)
    stage.net.update(attention=(2, 4, 8), head_channels=64)  # at 32, 16 and 8 pixels
    stage.net.update(scale_shift=True, resample="biggan")
    stage.schedule = spec("schedule", "cosine_logsnr", logsnr_min=-20.0, logsnr_max=20.0)
    stage.variance = 0.3
    stage.steps = "256"
    stage.condition_dropout = 0.5 if "p50" in parts else 0.2 if "p20" in parts else 0.1
    stage.guidance = each("guidance", "classifier_free", "clip_denoised")
    stage.guidance.classifier_free.scale = 1.1
    stage.train.update(num_train_steps=400_000, batch_size=2048, learning_rate=3e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    config.eval.num = 0  # small evaluation classifiers are for small data
    if "tiny" in parts:
        tiny(config)
        stage.net.update(channel_mult=(1, 2, 4), attention=(4,))
        stage.train.update(num_train_steps=1600, batch_size=64, learning_rate=2e-3, anneal="cosine", ema=(0.995,))
        config.eval.update(num=500, batch_size=100, guidance=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0))
    return config
