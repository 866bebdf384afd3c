"""Keras 3 on JAX: a callback of `fit` saves all that an epoch changes, and a restart goes on with the next epoch.

    python docs/examples/keras_callback.py [DIRECTORY]

Stop it at any time and run it again: it goes on with the first epoch that no checkpoint has.
"""

import os
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from sklearn.datasets import load_diabetes

import ckptmgr

INPUTS, TARGETS = load_diabetes(return_X_y=True)


class Checkpoints(keras.callbacks.Callback):
    """Saves a model after each epoch that `save_every` of the manager wants; the step is the number of epochs."""

    def __init__(self, manager):
        super().__init__()
        self.manager = manager

    def resume(self, model):
        """Restores a compiled and built model from the newest checkpoint. Returns fit's `initial_epoch`."""
        self.set_model(model)
        model.optimizer.build(model.trainable_variables)
        ckpt = self.manager.restore_or(**self.state())
        state = {"trainable_variables": ckpt.params, "optimizer_variables": ckpt.opt_state}
        model.set_state_tree(state | {"non_trainable_variables": ckpt.extras["non_trainable"]})
        self.numpy_random = ckpt.extras["numpy_random"]
        return ckpt.step

    def on_train_begin(self, logs=None):
        np.random.set_state({"bit_generator": "MT19937", **self.numpy_random})  # fit has drawn from it before this

    def on_epoch_end(self, epoch, logs=None):
        self.manager.save(epoch + 1, **self.state(), metrics=logs)

    def state(self):
        tree = self.model.get_state_tree(value_format="backend_tensor")
        random = np.random.get_state(legacy=False)  # fit shuffles the rows of each epoch with it
        del random["bit_generator"]  # a name, which is no array
        extras = {"non_trainable": tree["non_trainable_variables"], "numpy_random": random}
        return {"params": tree["trainable_variables"], "opt_state": tree["optimizer_variables"], "extras": extras}


def create():
    keras.utils.clear_session()  # the names of layers are counted from 0 again; they are names of leaves
    keras.utils.set_random_seed(0)
    layers = keras.layers
    hidden = [layers.Dense(32, activation="relu"), layers.BatchNormalization(), layers.Dropout(0.2)]
    model = keras.Sequential([keras.Input((10,)), *hidden, layers.Dense(1)], name="net")
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mse", metrics=["mae"])
    return model


def train(directory, epochs):
    model = create()
    with ckptmgr.CheckpointManager(directory, keep=3) as manager:
        checkpoints = Checkpoints(manager)
        done = checkpoints.resume(model)
        print(f"resumed from step {done}" if done else "started anew")
        options = {"epochs": epochs, "initial_epoch": done, "batch_size": 64, "verbose": 0}
        model.fit(INPUTS, TARGETS, callbacks=[checkpoints], **options)
    return checkpoints.state()


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/keras_callback"]), epochs=20)
