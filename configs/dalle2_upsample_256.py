"""The first upsampler of DALL-E 2: 64x64 to 256x256 (Ramesh et al. 2022, arXiv:2204.06125, section 2.1 and table 3).

The U-Net of ADM without attention, without caption, embedding or guidance; trained on windows of a quarter of the side,
the smaller picture blurred by a 3x3 Gaussian of standard deviation 0.6. How often is not published; here half of them,
as in CDM. The paper says 700M parameters; these are 729.7M. 27 steps of DDIM.

Data: a folder of pictures, data/captions below the current one, or --config.up.data.path=FOLDER.
Cost: 1,000,000 steps of 1024 windows.
Command: python -m diffax.main --config=configs/dalle2_upsample_256.py
To enlarge a picture: the same with --mode=sample --input=photo.png
The whole system: configs/dalle2.py
"""

from diffax.config import each, new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 to 32x32 embedded shapes"}


def get_config(variant: str = ""):
    config = new("dalle2_upsample_256", stages=("up",))
    stage = config.up
    stage.shape = (256, 256, 3)
    stage.conditions = each("condition", "low_res")
    stage.conditions.low_res.update(factor=4, crop=64, blur=0.5, blur_sigma=(0.6, 0.6))
    stage.data = spec("data", "captions", path="data/captions")
    stage.net.update(channels=320, channel_mult=(1, 2, 3, 4), num_res_blocks=3, dropout=0.1)
    stage.net.update(attention=(), mid_attention=False, scale_shift=True, resample="biggan", remat="blocks")
    stage.schedule = spec("schedule", "cosine", num_timesteps=1000)
    stage.variance = "fixed_small"
    stage.steps, stage.sampler = "fast27", spec("sampler", "ddim")
    stage.train.update(num_train_steps=1_000_000, batch_size=1024, learning_rate=1.2e-4, warmup_steps=0)
    stage.train.update(optimizer=spec("optimizer", "adamw"), grad_clip=0.0, ema=(0.9999,))
    config.sample.update(num=16, batch_size=16, columns=4)
    config.eval.update(num=0, batch_size=16)  # enlarging takes long at this size
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config, "captioned_shapes")
        stage.shape = (32, 32, 3)
        stage.conditions.low_res.update(factor=2, crop=16)
        stage.net.update(channels=16, channel_mult=(1, 2, 2), attention=(), remat="none")
        stage.predicts = "v"  # with eps, reading the smaller picture takes far longer to learn than minutes
        stage.steps = "fast27"
        stage.train.update(
            num_train_steps=1500, batch_size=32, learning_rate=2e-3, anneal="cosine", grad_clip=1.0, ema=(0.995,)
        )
        config.eval.update(num=100, batch_size=50)
    return config
