"""The room of the mathematics stands alone: it needs JAX and NumPy, and its examples are true."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = ("augment", "guidance", "losses", "process", "samplers", "schedules", "timesteps")
BLOCKED = ("flax", "optax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "chex", "scipy", "PIL")


def test_it_imports_and_samples_with_jax_and_numpy_alone():
    program = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None  # importing it raises
from diffax.components import build, spec
from diffax.diffusion import guidance, losses, samplers, schedules, timesteps
import jax
schedule = build(spec("schedule", "cosine", num_timesteps=50), "schedule")
denoise = guidance.denoiser_from(lambda z, time: z)
noise = samplers.picture_noise(jax.random.split(jax.random.key(0), 2), (4, 4, 1))
steps = schedules.build_steps(schedule, "5")
sampler = build(spec("sampler", "unipc"), "sampler")
print(samplers.sample(denoise, noise(jax.numpy.int32(-1)), noise, steps, sampler).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert done.stdout.strip() == "(2, 4, 4, 1)", done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"diffax.diffusion.{name}"))
    assert found.attempted and not found.failed
