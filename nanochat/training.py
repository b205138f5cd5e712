"""The training loop: one for base, mid, SFT and RL.

A step: take all rows of this rank, run them through in micro-batches adding up gradients of the
loss sum, divide once by the number of targets of the whole step, update, publish the new weights.
Between steps, at a boundary: evaluate, save, look whether someone asked us to stop.

Saving, data order and arithmetic are exact: a run that was killed and resumed ends with the same
weights, bit for bit, as one that was left alone.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from nanochat import checkpoint_manager, fp8, fused_native, int8
from nanochat.common import UserError
from nanochat.dataloader import Batch
from nanochat.gpt import GPT
from nanochat.objectives import next_token_loss_sum
from nanochat.optimizers import Optimizer, OptimizerConfig, build_optimizer
from nanochat.plan import Plan, StepLoader
from nanochat.precision import MasterWeights
from nanochat.progress import Progress
from nanochat.run_folder import PREVIOUS, step_folders, step_name
from nanochat.runtime import (
    Runtime,
    collecting_rarely,
    first_line,
    halve_pass,
    keep_freed_memory,
)
from nanochat.saving import CheckpointSaver, not_finite
from nanochat.stopping import StoppedError, StopRequest
from nanochat.tracking import MetricWriter
from nanochat.train_state import TrainState, UnsoundModelError

if TYPE_CHECKING:
    from nanochat.fullshard import FullShard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hook:
    """An action at step 0, at every `every` steps and at the end.

    `every` 0 = at the end only, less = never.
    """

    name: str
    every: int
    action: Callable[[Trainer], dict[str, float]]
    """Returns values for metrics.jsonl; smaller is better for names that end in bpb or loss.

    No two hooks that act at one step give a value the same name.
    """
    at_start: bool = True
    judges: bool = False
    """Whether it raises UnsoundModelError when the model is none to build on; such come first."""

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether to act at this boundary."""
        if self.every <= 0:
            return is_last and self.every == 0
        if is_last:
            return True
        return step % self.every == 0 and (step > 0 or self.at_start)


@dataclass(frozen=True)
class _Pending:
    """What a step has left on the device, to be read when it is logged."""

    step: int
    loss: Tensor
    grad_norm: Tensor | None
    """None of a step that was skipped."""
    measures: dict[str, float]


class Trainer:
    """One training run in one folder."""

    def __init__(
        self,
        model: GPT,
        loader: StepLoader,
        *,
        plan: Plan,
        optimizer: OptimizerConfig,
        runtime: Runtime,
        run_dir: Path,
        tokenizer_dir: Path,
        facts: dict[str, Any],
        metrics: MetricWriter | None = None,
        hooks: Sequence[Hook] = (),
        stop: StopRequest | None = None,
    ) -> None:
        """Take over an fp32 `model` on the runtime's device.

        facts: what state.json of every checkpoint says about the run besides its progress.
        metrics: where numbers go; only the main rank has one. stop: asked at every boundary.
        """
        self.model, self.loader, self.plan = model, loader, plan
        self.runtime, self.hooks, self.facts = runtime, hooks, facts
        if plan.fp8:
            fp8.check_device(runtime.device)
            logger.info("%d matrices multiply in fp8", fp8.convert(model))
        if plan.int8:
            int8.check_possible(model.config, runtime.device, runtime.compute_dtype)
            logger.info("%d matrices multiply in 8-bit integers", int8.convert(model))
        self.weights: MasterWeights | FullShard
        self.optimizer: Optimizer | FullShard
        self._full_shard: FullShard | None = None
        if plan.shard == "full":
            from nanochat.fullshard import FullShard  # a second of imports that few runs need

            self._full_shard = self.weights = self.optimizer = FullShard(model, optimizer, runtime)
            logger.info("with --shard=full a slow rank is not named: each pass waits for all ranks")
        else:
            self.weights = MasterWeights(model, runtime.compute_dtype)
            self.optimizer = build_optimizer(
                self.weights.named_parameters(),
                optimizer,
                model_dim=model.config.n_embd,
                world=runtime.world,
            )
        self.saver = CheckpointSaver(
            run_dir,
            tokenizer_dir=tokenizer_dir,
            world=runtime.world,
            # Shards are written by all ranks together, in collectives of the step's own group.
            in_background=plan.background_save and plan.shard != "full",
        )
        self.state = TrainState()
        self.metrics = metrics
        self.stop = stop or StopRequest()
        self.progress = Progress(
            runtime,
            num_iterations=plan.schedule.num_iterations,
            flops_per_token=model.estimate_flops(),
        )
        self._hidden: Callable[[Tensor], Tensor] = model.hidden
        if plan.compile:
            self._hidden = torch.compile(model.hidden, dynamic=False)
        self._micro_batch_rows = plan.micro_batch_rows
        self._scales_loss = runtime.compute_dtype == torch.float16
        self._pending: list[_Pending] = []
        self._saved_step = self._resumed_step = -1
        self._is_rejected = False  # whether the step was found unsound and not judged again since
        self._asked_at: float | None = None
        self._longest_stretch = 0.0
        self._acted: set[str] = set()

    # ---- the loop -----------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Train to the end of the plan. Raises StoppedError after saving when a stop was asked."""
        if self.runtime.device.type == "cpu":
            keep_freed_memory()
        last = self.plan.schedule.num_iterations
        with self.saver, collecting_rarely() as after_step:
            while True:
                is_last = self.state.step >= last
                self._stop_if_asked()
                self._boundary(is_last=is_last)
                if is_last:
                    self.saver.wait()
                    if self.plan.write:
                        self.saver.forget_rejected()
                    self._write_costs()
                    return self.state
                self._step()
                after_step()

    def _stop_if_asked(self) -> None:
        """Save and stop when a signal or the clock asks any rank to, or when a save has failed."""
        now = time.perf_counter()
        # The first stretch counts as well: it compiles, but it also shows what an evaluation takes.
        self._longest_stretch = max(self._longest_stretch, now - (self._asked_at or now))
        self._asked_at = now
        reason = self.stop.reason(
            longest_stretch=self._longest_stretch, longest_save=self.saver.longest_seconds
        )
        if not self.runtime.world.any(bool(reason) or self.saver.has_failed):
            return
        self.saver.wait()  # on every rank, so that a failure ends all of them with its reason
        self.save()
        self.saver.wait()
        raise StoppedError(
            f"stopped at step {self.state.step} ({reason or 'asked by another rank'}); "
            + ("everything is saved" if self.plan.write else "nothing was to be saved")
        )

    def _boundary(self, *, is_last: bool) -> None:
        """Evaluate and save between two steps; both once, however often the run is resumed."""
        step = self.state.step
        due = [hook for hook in self.hooks if hook.is_due(step, is_last)]
        if due and self.state.evaluated_step != step:
            self._flush()
            values: dict[str, float] = {}
            for index, hook in enumerate(due):
                if index:
                    self._stop_if_asked()  # what was measured so far is measured again
                may_end_here = self._may_exceed_limit(hook) and not hook.judges
                if step > 0 and (is_last or may_end_here):
                    # Nothing that goes wrong in it costs what was trained; and what is not judged
                    # yet costs nothing that was saved before.
                    self.save(replaces=not hook.judges)
                self._acted.add(hook.name)
                found = self._act(hook)
                repeated = ", ".join(sorted(found.keys() & values.keys()))
                assert not repeated, f"hook {hook.name} measures {repeated}, as an earlier one does"
                values |= found
            gc.collect()  # an evaluation may leave garbage that holds memory of the device
            if values:
                self.state.note_evaluation(values)
                if step == self._resumed_step and self.metrics is not None:
                    self.metrics.drop(step, values)
                self._write(step, **values)
                self._saved_step = -1  # a checkpoint of this step does not know them yet
        self.state.evaluated_step = step
        every = self.plan.save_every
        is_due = (every > 0 and step % every == 0) or (self.plan.keep_best and self.state.is_best)
        if is_last:
            self.save()
        elif step > 0 and is_due:
            self._flush()
            if self.state.is_suspect(self.plan.spike_limit):
                logger.warning(
                    "step %d is not saved: the loss has risen by %.2f nats", step, self.state.rise
                )
            else:
                self.save()

    def _act(self, hook: Hook) -> dict[str, float]:
        """What a hook measures. A saved step that it finds unsound is kept where none takes it."""
        try:
            with self.weights.gathered(), fp8.paused(self.model):
                found = hook.action(self)
            if hook.judges:
                self._is_rejected = False
            return found
        except UnsoundModelError as error:
            if self._saved_step != self.state.step:
                raise
            kept = self.saver.reject(self.state.step)
            raise UserError(f"{error}. It is kept as {kept}; --resume judges it again") from error

    def _may_exceed_limit(self, hook: Hook) -> bool:
        """Whether time is limited and nobody knows yet how much of it the hook takes."""
        return self.stop.has_limit and hook.name not in self._acted

    def accumulate_gradients(self) -> tuple[Batch, Tensor]:
        """Take a step's rows and add up the gradients of their losses.

        Returns the batch and the loss sum of this rank's rows in nats, an fp32 scalar. Gradients
        are those of that sum; in fp16 those of the mean over all targets times the loss scale.
        When the device has no memory left the rows are taken again in smaller parts.
        """
        batch = self.loader.next_step()
        while True:
            try:
                return batch, self._add_up(batch)
            except torch.OutOfMemoryError as error:
                reason = first_line(error)
            self._take_smaller_parts(reason)

    def _add_up(self, batch: Batch) -> Tensor:
        loss_sum = torch.zeros((), device=self.runtime.device)
        device, factor = self.runtime.device, self._loss_factor(batch.num_targets)
        for inputs, targets, weights in _micro_batches(batch, self._micro_batch_rows):
            if (
                self._scales_loss
            ):  # as weights, so that nothing is rounded to fp16 before it is scaled
                weights = factor * (torch.ones(targets.shape) if weights is None else weights)
            part = next_token_loss_sum(
                self._hidden(inputs.to(device, non_blocking=True)),
                self.model.lm_head.weight,
                targets,  # on the host, where it is known which of them are ignored
                weights=weights,
                cap=self.model.config.logit_softcap,
                vocab_size=self.model.config.vocab_size,
                compiled=self.plan.compile,
                int8=fused_native.in_int8(self.model.lm_head),
            )
            part.backward()  # type: ignore[no-untyped-call]
            loss_sum += part.detach() / factor
        return loss_sum

    def _loss_factor(self, num_targets: int) -> float:
        """What losses are multiplied by before the backward pass: 1, but for fp16."""
        return self.state.loss_scale / max(num_targets, 1) if self._scales_loss else 1.0

    def _take_smaller_parts(self, reason: str) -> None:
        """Halve the rows of a pass; this rank alone, for losses are sums over rows."""
        before = self._micro_batch_rows
        if self._full_shard is not None and before > 1:
            # A pass has collectives: no rank can repeat it alone.
            raise UserError(f"out of memory ({reason}); lower --device-batch-size below {before}")
        self.optimizer.zero_grad()
        self.model.zero_grad()
        self._micro_batch_rows = halve_pass(before, reason, rank=self.runtime.world.rank)

    def _step(self) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        if self._full_shard is None:
            with self.progress.own_work.measured():
                batch, loss_sum = self.accumulate_gradients()
                self.progress.own_work.leave_out(batch.waited_seconds)
        else:  # its passes wait for all ranks again and again: whose work is slow is not to be seen
            batch, loss_sum = self.accumulate_gradients()
        multiplier = self.plan.schedule.multiplier(self.state.step)
        grad_norm: Tensor | None = torch.zeros(())
        if batch.num_targets:  # else nothing was learned, and momentum alone must not move weights
            grad_norm = self._update(batch.num_targets, multiplier)
        self.optimizer.zero_grad()
        self.runtime.world.all_reduce_(loss_sum)
        self.state.step += 1
        num_tokens = batch.inputs.numel() * self.runtime.world.size
        self.state.tokens += num_tokens
        measures = batch.measures
        if self._scales_loss:
            scaling = {"loss_scale": self.state.loss_scale, "skipped": self.state.skipped_steps}
            measures = measures | scaling
        self._pending.append(
            _Pending(
                self.state.step,
                loss_sum / max(batch.num_targets, 1),
                grad_norm,
                {"lr": multiplier, **measures},
            )
        )
        is_logged = self.state.step % self.plan.log_every == 0 or self.state.step == 1
        if is_logged:
            self._flush()
        seconds = time.perf_counter() - started
        self.state.seconds += seconds
        self.progress.speed.count(seconds, num_tokens)
        if is_logged:
            self.progress.log(
                self.state, lr=multiplier, epoch=self.loader.progress, measures=measures
            )
            if speed := self.progress.speed.tokens_per_second:
                self._write(
                    self.state.step, tokens_per_second=speed, total_seconds=self.state.seconds
                )

    def _update(self, num_targets: int, multiplier: float) -> Tensor | None:
        """Move the weights; the gradient's norm, None when it overflowed and nothing was moved."""
        grad_norm = self.optimizer.step(
            grad_scale=1.0 / (num_targets * self._loss_factor(num_targets)),
            lr_multiplier=multiplier,
            muon_momentum=self.plan.schedule.momentum(self.state.step),
            decay_multiplier=self.plan.schedule.decay(self.state.step),
            grad_clip=self.plan.grad_clip,
            skip_overflow=self._scales_loss,
        )
        if self._scales_loss:
            is_finite = bool(grad_norm.isfinite())
            try:
                self.state.note_gradient(is_finite=is_finite)
            except UserError as error:
                self._give_up(str(error))
            if not is_finite:
                return None
        self.weights.publish()
        return grad_norm

    # ---- what a run tells ---------------------------------------------------------------------

    def _flush(self) -> None:
        """Read the losses that have piled up on the device; stop on one that is not sound."""
        for row in self._pending:
            loss, grad_norm, values = float(row.loss), 0.0, row.measures
            if row.grad_norm is not None:
                grad_norm = float(row.grad_norm)
                values = {"grad_norm": grad_norm, **values}
            self._write(row.step, loss=loss, **values)
            try:
                self.state.observe(row.step, loss, grad_norm, spike_limit=self.plan.spike_limit)
            except UserError as error:
                self._give_up(str(error))
        self._pending.clear()
        self._write_costs()

    def _give_up(self, what: str) -> NoReturn:
        """End the run with what went wrong, where the last good checkpoint is, and what to try."""
        self.saver.wait()
        last_good = self._last_good()
        if last_good is None:
            aside = self.saver.run_dir / PREVIOUS
            raise UserError(
                f"{what}, and no good checkpoint was saved before. Lower --matrix-lr and "
                "--embedding-lr or set --grad-clip, and start again without --resume; "
                "--spike-limit=0 lets a rise of the loss pass"
                + (f". The earlier run is in {aside}" if step_folders(aside) else "")
            )
        raise UserError(
            f"{what}; the last good checkpoint is {last_good}. Lower --matrix-lr and "
            "--embedding-lr or set --grad-clip, and go on from there with --resume; if the loss "
            "rises because the text has changed its kind, go on with --resume --spike-limit=0, "
            "which lets a rise pass"
        )

    def _last_good(self) -> str | None:
        """The newest sound checkpoint from before the loss began to rise; None if there is none."""
        risen: list[str] = []
        for step in reversed(checkpoint_manager.saved_steps(self.saver.run_dir)):
            path = self.saver.run_dir / step_name(step)
            try:
                loop = checkpoint_manager.open_checkpoint(path).state["loop"]
            except checkpoint_manager.DamagedCheckpointError:
                continue
            if not TrainState(**loop).is_suspect(self.plan.spike_limit):
                names = " and ".join(risen)
                rest = f" (--resume-from-step={step}: {names} saved on the way up)" if risen else ""
                return f"step {step}{rest}"
            risen.append(path.name)
        return None

    def _write(self, step: int, **values: float) -> None:
        if self.metrics is not None and values:
            self.metrics.write(step, **values)

    def _write_costs(self) -> None:
        for cost in self.saver.take_costs():
            self._write(
                self.state.step, save_stall_seconds=cost.stall_seconds, save_seconds=cost.seconds
            )

    # ---- saving and resuming ------------------------------------------------------------------

    def save(self, *, replaces: bool = True) -> None:
        """Save this boundary, once; nothing unsound is ever written over something good.

        replaces: whether older checkpoints beyond those to keep go.
        """
        self._flush()
        state = self.state
        if self._saved_step == state.step or not self.plan.write or self._is_rejected:
            return
        weights = self.weights.state_dict()
        broken = not_finite(weights)
        if broken:
            self._give_up(
                f"{len(broken)} of {len(weights)} parameters hold numbers that are not finite at "
                f"step {state.step}, first of them {broken[0]}"
            )
        state.note_save()
        is_suspect = state.is_suspect(self.plan.spike_limit)
        numbers, arrays = _split_state(self.loader.state_dict())
        shards = self._full_shard
        self.saver.save(
            state.step,
            model=weights,
            optimizer=self.optimizer.state_dict() if shards is None else None,
            state=self.facts | {"step": state.step, "loop": asdict(state), "loader": numbers},
            extra=arrays if self.runtime.world.is_main else None,  # the same on every rank
            write_shards=None if shards is None else shards.save,
            keep_last=self.plan.keep_last if replaces and not is_suspect else None,
            keep={state.best_step} if self.plan.keep_best else (),
        )
        self._saved_step = state.step

    def load_optimizer(self, checkpoint: checkpoint_manager.Checkpoint) -> None:
        """Take over momentum, moments and the number of updates they have seen.

        The state of any number of processes is cut for this one's. With --shard=full the weights
        come along, which lie in the same files.
        """
        world = self.runtime.world
        if self._full_shard is not None:
            self._full_shard.load(checkpoint.shards_folder)
        else:
            assert isinstance(self.optimizer, Optimizer)
            self.optimizer.load_state_dict(checkpoint.load_optimizer(world.rank, world.size))

    def resume(self, checkpoint: checkpoint_manager.Checkpoint) -> None:
        """Go on from a checkpoint of this run: weights, optimizer, data position, counters."""
        world = self.runtime.world
        if checkpoint.is_rejected and not any(h.judges and h.every >= 0 for h in self.hooks):
            raise UserError(
                f"{checkpoint.path} was found unsound and is to be judged again: --eval-every=0"
            )
        self._is_rejected = checkpoint.is_rejected
        self.load_optimizer(checkpoint)
        if self._full_shard is None:
            assert isinstance(self.weights, MasterWeights)
            self.weights.load_state_dict(checkpoint.load_model())
        self.loader.load_state_dict(checkpoint.state["loader"] | checkpoint.load_extra(world.rank))
        self.state = TrainState(**checkpoint.state["loop"])
        self._saved_step = self._resumed_step = self.state.step
        if self.metrics is not None:
            self.metrics.truncate(self.state.step)
        logger.info("resumed from step %d (%s)", self.state.step, checkpoint.path)


def _micro_batches(batch: Batch, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for start in range(0, batch.inputs.size(0), rows):
        part = slice(start, start + rows)
        weights = None if batch.weights is None else batch.weights[part]
        yield batch.inputs[part], batch.targets[part], weights


def _split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loader state as JSON values and as arrays."""
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    return {name: value for name, value in state.items() if name not in arrays}, arrays
