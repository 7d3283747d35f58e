"""ADM's noised classifier for ImageNet, 64x64 (Dhariwal & Nichol 2021, arXiv:2105.05233).

Section 4 and appendix I, table 12: the encoder half of the U-Net, depth 4, with attention pooling, trained on noised
pictures under the schedule of the model that it guides. 65.4M parameters.

Data: a folder of images, one folder per class, data/imagenet_64 below the current one, or
      --config.classifier.data.path=FOLDER.
Cost: 300,000 steps of 1024 pictures.
Command: python -m diffax.main --config=configs/adm_classifier_64.py --workdir=runs/adm_imagenet_64
Trained in the workdir of configs/adm_imagenet_64.py, it guides that model.
"""

from diffax.config import new, spec, split_variant
from diffax.configs._tiny import tiny

VARIANTS = {"tiny": "16x16 embedded digits, minutes on a CPU"}


def get_config(variant: str = ""):
    config = new("adm_classifier_64", stages=("classifier",), model="classifier")
    classifier = config.classifier
    classifier.shape, classifier.num_classes = (64, 64, 3), 1000
    classifier.data = spec("data", "folder", path="data/imagenet_64")
    classifier.loader.update(flip=True, crop="random")
    classifier.net.update(pool="attention", channels=128, channel_mult=(1, 2, 3, 4))
    classifier.net.update(num_res_blocks=4, attention=(2, 4, 8), head_channels=64)  # at 32, 16 and 8 pixels
    classifier.net.update(scale_shift=True, resample="biggan")
    classifier.schedule = spec("schedule", "cosine", num_timesteps=1000)
    classifier.train.update(
        num_train_steps=300_000, batch_size=1024, learning_rate=6e-4, anneal="linear", warmup_steps=0
    )
    classifier.train.update(optimizer=spec("optimizer", "adamw", weight_decay=0.2), grad_clip=0.0, ema=())
    if "tiny" in split_variant(variant, VARIANTS):
        tiny(config)
        classifier.train.update(num_train_steps=600, batch_size=64)
    config.eval.update(num=256, batch_size=64)
    return config
