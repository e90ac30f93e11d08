"""What share of small faults do the tests notice? `python tests/mutation.py [--only=REGEX] [--check]`.

Each row of FAULTS is one wrong line: it is written into a copy of the repository, the tests named for it are run there,
and it is taken back. At the end stand the share that was noticed and the faults that were not. A row whose old text is
not found exactly once in its file says so, and nothing is run. The rows tell what a fault would do to a training;
whoever changes the code changes its rows with it, and whoever writes code nobody could break unseen adds some.

Not collected by pytest: all rows take some 20 minutes of a core. Tests are named by their file, or as
`file::test`; of a file the first test that fails ends a row."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 900  # seconds for the tests of a row; a fault that hangs is noticed, too
# Imported once: the tests of each row run in a process of their own that is forked off here.
HEAVY = ("jax", "flax.nnx", "optax", "orbax.checkpoint", "grain", "beartype", "jaxtyping", "tensorboardX", "pytest")
HEAVY += ("ml_collections", "scipy", "PIL.Image", "av", "transformers", "tensorflow_datasets")
# Pytest says that it comes too late to rewrite the assertions of what is imported.
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")

ALGORITHM = "tests/test_algorithm.py"
# Cases of it, for what belongs to one reward method.
LATENT, JAX, DDPO, DIRECT = (
    f"{ALGORITHM}::test_step_is_algorithm_29[{case}]"
    for case in ("latent-host", "latent-jax", "ddpo-forward", "direct-forward")
)
GRADIENTS = "tests/test_gradients.py"
WHOLE = "tests/plan/test_planner.py::test_a_search_ends_with_a_whole_teacher_while_it_fits"
SCORER = "tests/rewards/test_scorer.py"
HTTP, PUBLISHED = "tests/rewards/test_http.py", "tests/rewards/test_clip.py"
TORCH = "tests/weights/test_torch_file.py"
PROGRAM = "tests/test_programs.py"
LINKS = "tests/plan/test_links.py"
LOSSES = "tests/test_losses.py"
SCHEDULE = "tests/test_schedule.py"
SAMPLING = "tests/test_sampling.py"
CONDITIONED = "tests/models/test_wan_parity.py::test_a_conditioned_transformer_matches"
TOLD = "tests/test_wan21_i2v.py::test_prepared_data_keeps_what_diffusers_would_make_of_the_first_frame"
EXPERTS = "tests/test_experts.py"
DECODER = "tests/test_pretrain.py::test_a_narrow_decoder_draws_and_is_exported_as_diffusers_has_it"
OBJECTIVES = "tests/test_objectives.py"
GIVEN = "tests/test_objectives_rewards.py::test_a_given_frame_is_in_every_input_and_in_no_loss"

MONITORING = "tests/test_monitoring.py"
SAMPLES = "tests/prepare/test_job.py::test_samples_of_the_teacher"
DAMAGE = "tests/test_checkpoint.py::test_what_is_damaged_is_named_kept_and_not_used"
LOG = f"{MONITORING}::test_a_resumed_log_doubles_nothing_and_loses_nothing"
DECLARED = "tests/test_train.py::test_what_a_run_executes_is_what_is_declared_for_it"
RUN = "tests/test_train.py::test_a_run_leaves_its_history_and_items"
TOGETHER = "tests/test_train.py::test_the_loop_gives_each_part_what_belongs_together"
RESUMED = "tests/test_train.py::test_a_killed_run_resumes_to_the_bit[6]"

# File, old text, new text, tests that should notice.
FAULTS: dict[str, list[tuple[str, str, list[str]]]] = {
    "step.py": [
        # The same noise in every step.
        ("fold_in(state.key, state.step), 3)", "fold_in(state.key, 0), 3)", [ALGORITHM]),
        # The fake score learns what the student made before its update.
        ("full(params), full(student), inputs", "full(params), full(state.student), inputs", [GRADIENTS]),
        # Every fake-score update sees the same noise.
        ("jax.random.split(fake_key, updates))", "jnp.stack([fake_key] * updates))", [ALGORITHM]),
        # A batch that is not finite reaches the average; the latent reward model.
        (
            "select(good, average, state.ema)",
            "average",
            ["tests/test_step.py::test_a_batch_that_is_not_finite_changes_nothing_but_the_count"],
        ),
        (
            "select(good & _finite(metrics), ",
            "select(good, ",
            ["tests/test_step.py::test_a_reward_whose_regression_overflows_spares_the_latent_model"],
        ),
        # One fake-score update too few.
        ("config.fake_score.updates if", "-1 + config.fake_score.updates if", [ALGORITHM]),
        # It is trained without VSD; its samples are those before the update.
        ("updates if config.vsd.weight else 0", "updates", [ALGORITHM]),
        ("objectives.rollout(d, full(student)", "objectives.rollout(d, full(state.student)", [ALGORITHM]),
        # The target of consistency is the student itself.
        ("References(full(state.ema), full", "References(full(state.student), full", [GRADIENTS]),
        # The average forgets as fast as it should remember.
        ("share = 1 - config.student.ema_decay", "share = config.student.ema_decay", [ALGORITHM]),
        # The average is of the student before its update.
        ("incremental_update(student, state.ema,", "incremental_update(state.student, state.ema,", [ALGORITHM]),
        # The same noise in every micro-batch.
        ("    keys = jax.random.split(key, count)\n", "    keys = jnp.stack([key] * count)\n", [ALGORITHM]),
        # Gradients are summed over the micro-batches, so that accumulation changes the learning rate.
        ("lambda g: g / count, total)", "lambda g: g, total)", [ALGORITHM]),
        # Micro-batches of neighbours: not the rows whose captions the host scores.
        ("x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)", "x.reshape(count, -1, *x.shape[1:])", [ALGORITHM]),
        # Metrics of the last micro-batch instead of their mean.
        ("x.mean(0) if x.ndim == 1 else x", "x[-1] if x.ndim == 1 else x", [ALGORITHM]),
        # What is scored is of the first micro-batch.
        ("scored_rows(x[-1], config.reward.samples)", "scored_rows(x[0], config.reward.samples)", [ALGORITHM]),
        # The rollout is of the student before its update.
        ("method.samples(d, full(student),", "method.samples(d, full(state.student),", [ALGORITHM]),
        # The optimiser of the fake score forgets.
        (', "fake_score_optimiser": fake[1]}', "}", [ALGORITHM]),
        # The step does not count itself.
        ("step=state.step + 1", "step=state.step", [ALGORITHM]),
    ],
    "objectives.py": [
        ('if d.config.student.input == "forward":\n        t =', "if True:\n        t =", [ALGORITHM]),
        # The student is never trained at its last timestep.
        ("drawn, 0, len(times))", "drawn, 0, len(times) - 1)", [ALGORITHM]),
        # A timestep for every row where one was asked for all; CD in other steps, or not counting as much.
        ('timestep_per == "sample" else ()', 'timestep_per == "sample" else rows', [ALGORITHM]),
        ("(p.references.step + 1) % every", "p.references.step % every", [ALGORITHM]),
        ("step: c.consistency.every)", "step: 1)", [ALGORITHM]),
        # An update takes the first prediction of a rollout, whichever is drawn.
        ("0, len(samples)) ==", "0, 1) ==", [ALGORITHM]),
        # A weight that is ignored, a schedule that is.
        ("total + term.weight(d.config) *", "total +", [ALGORITHM]),
        ("* term.scale(d.config, references.step) *", "*", [ALGORITHM]),
        # The score is compared over half of its range.
        ("low + (high - low) * jax.random", "low + 0.5 * (high - low) * jax.random", [ALGORITHM]),
        ("shift=config.score_shift", "shift=schedule.shift", [ALGORITHM]),
        # The real score without guidance; the fake one in its place.
        (
            "batch, frozen.null_text, vsd_guidance(d.config, p.t, t)).x0(x_t, t)\n    else",
            "batch, frozen.null_text, 0.0).x0(x_t, t)\n    else",
            [GRADIENTS],
        ),
        # The discriminator is shown generated latents as real ones; the student is to be found out.
        (
            "schedules.add_noise(schedule, batch.latent, eps, t), t)",
            "x_t, t)",
            [f"{ALGORITHM}::test_step_is_algorithm_29[gan]"],
        ),
        ("softplus(-d.logit", "softplus(d.logit", [f"{ALGORITHM}::test_step_is_algorithm_29[gan]"]),
        # Decoupled guidance at the score's own state, or below the student's timestep.
        ("x0(x_n, noisier) for b", "x0(x_t, t) for b", [f"{ALGORITHM}::test_step_is_algorithm_29[decoupled]"]),
        ("low = jnp.clip(schedules.unif", "high = jnp.clip(schedules.unif", [OBJECTIVES]),
        ("generated, real, fake, c.normalisation", "generated, fake, real, c.normalisation", [GRADIENTS]),
        # A given frame is in a loss; it is noise.
        (
            "losses.denoising(*schedules.generated(schedule, prediction, goal))",
            "losses.denoising(prediction, goal)",
            [GIVEN],
        ),
        ("noise = d.start(x0, keys[1])", "noise = jax.random.normal(keys[1], x0.shape)", [GIVEN]),
        # Scores at the clean latent instead of the noised one.
        ("x_t = schedules.add_noise(d.schedule, x, jax.random.normal(keys[1], x.shape), t)", "x_t = x", [ALGORITHM]),
        ("c.normalisation, c.floor", '"dmd", c.floor', [ALGORITHM]),
        # A teacher's step too few or too many.
        (
            "np.linspace(a, b, config.consistency.skip + 1)",
            "np.linspace(a, b, config.consistency.skip + 2)",
            [OBJECTIVES, ALGORITHM],
        ),
        # An expert is asked beyond the boundary, in scores and in CD; a student goes on to the clean end there.
        ("low, high = jnp.clip(low, *ends), jnp.clip(high, *ends)", "pass", [EXPERTS]),
        ("inside[: -c.skip] & inside[c.skip :]", "inside[: -c.skip]", [EXPERTS]),
        ("[-1], schedule.time_range[0])", "[-1], 0.0)", [EXPERTS]),
        ("int(starts[-1]) + 1", "int(starts[-1])", [ALGORITHM]),
        # Consistency without its target's average, boundary or clean end.
        (
            "d.denoiser(references.ema, batch).x0(earlier, end)",
            "d.denoiser(frozen.teacher, batch).x0(earlier, end)",
            [GRADIENTS],
        ),
        ("schedule, f(x_t, times[0], prediction), target)", "schedule, prediction, target)", [ALGORITHM]),
        ("target, c.distance, c.huber_c)", 'target, "mse", c.huber_c)', [GRADIENTS]),
        # The student is differentiated through the teacher's steps' start.
        (
            'consistency.times == "student" and c.student.input == "forward"',
            'consistency.times == "student"',
            [ALGORITHM],
        ),
        (
            "p.generated, p.x_t, p.segments, batch)",
            "lax.stop_gradient(p.generated), p.x_t, p.segments, batch)",
            [GRADIENTS],
        ),
        # The fake score's noise is not what it was noised with.
        ('if c.fake_score.loss == "x0":', 'if c.fake_score.loss != "x0":', [ALGORITHM]),
        ("add_noise(schedule, generated, eps, t)", "add_noise(schedule, batch.latent, eps, t)", [ALGORITHM]),
        ("t * SCORE_BINS / schedule", "t * (SCORE_BINS - 1) / schedule", [ALGORITHM]),
    ],
    "losses.py": [
        ("jnp.square((x - jax.lax.stop_gradient(x)) + g)", "jnp.square(jax.lax.stop_gradient(x) - x + g)", [LOSSES]),
        (
            "norm = jnp.mean(distance, axis=tuple(range(1, x.ndim)), keepdims=True)",
            "norm = jnp.mean(distance, axis=0, keepdims=True)",
            [LOSSES],
        ),
        ("jnp.maximum(norm, floor)", "(norm + floor)", [LOSSES]),
        ("inside * (d - 0.5 * inside)", "inside * (d - inside)", [LOSSES]),
        ("jnp.square(d) + huber_c**2) + huber_c)", "jnp.square(d) + huber_c) + huber_c)", [LOSSES]),
        (
            "    return sigma_data**2 / total, scaled / jnp.sqrt(total)",
            "    return sigma_data**2 / total, scaled / total",
            [LOSSES],
        ),
        ("    return -_fp32(reward)", "    return _fp32(reward)", [LOSSES]),
        # Good rollouts become less likely.
        ("return advantage * _per_sample(", "return -advantage * _per_sample(", [GRADIENTS]),
        ("- _fp32(mean)) / _fp32(std)", "- _fp32(mean))", [GRADIENTS]),
        ("used = jnp.isfinite(reward) & (weight != 0)", "used = jnp.isfinite(reward)", [LOSSES]),
    ],
    "schedule.py": [
        (
            "jnp.where(t < 0, 0, jnp.clip(jnp.round(t), 0, schedule.num_train_timesteps - 1).astype(jnp.int32) + 1)",
            "jnp.clip(jnp.round(t), 0, schedule.num_train_timesteps - 1).astype(jnp.int32) + 1",
            [SCHEDULE],
        ),
        ("return cond + _like(jnp.asarray(weight", "return uncond + _like(jnp.asarray(weight", [SCHEDULE]),
        (
            "sigma = eta * b_next * jnp.sqrt(jnp.clip(1.0 - correlation**2",
            "sigma = eta * b_next * jnp.sqrt(jnp.clip(1.0 - correlation",
            [SCHEDULE],
        ),
        ("jnp.sqrt(jnp.maximum(b_next**2 - sigma**2, 0.0)) * eps", "b_next * eps", [SCHEDULE]),
        ('"conjugate_velocity": (one, -one)', '"conjugate_velocity": (-one, one)', [SCHEDULE]),
        ("alphas = np.cumprod(1.0 - betas)", "alphas = np.cumprod(1.0 - betas / 2)", [SCHEDULE]),
        ("jnp.clip(jnp.floor(total * u), 0, total - 1)", "jnp.clip(jnp.floor(total * u), 1, total - 1)", [SCHEDULE]),
        (
            "np.append(np.round(total - np.arange(num_steps) * (total / num_steps)) - 1, CLEAN)",
            "np.append(np.round(total - np.arange(num_steps) * (total / num_steps)), CLEAN)",
            [SCHEDULE],
        ),
    ],
    "sampling.py": [
        (
            "t_twice, interleave(text, null_text), *given, **told)",
            "t_twice, interleave(null_text, text), *given, **told)",
            [SAMPLING],
        ),
        # Rows go on beyond their own timestep.
        ("return jnp.where(running, x_next, x)", "return x_next", [ALGORITHM]),
        (
            "return x_t, times[k], jnp.concatenate",
            "return x_t, times[jnp.max(k)] + 0 * times[k], jnp.concatenate",
            [ALGORITHM],
        ),
        # Backward simulation is differentiated through.
        (
            "lax.stop_gradient((denoiser.params, denoiser.text, noise))",
            "(denoiser.params, denoiser.text, noise)",
            [ALGORITHM],
        ),
        # The student re-noises to where it is.
        (
            "schedules.add_noise(denoiser.schedule, x0, _noise(key, x), t_next)",
            "schedules.add_noise(denoiser.schedule, x0, _noise(key, x), t)",
            [SAMPLING],
        ),
        (
            "return jax.vmap(lambda one: jax.random.normal(one, x.shape[1:], x.dtype))(key)",
            "return jnp.broadcast_to(jax.random.normal(key[0], x.shape[1:], x.dtype), x.shape)",
            [SAMPLING],
        ),
    ],
    "state.py": [
        (
            "jnp.where(jnp.isfinite(reward).all(-1), weight, 0.0)",
            "jnp.where(jnp.isfinite(reward).any(-1), weight, 0.0)",
            [LATENT],
        ),
        ("decay * self.count + total", "self.count + total", [LATENT]),
        ("(1 - share) * (self.variance + share * jnp.square(change))", "(1 - share) * self.variance", [LATENT]),
        ("lambda x: x.astype(jnp.float32), start)", "lambda x: x, start)", [PROGRAM]),
        # The fake score loses blocks too.
        (
            '"fake_score": jax.tree.map(jnp.copy, master)}',
            '"fake_score": jax.tree.map(jnp.copy, own)}',
            ["tests/test_step.py::test_a_student_of_the_first_block_is_one_whose_second_adds_nothing"],
        ),
    ],
    "optim.py": [
        ("c.b1, c.b2", "c.b1, c.b1", [PROGRAM]),
        ("c.b2, c.eps, weight_decay", "c.b2, weight_decay", [PROGRAM]),
        ("weight_decay=c.weight_decay, mask=_decayed", "weight_decay=c.weight_decay", [LATENT]),
        ("config.final_ratio * peak", "config.final_ratio", [PROGRAM]),
        (
            "optax.chain(optax.clip_by_global_norm(c.clip_norm), update)",
            "optax.chain(update, optax.clip_by_global_norm(c.clip_norm))",
            [PROGRAM],
        ),
        (
            '"consistent_rms": 0.2',
            '"consistent_rms": 0.4',
            ["tests/test_step.py::test_muon_takes_the_stacked_kernels_as_torch_does"],
        ),
    ],
    "programs.py": [
        (
            "make_optimiser(config.fake_score.optimiser, config.steps * config.fake_score.updates)",
            "make_optimiser(config.fake_score.optimiser, config.steps)",
            [PROGRAM],
        ),
        (
            "make_optimiser(config.reward.optimiser, config.steps * config.reward.updates)",
            "make_optimiser(config.reward.optimiser, config.steps)",
            [PROGRAM],
        ),
        (
            "make_optimiser(config.student.optimiser, config.steps)",
            "make_optimiser(config.fake_score.optimiser, config.steps)",
            [PROGRAM],
        ),
        ("Distillation(config, networks, schedule, real)", "Distillation(config, networks, schedule)", [PROGRAM]),
    ],
    "rewards/methods/base.py": [
        # Half a reward's schedule.
        ("jnp.clip((since + 1) / max(c.ramp_steps, 1)", "jnp.clip(since / max(c.ramp_steps, 1)", [JAX]),
        (
            "jnp.where(since >= 0, jnp.clip(",
            "jnp.where(since >= 1, jnp.clip(",
            ["tests/test_objectives_rewards.py::test_reward_weight_follows_its_schedule"],
        ),
        ("weights / statistics.std, 0.0)", "weights, 0.0)", [JAX]),
        ("(raw - (statistics.mean if c.normalise else 0.0))", "raw", [JAX]),
        # What is scored is the head of the batch, or always a clip's first frames.
        ("return x.reshape(count, -1, *x.shape[1:])[:, 0]", "return x[:count]", [JAX]),
        ("latent.shape[1] - frames + 1)", "1)", [JAX]),
        # Captions do not follow their latents.
        (
            "jnp.repeat(x, len(latents), 0), (rows.text",
            "jnp.tile(x, (len(latents), *[1] * (x.ndim - 1))), (rows.text",
            [JAX],
        ),
        ("flat(jnp.stack(latents, 1))", "jnp.concatenate(latents)", [JAX]),
        ("statistics.mean[k]\n", "statistics.mean[0]\n", [JAX]),
        ("scale=reward_schedule, ", "", [JAX]),
    ],
    "rewards/methods/lrm.py": [
        # The latent reward does not reach the student.
        (
            "(params, p.generated, p.batch.text)",
            "(params, jax.lax.stop_gradient(p.generated), p.batch.text)",
            [GRADIENTS],
        ),
        # It regresses the first raw reward.
        ("reward=combined_reward(c, statistics, inputs.reward))", "reward=inputs.reward[..., 0])", [GRADIENTS]),
        # With what was known of the scale before.
        ("reward=combined_reward(c, statistics,", "reward=combined_reward(c, state.reward_statistics,", [JAX]),
        ("if pixels is not None and set(c.trained) <= set(pixels.columns):", "if False:", [JAX]),
        ("[generated, rows.latent] if d.score_real", "[generated, generated] if d.score_real", [JAX]),
        ("jnp.maximum(weight.sum(), 1.0)", "len(weight)", [JAX]),
        (
            "flat(samples.reward)[:, np.array(self.settings.trained)]",
            "flat(samples.reward)[:, : len(self.settings.trained)]",
            [JAX],
        ),
        # The host's part: the same rows in every step; rows that do not belong together.
        ("default_rng([self.seed, step])", "default_rng([self.seed, 0])", [SCORER]),
        ("default_rng([self.seed, step])", "default_rng([0, step])", [SCORER]),
        (
            'text[:, : self.state["text"].shape[1]].repeat(reward.shape[1], 0)',
            'np.tile(text[:, : self.state["text"].shape[1]], (reward.shape[1], 1, 1))',
            [SCORER],
        ),
        ("np.isfinite(reward).all(-1).ravel()", "np.isfinite(reward).any(-1).ravel()", [SCORER]),
        ('(int(self.state["added"]) + np.arange(good.sum()))', "np.arange(good.sum())", [SCORER]),
    ],
    "rewards/methods/ddpo.py": [
        # At the first timesteps instead of the last.
        ("timesteps[-states.shape[1] :]]", "timesteps[: states.shape[1]]]", [DDPO]),
        ("jnp.stack(states[-3:], 1)", "jnp.stack(states[:3], 1)", [DDPO]),
        # A rollout counts in every step to come.
        ("= np.full_like(taken.reward, np.nan)", "= taken.reward", [SCORER]),
        ("np.isfinite(reward[:, 0]).all(1)", "np.isfinite(reward[:, 0]).any(1)", [SCORER]),
        ("lambda g, r: g + beta * r", "lambda g, r: g + r", [DDPO]),
        (
            "advantage = combined_reward(c, statistics, inputs.reward)",
            "advantage = combined_reward(c, state.reward_statistics, inputs.reward)",
            [DDPO],
        ),
        ("dataclasses.replace(state, reward_statistics=statistics), metrics", "state, metrics", [DDPO]),
        ("min(3, len(self.config.student.timesteps))", "3", [PROGRAM]),
    ],
    "rewards/methods/direct.py": [
        ("raw[:, np.array(c.trained)])", "raw[:, : len(c.trained)])", [DIRECT]),
        (
            "random_run(rows(p.generated), c.latent_frames, key)",
            "random_run(p.generated[: c.samples], c.latent_frames, key)",
            [DIRECT],
        ),
        ("jnp.ones(len(raw)), self.settings.statistics_decay)", "jnp.ones(len(raw)), 1.0)", [DIRECT]),
    ],
    "rewards/reward.py": [
        # Of several numbers the first is taken for all; each is asked for anew.
        ("answer[part], len(frames)) for part", "answer[self.parts[0]], len(frames)) for part", [HTTP]),
        ("key = reward.function if", "key = i if", [HTTP]),
    ],
    "weights/torch_file.py": [
        # A transposed tensor is read in order, a part from the start; a tensor may be larger than its file.
        ("[size * stride for stride in self.strides]", "None", [TORCH]),
        ("data, size * self.offset, strides", "data, 0, strides", [TORCH]),
        ("math.prod(map(int, self.shape)) > count", "False", [TORCH]),
        ("if argument not in _GLOBALS:", "if False:", [TORCH]),
    ],
    "weights/clip.py": [
        ("red == fox or red[-1] != config.eos_token_id", "red == fox", [PUBLISHED]),
        ('yield f"{name}.weight", tensor.T', 'yield f"{name}.weight", tensor.T[::-1]', [PUBLISHED]),
    ],
    "models/clip.py": [
        ("x += self.temporal_embedding[...].astype(x.dtype)[:, None]", "pass", [PUBLISHED]),
        ("left_out=1)", "left_out=0)", [TOLD]),
    ],
    # The image's mask is elsewhere; the student is not told of its tokens.
    "models/wan.py": [
        ("x.dtype).at[:, 0].set(1)", "x.dtype).at[:, 1].set(1)", [CONDITIONED]),
        # Every block collects its modulations.
        ("modulation = activation_sharding.constrain(", "modulation = (lambda x, *_: x)(", ["tests/test_sharding.py"]),
    ],
    # Heads trade places on their way.
    "models/attention.py": [("b n (to heads) d -> to", "b n (heads to) d -> to", ["tests/models/test_attention.py"])],
    "models/layers.py": [
        ("out += attention(q, k, v, imp", "out -= attention(q, k, v, imp", [CONDITIONED]),
        # A student of fewer blocks has the first ones.
        ("np.linspace(0, there - 1, count).round()", "np.arange(count)", ["tests/models/test_layers.py"]),
    ],
    "models/embeddings.py": [("[[0, 1], [-1, 0]]", "[[0, -1], [1, 0]]", ["tests/models/test_wan_parity.py"])],
    # Chips of a video in a line; rows that do not divide whole everywhere.
    "sharding.py": [
        ("min(free, key=lambda axis: block[axis])", "max(free)", ["tests/test_sharding.py"]),
        ("for spec in specs:\n", "for spec in specs[:1]:\n", ["tests/test_sharding.py"]),
    ],
    # The taps of a narrow convolution in the wrong order.
    "models/wan_vae.py": [("[*kernel], -2)", "[*kernel[::-1]], -2)", ["tests/models/test_wan_vae_parity.py"])],
    # A smaller decoder is not used.
    "generate.py": [
        ("signed_range(frames)[:, None], ((0, 0), (0,", "signed_range(frames)[:, None], ((0, 0), (1,", [TOLD]),
        # The student's program is declared for all blocks.
        ("student_shapes(network, g.student.layers)", "student_shapes(network, None)", [DECLARED]),
        ("schedule=own, vae=vae)", "schedule=own)", [DECODER]),
        (
            "np.split(np.asarray(videos), parts)))",
            "np.split(np.asarray(videos), parts)[::-1]))",
            ["tests/test_generate.py"],
        ),
    ],
    "export.py": [("num_layers=c.student.layers or", "num_layers=", ["tests/test_export.py"])],
    # The best is taken for the slowest; its state is shared further although it did not fit.
    "plan/planner.py": [
        ("found, changes = min(fitting", "found, changes = max(fitting", [WHOLE]),
        ("if not found.fits or mesh", "if mesh", [WHOLE]),
    ],
    "plan/training.py": [("(own + 1) * share + ", "(own + 1) + ", ["tests/plan/test_training.py"])],
    "rewards/scorer.py": [
        # The captions of another micro-batch, or of rows beside the scored ones.
        ("[self.accumulation - 1 :: self.accumulation]", "[:: self.accumulation]", [SCORER]),
        ("rows.reshape(len(here), -1)[:, 0]", "rows[: len(here)]", [SCORER]),
        ("for i in rows.repeat(kinds)]", "for i in np.tile(rows, kinds)]", [SCORER]),
        ('np.asarray(batch["text"])[rows]', 'np.asarray(batch["text"])[: len(rows)]', [SCORER]),
        ("samples.reward[..., self._trained]", "samples.reward[..., : len(self._trained)]", [SCORER]),
        ("self.monitor.add(samples.predicted[:, 0]", "self.monitor.add(samples.predicted[:, -1]", [SCORER]),
        ("[:, 0][:, self._held_out])", "[:, 0][:, self._trained])", [SCORER]),
        ("row[:, self._trained] @ weights", "row[:, self._trained].sum(1)", [SCORER]),
        ("        self.latest = {}\n        if self._pending", "        if self._pending", [SCORER]),
        ("        reward[~np.isfinite(samples.latent).all((2, 3, 4, 5))] = np.nan\n", "", [SCORER]),
        ("np.where(samples.scale.any(1)", "np.where(samples.scale.all(1) | True", [SCORER]),
    ],
    "rewards/monitor.py": [
        ("known.mean() > self.state", "known.mean() < self.state", [SCORER]),
        ("[self.state[name], rows])[len(rows) :]", "[self.state[name], rows])[: len(self.state[name])]", [SCORER]),
        ('if not np.isfinite(self.state["pairs"]).all():', "if False:", ["tests/rewards/test_monitor.py"]),
        (
            "correlation < guard.min_correlation",
            "correlation > guard.min_correlation",
            ["tests/rewards/test_monitor.py"],
        ),
        (
            "(peak - known.mean()) / max(deviation, floor)",
            "(peak - known.mean()) / floor",
            ["tests/rewards/test_monitor.py"],
        ),
    ],
    "rewards/pixels.py": [
        (
            "columns[i] = jnp.where(finite & (jnp.abs(values) <= LARGEST), values, jnp.nan)",
            "columns[i] = values",
            ["tests/test_objectives_rewards.py"],
        ),
        ('params["rewards"][name], frames, words)', 'params["rewards"][self.labels[0]], frames, words)', [JAX]),
    ],
    "rewards/host.py": [
        (
            "for attempt in range(1 + self.retries)",
            "for attempt in range(self.retries)",
            ["tests/rewards/test_host.py"],
        ),
        (
            "frames = np.array(self.frames, np.float32)",
            "frames = np.asarray(self.frames, np.float32)",
            ["tests/rewards/test_host.py"],
        ),
        (
            "self._pause, self._next_pause = self._next_pause, 2 * self._next_pause",
            "self._pause = self._next_pause",
            ["tests/rewards/test_host.py"],
        ),
    ],
    "hlo.py": [
        # A reduce-scatter counts its result, a loop once.
        (
            '"reduce-scatter": group - 1 if i.opcode == kind else share',
            '"reduce-scatter": share',
            ["tests/test_hlo.py"],
        ),
        ('"all-reduce": 2 * share', '"all-reduce": share', ["tests/test_hlo.py"]),
        ("v * times for k, v", "v for k, v", ["tests/test_hlo.py"]),
        (' or "AllocateBuffer" in i.rest', "", ["tests/test_hlo.py"]),
        ("v in inner.items() if not isinstance(k, Work)})", "v in inner.items()})", ["tests/test_hlo.py"]),
        ("w.bytes / bytes, w.cycles / cycles", "w.bytes / bytes", ["tests/test_hlo.py"]),
        # What a v7x's SparseCores send is not seen.
        ('_APART = {"async-start", "call-start"}', '_APART = {"async-start"}', [LINKS]),
        # An axis' inner part taken for its outer one; what waits taken for what does not.
        ("shape += [before, part, int(size)", "shape += [1, part, before * int(size)", [LINKS]),
        ('i.opcode != kind or "async', 'False or "async', [LINKS]),
        # Each part of a gathering taken for a whole one; a program's parts one after another.
        ("in COLLECTIVES and not _goes_on(i)", "in COLLECTIVES", [LINKS]),
        ("max(w.flops / flops, w.bytes", "max(w.flops / flops + w.bytes", [LINKS]),
    ],
    "plan/links.py": [
        # Every axis a ring; groups that lie between each other, each with the links for itself; the long way round.
        ("self.rings[axis] and len(at)", "len(at)", [LINKS]),
        ("== self.sizes[axis])) / apart", "== self.sizes[axis]))", [LINKS]),
        ("+ sum(here) % 2 > size", "> 2 * size", [LINKS]),
        ("sums[True]) + sums[False]", "sums[True])", [LINKS]),
    ],
    "monitoring.py": [
        # TensorBoard hides the last checkpoint's events, or shows those twice that are logged again.
        ("purge_step=first + 1", "purge_step=first or None", [LOG]),
        ("truncate_history(workdir, first)", "truncate_history(workdir, 10**9)", [LOG]),
        (
            "step % self.config.log_every == 0:\n            self._write()\n",
            "step % self.config.log_every == 0:\n",
            [LOG],
        ),
        ('values["latent_mean"] - values["data_mean"]', 'values["latent_mean"]', [LOG]),
        (
            "if all(map(math.isfinite, values.values()))",
            "if not any(map(math.isinf, values.values()))",
            [f"{MONITORING}::test_of_a_step_that_is_not_finite_nothing_is_logged_but_what_the_host_knows"],
        ),
        (
            "(student.vendi - 1) / max(teacher.vendi - 1, 1e-9)",
            "student.vendi / teacher.vendi",
            [f"{MONITORING}::test_diversity_is_of_the_videos_beyond_the_first"],
        ),
        (
            "        self._known = True\n",
            "",
            [f"{MONITORING}::test_the_teacher_is_sampled_once_and_only_when_it_is_due_also_by_a_resumed_run"],
        ),
    ],
    "run.py": [
        ('if parse_json(line, path)["step"] <= step:', 'if parse_json(line, path)["step"] < step:', [LOG]),
        (
            'name = "ema" if ema else "student"',
            'name = "student"',
            ["tests/test_train.py::test_the_student_is_restored_from_its_item_alone"],
        ),
    ],
    "train.py": [
        ("jax.random.key(config.seed)", "jax.random.key(0)", [TOGETHER]),
        ("scorer.inputs(step, captions", "scorer.inputs(0, captions", [TOGETHER]),
        ("scorer.submit(samples, read, captions)", "scorer.submit(samples, read, captions[::-1])", [TOGETHER]),
        ("student = state.ema\n", "student = state.student\n", [TOGETHER]),
        ('scorer.state = items.pop("replay")', 'items.pop("replay")', [RESUMED]),
        (
            'for name in ("student", "ema", "fake_score")})',
            'for name in ("student", "fake_score")})',
            ["tests/test_train.py::test_a_run_goes_on_from_another_ones_student"],
        ),
        ("                if saving and scorer is not None:\n                    scorer.collect()\n", "", [RUN]),
    ],
    "checkpoint.py": [
        ("self.steps()[self.keep :]", "self.steps()[1:]", [RUN]),
        ("item.set_state(restored[name])", "item.get_state()", [RESUMED]),
        # A damaged checkpoint is used; or moved aside by who only reads.
        ("if not self._agree(step, fault := self._fault(path, like)):", "if self._fault(path, ()):", [DAMAGE]),
        (
            'path, moved = self.folder / str(step), ""\n            if self.keep',
            'path, moved = self.folder / str(step), ""\n            if not self.keep',
            [DAMAGE],
        ),
    ],
    "files.py": [
        ("if value != listed[name]]", "if False]", ["tests/test_checkpoint.py::test_processes_check_a_share_each"]),
        ('if about and first != f"# {about}":', "if False:", [DAMAGE]),
        ("if added := sorted(", "if added := set() and sorted(", [DAMAGE]),
    ],
    "distributed.py": [
        # A save that fails because another process died is taken for a full disk.
        (
            "return bool(said) or _is_lost(error.__cause__ or error.__context__)",
            "return bool(said)",
            ["tests/test_distributed.py::test_what_is_left_of_a_run_says_that_a_process_died"],
        )
    ],
    "prepare/shards.py": [
        # All samples of a prompt are the same; or are drawn without guidance.
        ("fold(fold(key, clip.index), clip.number)", "fold(fold(key, clip.index), 0)", [SAMPLES]),
        (
            "teacher_sampler(c.num_steps, c.guidance_weight)\n        latents",
            "teacher_sampler(c.num_steps, 1.0)\n        latents",
            [SAMPLES],
        ),
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows in whose `file: new text` this regular expression is found")
    parser.add_argument("--check", action="store_true", help="only look whether every old text is found once")
    options = parser.parse_args()
    rows = [(file, *row) for file, fault in FAULTS.items() for row in fault]
    wrong = [
        f"{file}: found {count} times: {old!r}" for file, old, _, _ in rows if (count := occurrences(file, old)) != 1
    ]
    if wrong:
        print(*wrong, sep="\n")
        return 2
    print(f"{len(rows)} faults in {len(FAULTS)} files, each found once")
    if options.check:
        return 0
    rows = [row for row in rows if re.search(options.only, f"{row[0]}: {row[2]}")]
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        return measure(rows, Path(folder))


def occurrences(file: str, text: str) -> int:
    path = ROOT / "dollar_jax" / file
    return path.read_text().count(text) if path.is_file() else 0


def measure(rows: list[tuple[str, str, str, list[str]]], folder: Path) -> int:
    """Runs the rows' tests in a copy of the repository."""
    for name in ("dollar_jax", "configs", "tests", "docs", "pyproject.toml"):
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    os.chdir(folder)
    sys.path[:0] = [str(folder)]
    sys.dont_write_bytecode = True  # bytecode goes by seconds, and rows are faster
    os.environ.update(JAX_PLATFORMS="cpu", PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    survivors, sound = [], set()
    for number, (file, old, new, names) in enumerate(rows, 1):
        for name in names:
            if name not in sound and (answer := run_tests([name], folder))[0]:
                print(answer[1], f"{name} fails without any fault.", sep="\n")
                return 2
            sound.add(name)
        path, begun = folder / "dollar_jax" / file, time.perf_counter()
        right = path.read_text()
        path.write_text(right.replace(old, new))
        try:
            code, output = run_tests(names, folder)
        finally:
            path.write_text(right)
        if code not in (0, 1):
            print(output, f"{file}: the tests could not run with {new!r}", sep="\n")
            return 2
        said = "noticed" if code else "NOT NOTICED"
        print(f"{number:3}/{len(rows)} {said} in {time.perf_counter() - begun:.0f} s  {file}: {new!r}", flush=True)
        if not code:
            survivors.append(f"{file}: {old!r} → {new!r}, by {', '.join(names)}")
    noticed = len(rows) - len(survivors)
    print(f"{noticed} of {len(rows)} faults noticed: {100 * noticed / max(len(rows), 1):.1f}%")
    print(*survivors, sep="\n")
    return int(bool(survivors))


def run_tests(names: list[str], folder: Path) -> tuple[int, str]:
    """Pytest's exit code and output; 1 also for tests that do not end."""
    log = folder / "output.txt"
    child = os.fork()
    if not child:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = 3
            try:
                import pytest

                code = int(pytest.main(["-q", "-x", "-n0", "--tb=short", *QUIET, *names]))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    until = time.perf_counter() + TIMEOUT
    while time.perf_counter() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return (os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1), log.read_text()
        time.sleep(0.2)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return 1, log.read_text()


if __name__ == "__main__":
    sys.exit(main())
