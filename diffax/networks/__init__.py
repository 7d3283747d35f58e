"""Networks: they read z, a timestep and a context, and know nothing of diffusion.

A network is a Flax module with

    __call__(z [B, ...], time [B], context: Context, *, dropout_keys=None) -> [B, ..., out_channels]

and, where the model has conditions that are vectors, a property `vector_width`: the size of the vector that `context`
adds to its timestep embedding. `style`, of its layers, and `check(shape)`, which raises ValueError if it cannot run on
data of that shape, are optional. Fields named out_channels are passed by the model and not by the config.
"""
