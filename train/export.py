"""The end of a run: hub/ and adapter/ in the Hub's layout, and a sample from the folder that others will load."""

import qwen_moe_jax as qmj
from qwen_moe_jax.sharding.distributed import is_process_zero, num_processes
from train.config import TrainConfig
from train.data.corpus import Corpus, copy_tokenizer
from train.folder import RunFolder


def export(trained: qmj.CausalLM, config: TrainConfig, folder: RunFolder, corpus: Corpus) -> str:
    """Writes what the config asks for, and returns the continuation of `run.sample_prompt`.

    The sample is of the exported model, loaded again, where one is exported.

    Args:
        trained: the model in eval mode. Its adapters are merged into its weights.
    """
    if config.lora is not None:
        qmj.save_adapter(trained, folder.adapter, base=config.run.model_name_or_path)
    if config.run.export:
        if config.lora is not None:
            qmj.merge_lora(trained)
        if is_process_zero():
            copy_tokenizer(folder.corpus / "tokenizer", folder.hub)
        qmj.save_pretrained(trained, folder.hub)
        trained = qmj.from_pretrained(folder.hub, mesh=trained.mesh if num_processes() > 1 else None)
    prompt = config.run.sample_prompt
    [sample] = qmj.generate(trained, [prompt], max_new_tokens=config.run.sample_tokens, tokenizer=corpus.tokenizer)
    return str(sample)
