"""Run one step of a network of your own: python my_model.py."""

import sklearn.datasets
from flax import nnx

import gpipe_jax as gpipe

gpipe.simulate_devices(2)  # CPU devices; remove this line on GPUs or TPUs


class Hidden(nnx.Module):
    """Compute one hidden layer: any Flax module that takes one array and returns one."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(inputs, width, rngs=rngs)

    def __call__(self, x):
        """Return max(0, W x + b)."""
        return nnx.relu(self.linear(x))


# The layers in order: a class and its arguments. Each stage gets some of them.
layers = [
    gpipe.layer(Hidden, inputs=64, width=128),
    gpipe.layer(Hidden, inputs=128, width=128),
    gpipe.layer(nnx.Linear, in_features=128, out_features=10),
]
images, digits = sklearn.datasets.load_digits(return_X_y=True)
batch = {"inputs": (images[:64] / 16).astype("float32"), "labels": digits[:64].astype("int32")}

pipe = gpipe.Pipeline(
    layers,
    loss=gpipe.losses.softmax_cross_entropy,
    mesh=gpipe.make_mesh(stages=2),
    micro_batches=4,
    example=batch,
)
state = pipe.init(seed=0)
(loss, metrics), gradients, state = pipe.value_and_grad(state, batch)
print(pipe)  # the layers of each stage, and the idle time
print(f"loss {float(loss):.3f}")  # ln(10) = 2.3 is chance
# gpipe.Trainer(pipe, optax.adam(1e-3)) applies the gradients, in the same program.
