"""Prometheus: the newest durable step, its age and bytes, what saves cost and how many failed, on /metrics.

    python docs/examples/prometheus_metrics.py [DIRECTORY]

While it trains, http://127.0.0.1:9400/metrics has them. After a restart they begin with the restored checkpoint.
"""

import sys
import time

import jax
import jax.numpy as jnp
import optax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from sklearn.datasets import load_diabetes

import ckptmgr

DATA = load_diabetes()
INPUTS, TARGETS = jnp.asarray(DATA.data, jnp.float32), jnp.asarray(DATA.target, jnp.float32)
OPTIMIZER = optax.adam(1.0)
SECONDS = (0.001, 0.01, 0.1, 1, 10, 60, 300, 1800)


@jax.jit
def train_step(params, opt_state):
    loss = lambda params: jnp.mean((INPUTS @ params["w"] + params["b"] - TARGETS) ** 2)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = OPTIMIZER.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


class Metrics:
    """An instance is an `on_commit` callback. It is called in a background thread, which these metrics allow."""

    def __init__(self, registry):
        self.step = Gauge("checkpoint_step", "The newest durable step", registry=registry)
        self.bytes = Gauge("checkpoint_disk_bytes", "Bytes of its files", registry=registry)
        self.age = Gauge("checkpoint_age_seconds", "Time since it was saved", registry=registry)
        self.age.set(float("nan"))  # there is no checkpoint yet
        costs = {"registry": registry, "buckets": SECONDS}
        self.blocked = Histogram("checkpoint_blocked_seconds", "How long training waited for a save", **costs)
        self.durable = Histogram("checkpoint_durable_seconds", "How long a save took", **costs)
        self.failures = Counter("checkpoint_failures", "Saves that failed", registry=registry)

    def __call__(self, info):
        self.found(info)
        self.blocked.observe(info.blocked_s)
        self.durable.observe(info.durable_s)

    def found(self, info):
        self.step.set(info.step)
        self.bytes.set(info.disk_nbytes)
        self.age.set_function(lambda: time.time() - info.time)  # is computed at each request


def train(directory, total_steps, port=9400):
    params, registry = {"w": jnp.zeros(10), "b": jnp.zeros(())}, CollectorRegistry()
    metrics = Metrics(registry)
    server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    with ckptmgr.CheckpointManager(directory, save_every=50, on_commit=metrics) as manager:
        ckpt = manager.restore_or(step=0, params=params, opt_state=OPTIMIZER.init(params))
        print(f"resumed from step {ckpt.step}" if ckpt.resumed else "started anew")
        if ckpt.info is not None:
            metrics.found(ckpt.info)
        params, opt_state = ckpt.params, ckpt.opt_state
        for step in range(ckpt.step + 1, total_steps + 1):
            params, opt_state, loss = train_step(params, opt_state)
            try:
                manager.save(step, params, opt_state, metrics={"loss": loss})
            except ckptmgr.SaveError as error:  # an earlier save has failed; this one has not begun
                print(error)
                metrics.failures.inc()
                manager.save(step, params, opt_state, metrics={"loss": loss})
    server.shutdown()
    thread.join()
    server.server_close()
    return params, opt_state


if __name__ == "__main__":
    train(*(sys.argv[1:] or ["runs/prometheus_metrics"]), total_steps=200)
