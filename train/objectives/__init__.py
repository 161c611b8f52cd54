"""What a train step minimises: one module for each objective, and `chosen.objective_of`, which picks that of a run.

An objective has a `description` and the functions of `train.objectives.contract.Objective`. `language_modelling` is a
module with them; an objective with a table of its own in the TOML file is a frozen dataclass around that table. Adding
one is: its config class in `train/config`, named in `SECTIONS`, `OBJECTIVE_TABLES` and `TrainConfig`; its module here,
named in `chosen.py`; and what it reads, in `train/data`.

On the host, before the first step:

- `load_corpus(folder, config)` opens what the run reads in `folder`, or makes it there at the run's first start.
- `feed(config, corpus, mesh, sharding)` returns a `train.data.feed.Feed`, which gives the batch of each step and the
  held-out batches. A batch is any pytree of arrays [B, …], B examples over all axes that share the batch. A feed may
  use the run's own arrays: `prepare` is given the parameters before the first step (outputs of a reference or a
  teacher are computed there, and stored in the run's folder), `training` those before each step (rollouts), and
  `evaluate`, for held-out metrics that the host computes. `memory` says what it holds on the devices, `close` ends it.
- `abstract_batch(config, model)` returns the shapes and dtypes of a batch.
- `model_config(model, corpus)` returns the model's config, with the number of labels, say.
- `resolve_loss(config, model)` returns the `[loss]` settings with defaults filled in, and refuses with a `ConfigError`
  what the model cannot do.

In the compiled steps:

- `whole_batch(batch, micro_batches)` returns the counts of the whole batch by which the sums over a micro-batch are
  divided. The losses of all micro-batches have to add up to the loss of the step.
- `forward(model, batch, noise_key)` calls the model on a micro-batch. The output has the attribute `router`: a
  `RouterOutput`, or None for a dense model. In eval mode `noise_key` is None.
- `training_loss(out, batch, whole, config)` returns `total`, which is differentiated, and `terms`: float32 scalars by
  the names under which they are logged, plotted and reported. `router.router_losses` has those of the routers.
- `heldout_sum(out, batch)` returns a pytree of sums, which are added up over the held-out batches;
  `heldout_metrics(sums)` makes named numbers of them on the host, `loss` among them.

`train/step.py` differentiates `training_loss` and accumulates micro-batches.
`train/loop.py` calls the feed, and reports.
The reference of `language_modelling.py` is `tests/train/test_against_transformers.py`.
"""
