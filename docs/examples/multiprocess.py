"""One run in several processes, each with devices of its own: every process makes the same calls.

    python docs/examples/multiprocess.py [DIRECTORY]            starts two processes on this machine

By hand, one line in each of two terminals (or on two machines: then the first one's address, and a directory
that both see):

    python docs/examples/multiprocess.py DIRECTORY localhost:12345 2 0
    python docs/examples/multiprocess.py DIRECTORY localhost:12345 2 1

Under SLURM and on Cloud TPU `jax.distributed.initialize()` finds all of that by itself: `srun python train.py`.
On Kubernetes give it the pod's index, as in docs/layouts.md.
"""

import socket
import subprocess
import sys


def train(directory, address, count, index, total_steps=20):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # on GPU and TPU leave this out
    jax.distributed.initialize(address, count, index)

    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    import ckptmgr

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    optimizer = optax.adam(0.1)
    goal = np.arange(64, dtype=np.float32).reshape(16, 4)

    @jax.jit
    def train_step(params, opt_state):
        loss, gradient = jax.value_and_grad(lambda params: jnp.mean((params["w"] - goal) ** 2))(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    params = {"w": jax.make_array_from_callback(goal.shape, rows, lambda index: np.zeros_like(goal[index]))}
    with ckptmgr.CheckpointManager(directory, save_every=5, keep=2) as manager:
        ckpt = manager.restore_or(params=params, opt_state=optimizer.init(params), layout=mesh)
        params, opt_state = ckpt.params, ckpt.opt_state
        with manager.preemption_guard():  # SIGTERM to one process stops all, at the same saved step
            for step in range(ckpt.step + 1, total_steps + 1):
                params, opt_state, loss = train_step(params, opt_state)
                manager.save(step, params, opt_state, metrics={"loss": loss})
                if manager.preempted:
                    break
    if index == 0:
        print(f"from step {ckpt.step} to {step}, loss {loss:.4f}" if ckpt.step < total_steps else "done before")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        directory, address, count, index = sys.argv[1:]
        train(directory, address, int(count), int(index))
    else:
        directory = (sys.argv[1:] or ["runs/multiprocess"])[0]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        commands = [[sys.executable, __file__, directory, address, "2", str(index)] for index in range(2)]
        processes = [subprocess.Popen(command) for command in commands]
        sys.exit(max(process.wait() for process in processes))
