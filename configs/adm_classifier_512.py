"""ADM's noised classifier for ImageNet, 512x512 (Dhariwal & Nichol 2021, arXiv:2105.05233).

Section 4 and appendix I, table 12: the encoder half of the U-Net, depth 2, with attention pooling, trained on noised
pictures, cropped at random and flipped, under the schedule of the model that it guides. 54.4M parameters.

Data: a folder of images, one folder per class, data/imagenet_512 below the current one, or
      --config.classifier.data.path=FOLDER.
Cost: 500,000 steps of 256 pictures.
Command: python -m diffax.main --config=configs/adm_classifier_512.py --workdir=runs/adm_imagenet_512
Trained in the workdir of configs/adm_imagenet_512.py, it guides that model.
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded digits, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("adm_classifier_512", stages=("classifier",), model="classifier")
    classifier = config.classifier
    classifier.shape, classifier.num_classes = (512, 512, 3), 1000
    classifier.data = spec("data", "folder", path="data/imagenet_512")
    classifier.loader.update(flip=True, crop="random")
    classifier.net.update(pool="attention", channels=128, channel_mult=(0.5, 1, 1, 2, 2, 4, 4))
    classifier.net.update(num_res_blocks=2, attention=(16, 32, 64), head_channels=64)  # at 32, 16 and 8 pixels
    classifier.net.update(scale_shift=True, resample="biggan", remat="blocks")
    classifier.schedule = spec("schedule", "linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    classifier.train.update(
        num_train_steps=500_000, batch_size=256, learning_rate=3e-4, anneal="linear", warmup_steps=0
    )
    classifier.train.update(optimizer=spec("optimizer", "adamw", weight_decay=0.05), grad_clip=0.0, ema=())
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config)
        classifier.train.update(num_train_steps=600, batch_size=64)
    config.eval.update(num=256, batch_size=32)
    return config
