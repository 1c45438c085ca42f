"""A short LoRA fine-tuning of a backbone on one label-word task."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from raee_serve.errors import RaeeError
from raee_serve.table.datasets import Example
from raee_serve.table.task import Task, prompt_token_ids

RANK, LEARNING_RATE = 8, 5e-4
BATCH, EXAMPLES = 16, 640
TARGETS = ["q_proj", "v_proj"]


def finetuned(
    checkpoint: Path, task: Task, examples: Sequence[Example], seed: int, target: Path
) -> Path:
    """`target`: the checkpoint after one pass over EXAMPLES of the examples, adapters merged.

    The loss is that of the gold label's first token after the prompt, among all tokens.
    Raises RaeeError without the peft package.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as e:
        raise RaeeError("fine-tuning needs peft: install raee-serve[finetune]") from e
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    adapted: Any = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    )
    _train(adapted, tokenizer, task, random.Random(seed).sample(list(examples), len(examples)))
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    adapted.merge_and_unload().save_pretrained(target)
    return target


def _train(model: Any, tokenizer: Any, task: Task, examples: Sequence[Example]) -> None:
    labels = torch.tensor(task.label_token_ids(tokenizer))
    used = sorted(examples[:EXAMPLES], key=lambda e: len(e.text))  # little padding
    batches = [used[first : first + BATCH] for first in range(0, len(used), BATCH)]
    random.Random(0).shuffle(batches)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE
    )
    model.train()
    for batch in tqdm(batches, desc=f"fine-tuning on {task.name}", unit="batch"):
        prompts = [prompt_token_ids(tokenizer, task.render(e.text)) for e in batch]
        golds = labels[[int(e.gold) for e in batch]]
        loss = functional.cross_entropy(_last_logits(model, prompts), golds)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _last_logits(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[n, vocabulary] after each prompt; padding on the right is never attended to."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    decoder = model.get_base_model()
    hidden = decoder.model(input_ids=padded, use_cache=False).last_hidden_state
    logits: torch.Tensor = decoder.lm_head(hidden[torch.arange(len(prompts)), last])
    return logits
