"""Tiny real tokenizers with chat templates: ChatML, Llama-2, one rewriting answers, one that knows tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
REWRITING = (  # like Qwen3: earlier answers lose what stands before </think>
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NATIVE_TOOLS = (
    "{% if tools %}{{ 'TOOLS ' + tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}{{ 'CALL ' + c.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS_ONCE = (  # like Phi-3: the end of text stands only where the conversation ends
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '</s>' }}{% endif %}"
)
_LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "name[The Vaults], eatType[pub], area[riverside]",
    "Where is my order? It is on its way to you, and it will arrive on Monday.",
    "user assistant system tool Be kind. You can call these tools:",
] * 4


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(template, adds_bos, trim_offsets): a byte-level BPE tokenizer trained on a few lines."""
    from transformers import PreTrainedTokenizerFast

    def make(template: str | None = CHATML, *, adds_bos: bool = False, trim_offsets: bool = False) -> Any:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        specials = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(_LINES, trainer)
        if adds_bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
            )
        elif trim_offsets:
            inner.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner,
            bos_token="<s>",
            eos_token="</s>" if adds_bos else "<|im_end|>",
            pad_token="</s>" if adds_bos else "<|im_end|>",
            additional_special_tokens=specials,
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer: Callable[..., Any]) -> Any:
    """A tokenizer like SmolLM2's: ChatML, a default system turn, pad == eos == <|im_end|>, no BOS added."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama2(make_tokenizer: Callable[..., Any]) -> Any:
    """BOS in the template and added by the tokenizer; no system turn; no generation prompt."""
    return make_tokenizer(LLAMA2, adds_bos=True)


@pytest.fixture(scope="session")
def rewriting(make_tokenizer: Callable[..., Any]) -> Any:
    """A template that prints earlier answers differently."""
    return make_tokenizer(REWRITING)


@pytest.fixture(scope="session")
def ends_once(make_tokenizer: Callable[..., Any]) -> Any:
    """A template with a special token after the whole conversation."""
    return make_tokenizer(ENDS_ONCE)


@pytest.fixture(scope="session")
def native(make_tokenizer: Callable[..., Any]) -> Any:
    """A template that knows tools and tool calls."""
    return make_tokenizer(NATIVE_TOOLS)


@pytest.fixture(scope="session")
def learned(chatml: Any) -> Callable[..., list[str]]:
    """learned(sample, tokenizer): the decoded runs of tokens with loss."""
    from postil.data.show import runs

    def texts(sample: Any, tokenizer: Any = chatml) -> list[str]:
        return [text for text, weight in runs(sample, tokenizer) if weight]

    return texts
