"""Small real things that many tests share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is no failure: tests assert what is computed, not how soon.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Two cores: without this every process of a test starts two threads and they fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Importable here and in the processes that a test starts.
PLUGINS = Path(__file__).parent / "plugins"
sys.path.insert(0, str(PLUGINS))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PLUGINS), os.getenv("PYTHONPATH")]))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a tokenizer of single characters and a chat template."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    characters = "abcdefghijklmnopqrstuvwxyz .,?!:\n"
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: n for n, token in enumerate([*specials, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.pad_token = "</s>"
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 distinct prompts in the tiny model's alphabet, with human responses full of "a"."""
    words = ("the", "cat", "sat", "on", "a", "mat", "big", "dog", "ran", "far")
    path = tmp_path_factory.mktemp("tiny-prompts") / "prompts.jsonl"
    rows = [
        {
            "prompt_id": f"p{n}",
            "prompt": " ".join(words[n // 10**d % 10] for d in range(3)) + "?",
            "real": "aha" * (1 + n % 3) + words[n % 7],
        }
        for n in range(160)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_chain(
    tiny_model: Path, tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Artifacts of one iteration up to training, each made by its stage, and "model"."""
    from sparring.alignment.stages import STAGES
    from sparring.launch.stages import LaunchConfig, Step, execute

    folder = tmp_path_factory.mktemp("tiny-chain")
    launch = LaunchConfig(inline=tuple(STAGES))
    made = {"model": tiny_model}

    def make(kind: str, sources: dict[str, str], **settings: object) -> None:
        stage = STAGES[kind]
        step = Step(kind, stage, stage.config(**settings), {}, seed=1)
        inputs = {key: made[source] for key, source in sources.items()}
        made[kind] = folder / kind
        execute(step, inputs, made[kind], launch, logs=folder, on_event=lambda _: None)

    make("prompts", {}, source=str(tiny_prompts), train=24, heldout=8)
    generated = {"engine": "transformers", "k": 4, "max_new_tokens": 16, "chunk": 5}
    make("generate", {"model": "model", "prompts": "prompts"}, **generated)
    make("judge", {"prompts": "prompts", "responses": "generate"}, name="letter_judge:make")
    judged = {"prompts": "prompts", "responses": "generate", "judged": "judge"}
    make("pair", judged, rule="best-worst")
    make("reference", {"model": "model", "pairs": "pair"}, batch=4)
    return made
