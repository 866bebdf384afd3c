"""A trainer in the style of the JAX AI Stack's tutorials: NNX, optax, nnx.MultiMetric, Grain, and hooks.

    python docs/examples/nnx_trainer.py [DIRECTORY]

`Checkpoints` is the hook that stands where Orbax was: stop the script at any time and run it again.
"""

import sys

import grain
import optax
from flax import nnx
from sklearn.datasets import load_digits

import ckptmgr

IMAGES, LABELS = load_digits(return_X_y=True)
ROWS = list(zip((IMAGES / 16).astype("float32"), LABELS, strict=True))
OPTIMIZER = optax.adamw(1e-3)


class Checkpoints:
    """Resumes a trainer at its start, and saves after each step that `save_every` wants."""

    def __init__(self, directory, **options):
        self.manager = ckptmgr.CheckpointManager(directory, **options)

    def on_start(self, trainer):
        ckpt = self.manager.restore_or(**self.state(trainer))  # also sets the position of trainer.data
        nnx.update(trainer.model, ckpt.params)
        nnx.update(trainer.optimizer, ckpt.opt_state)
        nnx.update(trainer.metrics, ckpt.extras["averages"])
        trainer.step = ckpt.step
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")

    def on_step(self, trainer):
        if self.manager.should_save(trainer.step):
            self.manager.save(trainer.step, **self.state(trainer), metrics=trainer.metrics.compute())

    def on_end(self, trainer):
        self.manager.close()

    def state(self, trainer):
        extras = {"averages": nnx.state(trainer.metrics), "data": trainer.data}
        return {"params": nnx.state(trainer.model), "opt_state": nnx.state(trainer.optimizer), "extras": extras}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(64, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs)
        self.dropout, self.out = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


@nnx.jit
def train_step(model, optimizer, metrics, batch):
    def loss_fn(model):
        logits = model(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    metrics.update(loss=loss, logits=logits, labels=batch[1])
    optimizer.update(model, grads)


class Trainer:
    def __init__(self, hooks):
        self.step, self.hooks = 0, hooks
        self.model = Net(nnx.Rngs(params=0, dropout=1))
        self.optimizer = nnx.Optimizer(self.model, OPTIMIZER, wrt=nnx.Param)
        self.metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())
        rows = grain.MapDataset.source(ROWS).seed(0).shuffle().repeat().batch(32, drop_remainder=True)
        self.data = iter(rows.to_iter_dataset())

    def fit(self, total_steps):
        try:
            self.call("on_start")
            while self.step < total_steps:
                if self.step % 200 == 0:  # what is reported are averages since then
                    self.metrics.reset()
                train_step(self.model, self.optimizer, self.metrics, next(self.data))
                self.step += 1
                self.call("on_step")
        finally:
            self.call("on_end")

    def call(self, when):
        for hook in self.hooks:
            getattr(hook, when)(self)


def train(directory, total_steps):
    trainer = Trainer(hooks=[Checkpoints(directory, save_every=40, keep=3)])
    trainer.fit(total_steps)
    return nnx.state(trainer.model), nnx.state(trainer.optimizer), nnx.state(trainer.metrics)


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/nnx_trainer"]), total_steps=200)
