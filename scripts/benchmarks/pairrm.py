"""PairRM here against LLM-Blender's own rank loop: same weights, same texts, same CPU thread.

LLM-Blender scores the K(K - 1) ordered pairs of 8 prompts (its default) one (i, j) after the
other, each batch as the prompts come and as long as its longest. Here the pairs of all prompts (a
shard) are sorted by length first, and a batch has a budget of tokens. Both run in float32; seconds
are the process's own CPU time, because machines are shared, and the two alternate. Weights are
random: time does not depend on them.

Texts are made of words that are one token each, with the lengths of sampled answers: a prompt has
20 to 400 tokens, its answers have a typical length of 20 to 400 (both log-uniform), and one answer
differs from it by a factor exp(0.3 N(0, 1)).

    python scripts/benchmarks/pairrm.py                # minutes
    python scripts/benchmarks/pairrm.py --quick        # under a minute

llm-blender 0.0.2 does not import with transformers 5; `import_llm_blender` says how it is made to.
The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import time
import types
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparring.alignment.judges.deberta import DebertaV2Config, DebertaV2PairRM
from sparring.alignment.judges.pairrm import PairRM
from sparring.alignment.judges.pairrm_layouts import (
    ADDED_TOKENS,
    CANDIDATE_TOKENS,
    MARKER_KEYS,
    MARKERS,
    SOURCE_TOKENS,
)

WORDS = 4000
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")


def import_llm_blender() -> types.ModuleType:
    """The package llm_blender 0.0.2 on transformers 5.

    It asks for a constant that transformers has removed, for dataclasses-json (of which it uses
    to_dict and from_dict alone, not needed here), and imports vllm to see whether it is there.
    """
    if "llm_blender" in sys.modules:
        return sys.modules["llm_blender"]
    import transformers.utils.hub as hub

    stub: Any = types.ModuleType("dataclasses_json")
    stub.dataclass_json = lambda cls: cls
    before = {name: sys.modules.get(name) for name in ("dataclasses_json", "vllm")}
    sys.modules["dataclasses_json"] = stub
    sys.modules["vllm"] = None  # type: ignore[assignment]
    hub.TRANSFORMERS_CACHE = ""
    try:
        return importlib.import_module("llm_blender")
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def blender_of(
    model: DebertaV2PairRM,
    tokenizer: Any,
    source_tokens: int = SOURCE_TOKENS,
    candidate_tokens: int = CANDIDATE_TOKENS,
) -> Any:
    """LLM-Blender's Blender with its own ranker class and collator, on a model's weights.

    Its `logits` lists the (prompts, K, K) matrices of each call of `rank`.
    """
    package = import_llm_blender()
    parts = importlib.import_module("llm_blender.pair_ranker.model_util")
    settings = package.RankerConfig(
        ranker_type="pairranker",
        model_type="deberta",
        source_maxlength=source_tokens,
        candidate_maxlength=candidate_tokens,
        n_tasks=model.config.n_tasks,
        device="cpu",
    )
    # transformers 5 has no batch_encode_plus; calling the tokenizer is the same.
    tokenizer.batch_encode_plus = lambda texts, **options: tokenizer(texts, **options)
    backbone = type(model.pretrained_model)(model.config)
    backbone.config.out_hidden_state_size = backbone.config.hidden_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of its own
        collator = parts.build_collator("pairranker", tokenizer, source_tokens, candidate_tokens)
        ranker = parts.CrossCompareReranker(backbone, settings, tokenizer)
    ranker.load_state_dict(model.state_dict())
    blender = package.Blender.__new__(package.Blender)  # its __init__ only warns about no ranker
    blender.blender_config = package.BlenderConfig(device="cpu", use_tqdm=False)
    blender.ranker, blender.ranker_config = ranker.eval(), settings
    blender.ranker_tokenizer, blender.ranker_collator = tokenizer, collator
    blender.logits = []
    predict = ranker._full_predict

    def recorded(**batch: Any) -> Any:
        outputs = predict(**batch)
        blender.logits.append(outputs["logits"].numpy())
        return outputs

    ranker._full_predict = recorded
    return blender


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words as tokens, with DeBERTa's special tokens and PairRM's markers."""
    vocabulary = [*SPECIAL, *ADDED_TOKENS, *(f"w{n}" for n in range(WORDS))]
    core = Tokenizer(
        models.WordLevel({token: n for n, token in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        additional_special_tokens=list(ADDED_TOKENS),
    )


def random_model(hidden: int, layers: int, tokenizer: Any) -> DebertaV2PairRM:
    """DeBERTa-v3's architecture with PairRM's head, small and untrained."""
    torch.manual_seed(0)
    markers = zip(MARKER_KEYS, MARKERS, strict=True)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
        position_biased_input=False,
        n_tasks=1,
        drop_out=0.05,
        initializer_range=0.1,
        **{key: tokenizer.convert_tokens_to_ids(marker) for key, marker in markers},
    )
    return DebertaV2PairRM(config).eval()


def texts(prompts: int, k: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Prompts and their K answers; see the top of the file."""
    draw = random.Random(seed)

    def words(length: float) -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(min(max(int(length), 20), 400)))

    def log_uniform() -> float:
        return 20 * 20 ** draw.random()

    questions = [words(log_uniform()) for _ in range(prompts)]
    typical = [log_uniform() for _ in range(prompts)]
    answers = [[words(t * np.exp(0.3 * draw.gauss(0, 1))) for _ in range(k)] for t in typical]
    return questions, answers


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(hidden: int, layers: int, prompts: int, k: int, repeats: int) -> dict[str, Any]:
    """Both arms in turn, `repeats` times, each time on new texts."""
    tokenizer = word_tokenizer()
    model = random_model(hidden, layers, tokenizer)
    blender = blender_of(model, tokenizer)
    theirs_s, ours_s, difference = [], [], 0.0
    questions, answers = texts(2, 2, seed=repeats)  # a first call of each, not timed
    blender.rank(questions, answers)
    PairRM(model, tokenizer).matrix(questions, answers)
    for repeat in range(repeats):
        questions, answers = texts(prompts, k, seed=repeat)
        judge = PairRM(model, tokenizer)
        blender.logits.clear()

        def ours(judge: PairRM = judge, q: Any = questions, a: Any = answers) -> Any:
            return judge.matrix(q, a)

        def theirs(q: Any = questions, a: Any = answers) -> Any:
            return blender.rank(q, a, return_scores=True)

        turns = [(theirs_s, theirs), (ours_s, ours)]
        found = {}
        for place in (0, 1) if repeat % 2 == 0 else (1, 0):
            spent, found[place] = seconds(turns[place][1])
            turns[place][0].append(spent)
        difference = max(difference, float(np.abs(np.concatenate(blender.logits) - found[1]).max()))
        print(
            f"repeat {repeat}: LLM-Blender {theirs_s[-1]:.1f} s, here {ours_s[-1]:.1f} s",
            file=sys.stderr,
        )
    ratios = [theirs / ours for theirs, ours in zip(theirs_s, ours_s, strict=True)]
    return {
        "speedup_vs_llm_blender": round(median(ratios), 2),
        "lowest": round(min(ratios), 2),
        "highest": round(max(ratios), 2),
        "max_abs_logit_diff": difference,
        "llm_blender_seconds": round(median(theirs_s), 2),
        "seconds": round(median(ours_s), 2),
        "hidden": hidden,
        "layers": layers,
        "prompts": prompts,
        "k": k,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def main(arguments: list[str]) -> None:
    """Measure, and print JSON as the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer prompts")
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options.pop("threads"))
    if options.pop("quick"):
        options |= {"hidden": 128, "layers": 1, "prompts": 8, "repeats": 3}
    with redirect_stdout(sys.stderr):  # the last line of standard output is the result
        result = measure(**options)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
