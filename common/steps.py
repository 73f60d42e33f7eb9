"""Training that counts steps, not epochs: one loop for the methods that draw a batch at random in every step."""

import sys
import time

import numpy as np
from tqdm import tqdm

from common import old_training as training

EVERY = 100  # steps between two lines of the log


class StepTrainer:
    """A subclass says what one step is: one(rng) -> {name: loss}, detached, with "total" among them.

    plan: {"iterations", "seed", …}; identity: the settings that a resumed run must share; extra: what else the checkpoint holds. Steps
    draw from a generator seeded by their number, so that a resumed run goes on exactly and torchrun's processes draw the same batch, of
    which each takes its Run.part(). `waited` sums the seconds that steps waited for data.
    """

    method = None

    def __init__(self, net, optimizer, plan, model_args, r, path, identity, extra=None):
        self.net, self.optimizer, self.plan, self.model_args, self.run = net, optimizer, plan, model_args, r
        self.path, self.identity, self.extra = path, identity, extra or {}
        self.step, self.seconds, self.done, self.waited = 0, 0.0, False, 0.0

    def save(self):
        if self.run.is_main:
            training.save_checkpoint(
                self.path,
                {
                    "method": self.method,
                    "done": self.done,
                    "model_args": self.model_args,
                    "plan": self.plan,
                    "identity": self.identity,
                    "model_state_dict": self.net.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "seconds": self.seconds,
                    "rng": training.get_rng(),
                    **self.extra,
                },
            )

    def load(self):
        """Go on from the checkpoint, where there is one. -> whether there was"""
        if not self.path.exists():
            return False
        state = training.load_checkpoint(self.path, self.method)
        training.check_identity(self.path, state.get("identity"), self.identity)
        self.net.load_state_dict(state["model_state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.done = state["step"], state["seconds"], state["done"]
        training.set_rng(state["rng"])
        return True

    def descend(self, loss):
        """One step of the optimizer along the gradient of a loss, averaged over the processes."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.run.average_gradients(self.net)
        self.optimizer.step()

    def start(self, args, log, about):
        """Say what is trained, resume where there is something to resume, and train the steps that are left."""
        r, total = self.run, self.plan["iterations"]
        resumed = self.load() if args.resume else False
        if r.is_main and not resumed:
            log.path.unlink(missing_ok=True)
        r.print(f"{about}, {r.device}, {r.precision}")
        if self.step >= total:
            r.print(f"{self.step} steps done before ({self.path})")
            return
        if resumed:
            r.print(f"going on at step {self.step + 1}")
            if r.is_main:
                log.drop_after("train", self.step)
        self._loop(args, log)
        r.barrier()

    def _loop(self, args, log):
        r, plan = self.run, self.plan
        bar = tqdm(
            total=plan["iterations"],
            initial=self.step,
            desc="train",
            unit="step",
            disable=not r.is_main,
            dynamic_ncols=True,
            mininterval=1 if sys.stderr.isatty() else 15,
        )
        if args.compile:
            self.net.compile()
        self.net.train()
        began = saved = last = time.perf_counter()
        spent, sums, count, self.waited = self.seconds, {}, 0, 0.0
        while self.step < plan["iterations"]:
            for k, v in self.one(np.random.default_rng([plan["seed"], self.step, 0])).items():
                sums[k] = sums.get(k, 0.0) + v
            self.step, count = self.step + 1, count + 1
            bar.update()
            if self.step % EVERY == 0 or self.step == plan["iterations"]:
                now = time.perf_counter()
                self.seconds = spent + now - began
                means = {k: float(v) / count for k, v in sums.items()}
                training.check_finite(means["total"], f"near step {self.step}")
                bar.set_postfix(loss=f"{means['total']:.4f}")
                if r.is_main:
                    log.write(
                        stage="train",
                        epoch=self.step,
                        **means,
                        seconds=self.seconds,
                        steps_per_second=count / (now - last),
                        waited_share=self.waited / (now - last),
                    )
                sums, count, last, self.waited = {}, 0, now, 0.0
                if now - saved > args.save_minutes * 60:
                    self.save()
                    saved = now
        bar.close()
        r.sync_buffers(self.net)
        self.done = True
        self.save()
