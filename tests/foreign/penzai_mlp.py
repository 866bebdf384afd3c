"""Penzai with its own trainer: the frozen parameters of the model are params, the trainer's state is opt_state."""

import jax
import jax.numpy as jnp
import optax
from penzai import pz
from penzai.models.simple_mlp import DropoutMLP
from penzai.toolshed import basic_training
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = IMAGES.astype("float32") / 16


def loss_fn(model, state, rng, images, labels):
    inputs = pz.nx.wrap(images).tag("batch", "features")
    logits = model(inputs, random_stream=pz.RandomStream.from_base_key(rng)).unwrap("batch", "features")
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, state, {"loss": loss}


def build():
    model = DropoutMLP.from_config(jax.random.key(0), [64, 32, 10], drop_rate=0.1)
    return basic_training.StatefulTrainer.build(jax.random.key(1), model, optax.adam(1e-2), loss_fn)


def train(directory, steps):
    trainer = build()
    _, params = pz.unbind_params(trainer.model)
    with ckptmgr.CheckpointManager(directory, keep=2) as manager:
        ckpt = manager.restore_or(params=pz.freeze_params(params), opt_state=trainer.state.value)
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        for param, restored in zip(params, ckpt.params, strict=True):
            param.update(restored)
        trainer.state.value = ckpt.opt_state
        for step in range(ckpt.step + 1, steps + 1):
            batch = slice(step * 64, (step + 1) * 64)
            aux = trainer.step(images=jnp.asarray(IMAGES[batch]), labels=jnp.asarray(LABELS[batch]))
            manager.save(step, pz.freeze_params(params), trainer.state.value, metrics={"loss": aux["loss"]})
    return pz.freeze_params(params), trainer.state.value
