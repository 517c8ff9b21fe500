"""Training of MOSS-Audio: data -> loss -> steps -> checkpoints. To change X, go to Y:

__main__           commands and their options: argv -> a call into the modules below
config             options of a run, as dataclasses
recipes            defaults of those options for pretraining, fine-tuning and the demo
loop               a run from start to end: data, steps, checkpoints, evaluations
step               one training step: loss, gradients, update
state              what a step changes: parameters, moments, counts
batch              arrays of a batch: shapes, sharding, microbatches
loss               cross-entropy without the whole logits in memory
optimizer          AdamW, schedules, which parameters are trained
initialization     starting parameters: a checkpoint, released parts, or random
ablation           comparison of runs with and without a change
ablation_config    options of the ablation
ablation_report    tables of the ablation
data               manifests -> packed batches; imports moss_audio_jax alone
evaluation         questions with known answers -> measures; imports data
reinforce          post-training by reward: answers drawn from the model -> rewards -> updates
planning           memory and speed of a recipe on TPUs that need not be present
running            a run's directory, checkpoints, reports, validation, processes

Each package has a map of its modules in its docstring. Common changes:

    format of a manifest: data.manifest             tokens of an example: data.samples
    questions and prompts: data.objectives          share of each source: data.mixture_config, data.mixture
    augmentation: data.augment                      workers, hosts, exact resume: data.pipeline, data.lanes
    another benchmark: evaluation.question_files    another metric: evaluation.metrics, evaluation.measures
    another TPU: planning.chips                     figures of a step: loop, running.figures, running.report
    a reward: reinforce.rewards                     the objective of reward: reinforce.objective
    a new option: config, data.config, recipes      options that may change on resume: running.resume
    contents of a checkpoint: running.checkpoints   where metrics go: running.report, running.sink
"""
