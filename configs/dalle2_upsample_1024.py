"""The second upsampler of DALL-E 2: 256x256 to 1024x1024 (Ramesh et al. 2022, arXiv:2204.06125, section 2.1, table 3).

As the first (configs/dalle2_upsample_256.py), with the linear schedule and 15 steps of DDIM. The smaller picture is
made worse by the degradations of BSRGAN: blurs, resizes, noise and JPEG in random order. The paper says 300M
parameters; these are 282.1M.

Data: a folder of pictures, data/captions below the current one, or --config.up.data.path=FOLDER.
Cost: 1,000,000 steps of 512 windows.
Command: python -m diffax.main --config=configs/dalle2_upsample_1024.py
To enlarge a picture: the same with --mode=sample --input=photo.png
The whole system: configs/dalle2.py
"""

from diffax.config import each, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "32x32 to 64x64 embedded shapes"}


def get_config(variant: str = ""):
    config = new("dalle2_upsample_1024", stages=("up",))
    stage = config.up
    stage.shape = (1024, 1024, 3)
    stage.conditions = each("condition", "low_res")
    stage.conditions.low_res.update(factor=4, crop=256, degrade="bsr")
    stage.data = spec("data", "captions", path="data/captions")
    stage.net.update(channels=192, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2)
    stage.net.update(attention=(), mid_attention=False, scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    stage.variance = "fixed_small"
    stage.steps, stage.sampler = "15", spec("sampler", "ddim")
    stage.train.update(num_train_steps=1_000_000, batch_size=512, learning_rate=1e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    config.sample.update(num=4, batch_size=4, columns=2)
    config.eval.update(num=0, batch_size=4)  # enlarging takes long at this size
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "captioned_shapes")
        stage.shape = (64, 64, 3)
        stage.conditions.low_res.update(factor=2, crop=32)
        stage.net.update(channels=16, channel_mult=(1, 2, 2), attention=(), remat="none")
        stage.predicts = "v"  # with eps, reading the smaller picture takes far longer to learn than minutes
        stage.steps = "15"
        stage.train.update(num_train_steps=1000, batch_size=32, anneal="cosine", grad_clip=1.0, ema=(0.995,))
        config.eval.update(num=100, batch_size=50)
    return config
