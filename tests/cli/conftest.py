"""The command line run in this process, a tiny base directory, rows, and one trained run, made once."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from postil.cli import main
from postil.data.shipped import shipped_rows
from postil.training import documents

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Result:
    """What a command did: its exit code, what it printed, and its standard error with white space evened out."""

    code: int
    out: str
    raw_err: str

    @property
    def err(self) -> str:
        return " ".join(self.raw_err.split())


def command(*words: object) -> Result:
    """`postil` with these words, as the shell would run it; an exception that escapes fails the test."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv
    sys.argv = ["postil", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
    finally:
        sys.argv = before
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def postil() -> Callable[..., Result]:
    """postil("train", ...): a command's Result."""
    return command


@pytest.fixture(scope="session")
def refusal() -> Callable[..., str]:
    """refusal("train", ...): the one sentence of a command that must end with exit code 2."""

    def run(*words: object) -> str:
        result = command(*words)
        assert result.code == 2, result
        assert "Traceback" not in result.raw_err
        last = result.raw_err.strip().splitlines()[-1]
        assert last.startswith("postil: "), last
        return last.partition(": ")[2]

    return run


def few_rows(name: Any) -> list[dict[str, Any]]:
    """The first of the shipped rows that training holds to: hundreds of answers are much for every test."""
    return shipped_rows(name)[:12]


@pytest.fixture(autouse=True, scope="session")
def little_to_hold_to() -> Iterator[None]:
    """Runs hold to the shipped rows by default; here to a few of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "shipped_rows", few_rows)
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Products this small are slower on two."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `base` (Llama, context 128, every byte a token) and `run`, trained on `rows.jsonl`."""
    place = tmp_path_factory.mktemp("made")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=256, eos_token_id=257, pad_token_id=257,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.LlamaForCausalLM(config).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    rows = [{"prompt": f"Say {n}", "completion": "yes " * (n % 3 + 1)} for n in range(20)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTIL_HOME", str(place / "home"))
        words = ("--base", place / "base", "--data", place / "rows.jsonl", "--out", place / "run", "--epochs", 1)
        result = command("train", *words)
    assert (result.code, result.out) == (0, f"{place / 'run/adapter'}\n"), result
    return place


@pytest.fixture
def base(made: Path) -> Path:
    """The tiny base; not to be changed."""
    return made / "base"


@pytest.fixture
def adapter(made: Path) -> Path:
    """A trained adapter of it; not to be changed."""
    return made / "run/adapter"


@pytest.fixture
def rows(made: Path) -> Path:
    """Twenty rows of prompt and completion."""
    return made / "rows.jsonl"


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Path, str, Callable[[dict[str, Any]], Any]], Path]:
    """changed(directory, file, edit): a copy whose safetensors `file` holds what `edit` made of its tensors."""
    from safetensors.torch import load_file, save_file

    def copy(directory: Path, file: str, edit: Callable[[dict[str, Any]], Any]) -> Path:
        place = tmp_path / "changed"
        shutil.copytree(directory, place)
        tensors = load_file(place / file)
        edit(tensors)
        save_file(tensors, place / file, metadata={"format": "pt"})
        return place

    return copy
