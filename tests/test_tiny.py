"""The whole life of a note on a tiny model: open, read data, attach, train, save, load, answer, merge, detach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import postil
from postil.base import live_digest

QUESTION, ANSWER = "Where is my order?", "On its way."


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory as the hub has them: a random Llama of two layers whose every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=256, eos_token_id=257, pad_token_id=257,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_whole_life_of_a_note(directory: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    rows = [{"prompt": QUESTION, "completion": ANSWER}] * 8
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    base = postil.load_base(directory)
    digest = live_digest(base.model)
    data = postil.load_data(tmp_path / "train.jsonl", base)
    assert data.report.target_tokens == 8 * (len(ANSWER) + 1)  # the end of the turn is learned too

    model = postil.attach(base, postil.LoraConfig(r=8, alpha=16, target_modules="all-linear"))
    losses: list[float] = []
    adapter = postil.train(
        model, data, steps=100, learning_rate=1e-2, warmup=10, out=tmp_path / "run",
        watch=lambda event: losses.append(event["loss"]),
    )  # fmt: skip
    assert losses[-1] < 0.1 < 4 < losses[0]
    assert adapter is not None
    postil.detach(model)
    assert live_digest(base.model) == digest

    place = postil.save_adapter(adapter, tmp_path / "note")
    loaded = postil.load_adapter(place)
    assert all(torch.equal(loaded.tensors[key], value) for key, value in adapter.tensors.items())

    with postil.Engine(base, adapters={"support": loaded}) as engine:
        assert engine.chat(QUESTION, adapter="support", max_new_tokens=20) == ANSWER
        asked = [postil.Request(prompt=QUESTION, adapter=name, max_new_tokens=20) for name in ("support", None)]
        noted, bare = engine.run(asked)
    assert (noted.text, noted.finish_reason) == (ANSWER, "stop")
    assert bare.text != ANSWER

    model = postil.attach(base, loaded)
    drift = postil.merge(model, "default")
    assert drift.max_logit < 1e-3
    assert live_digest(base.model) != digest
    postil.unmerge(model)
    assert live_digest(postil.detach(model).model) == digest

    whole = postil.export_merged(base, loaded, tmp_path / "whole").path
    with postil.Engine(postil.load_base(whole)) as engine:
        assert engine.chat(QUESTION, max_new_tokens=20) == ANSWER
    assert live_digest(base.model) == digest
