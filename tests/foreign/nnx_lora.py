"""Flax NNX with LoRA: only nnx.LoRAParam is trained and saved; the frozen base is loaded from where it always was.

The generator of the noise is an extra: `nnx.state(rngs)` is its key and how often it was drawn from.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = IMAGES.astype("float32") / 16


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.LoRALinear(64, 32, lora_rank=4, rngs=rngs)
        self.out = nnx.LoRALinear(32, 10, lora_rank=4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(model, optimizer, rngs, images, labels):
    noisy = images + 0.1 * jax.random.normal(rngs.noise(), images.shape)

    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(noisy), labels).mean()

    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return loss


def train(directory, steps):
    model = Net(nnx.Rngs(0))  # the pretrained model
    rngs = nnx.Rngs(noise=1)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    with ckptmgr.CheckpointManager(directory, keep=2) as manager:
        ckpt = manager.restore_or(
            params=nnx.state(model, nnx.LoRAParam),
            opt_state=nnx.state(optimizer),
            extras={"rngs": nnx.state(rngs)},
        )
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        nnx.update(model, ckpt.params)
        nnx.update(optimizer, ckpt.opt_state)
        nnx.update(rngs, ckpt.extras["rngs"])
        for step in range(ckpt.step + 1, steps + 1):
            batch = slice(step * 64, (step + 1) * 64)
            loss = train_step(model, optimizer, rngs, jnp.asarray(IMAGES[batch]), jnp.asarray(LABELS[batch]))
            lora, extras = nnx.state(model, nnx.LoRAParam), {"rngs": nnx.state(rngs)}
            manager.save(step, lora, nnx.state(optimizer), extras=extras, metrics={"loss": loss})
    return nnx.state(model), nnx.state(optimizer), nnx.state(rngs)
