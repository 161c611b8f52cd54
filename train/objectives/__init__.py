"""What a train step minimises: one module for each objective.

An objective is a module with the five functions of `train.objectives.contract.Objective`:

- `resolve_loss(config, model_config)` returns the `[loss]` settings with defaults filled in, and refuses with a
  `ConfigError` what the model cannot do. It runs once, before anything is compiled.
- `whole_batch(batch, micro_batches)` returns the counts of the whole batch by which the sums over a micro-batch are
  divided. The losses of all micro-batches have to add up to the loss of the step.
- `forward(model, batch, noise_key)` calls the model on a micro-batch [B,T]. The output has the attribute `router`:
  a `RouterOutput`, or None for a dense model. In eval mode `noise_key` is None.
- `training_loss(out, batch, whole, config)` returns a registered dataclass of float32 scalars. `total` is what is
  differentiated, `cross_entropy` what progress lines show; the others are reported as they are.
- `heldout_sum(out, batch)` returns a `HeldoutSum`, whose quotient is the held-out loss.

`train/step.py` differentiates `training_loss` and accumulates micro-batches; `train/program.py` names the objective of
a run. A new setting is a field of `LossConfig` in `train/config/sections.py`. `language_modelling.py` is the example;
its reference is `tests/train/test_against_transformers.py`.
"""
