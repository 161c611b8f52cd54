"""Continuations of a prompt during training: printed, kept in metrics.jsonl, and listed in the report."""

from flax import nnx
from tokenizers import Tokenizer

import qwen_moe_jax as qmj
from train.config import RunConfig
from train.parameters import Params
from train.reporting.progress import NoReport, Report


class Sampler:
    """Continues `run.sample_prompt` with the package's own engine, from the sharded parameters, in eval mode.

    The engine's programs are compiled for the first sample and reused. They keep no reference to the parameters, whose
    memory the next step may reuse.
    """

    def __init__(self, config: RunConfig, eval_graph: nnx.GraphDef, tokenizer: Tokenizer) -> None:
        self._every = config.eval_steps if config.sample_steps is None else config.sample_steps
        self._last_step = config.steps
        self._prompt, self._max_new_tokens = config.sample_prompt, config.sample_tokens
        self._eval_graph, self._tokenizer = eval_graph, tokenizer

    def sample(self, step: int, params: Params, report: Report | NoReport) -> None:
        """Generates and reports a sample if one is due after this step; the last one is left to the exported model."""
        if self._every and step % self._every == 0 and step < self._last_step:
            model = nnx.merge(self._eval_graph, params)
            with report.aside("sample"):
                [text] = qmj.generate(
                    model, [self._prompt], max_new_tokens=self._max_new_tokens, tokenizer=self._tokenizer
                )
            report.sample(step, self._prompt, str(text))
