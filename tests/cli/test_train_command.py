"""postil train: what it prints and leaves, resuming, Ctrl-C, a full disk, and each wrong input in one sentence."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from postil.adapter import peft_files
from postil.adapter.identity import update_card
from postil.training import recipe
from postil.training.directory import only_trainer
from postil.training.optimizer import AdamW

ROW = b'{"prompt": "p", "completion": "c"}\n'


@pytest.fixture
def train(base: Path, tmp_path: Path) -> tuple[Any, ...]:
    """The words of a command that lacks only --data."""
    return ("train", "--base", base, "--out", tmp_path / "out", "--epochs", 1, "--data")


def bytes_of(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def test_it_says_what_it_does_and_leaves_a_whole_run(postil: Any, train: Any, rows: Path, tmp_path: Path) -> None:
    result = postil(*train, rows, "--epochs", 2, "--lr", "1e-3", "--set", "training.warmup=20",
                    "--set", "training.kl_weight=0")  # fmt: skip
    assert result.code == 0
    assert result.out == f"{tmp_path / 'out/adapter'}\n"
    for said in (
        "20 rows read as prompt and completion (prompt, completion)",
        "format prompt: 20 samples,",
        "8 modules adapted (q_proj, k_proj, v_proj, o_proj): 6,144 of 35,232 base parameters (17.4%)",
        "lora: learning rate 0.001, cosine, warm-up over 5 of 6 steps, batch of 8 rows, 2 epoch(s); "
        "19 rows learned, 1 held out (1 of them measured every 1 step(s))",
        "5 of the run's 6 steps are warm-up, while the rate still rises; train longer (--epochs), or make it a "
        "share: --set training.warmup=0.05",
        "step 6: held-out loss",
        "6 steps, last loss",
    ):
        assert said in result.err
    run = tmp_path / "out"
    assert {path.name for path in run.iterdir()} == {
        ".lock", "adapter", "checkpoints", "log.jsonl", "recipe.yaml", "tensorboard"
    }  # fmt: skip
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "learning_rate", "gradient_norm", "tokens", "target_tokens", "valid_loss"} <= log[-1].keys()
    card = json.loads((run / "adapter/postil.json").read_text())["card"]
    assert card["recipe"] == yaml.safe_load((run / "recipe.yaml").read_text())


def test_tensorboard_reads_the_numbers_of_the_log(made: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = (made / "run/tensorboard").iterdir()
    found = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            found[event.step, value.tag] = value.tensor.float_val[0]
    log = [json.loads(line) for line in (made / "run/log.jsonl").read_text().splitlines()]
    assert len(log) == 3
    for line in log:
        assert found[line["step"], "loss"] == pytest.approx(line["loss"], rel=1e-6)


def test_a_recipe_says_the_same_as_flags(postil: Any, train: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    postil(*train, rows, "--set", "training.steps=2", "--set", "lora.r=2", "--lr", "2e-3")
    training = {"steps": 2, "learning_rate": 9e-9}  # the rate is overridden below
    recipe = {"base": str(base), "data": str(rows), "training": training, "lora": {"r": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rate = ("--set", "training.learning_rate=2e-3")
    result = postil("train", tmp_path / "recipe.yaml", "--out", tmp_path / "two", *rate)
    assert result.code == 0
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "out")


def test_a_dry_run_writes_nothing(postil: Any, train: Any, rows: Path, tmp_path: Path) -> None:
    result = postil(*train, rows, "--dry-run")
    assert result.code == 0
    assert "20 samples" in result.err
    assert "minutes on this machine; nothing was trained" in result.err
    assert not (tmp_path / "out").exists()


def test_what_is_not_given_is_chosen_said_and_kept(postil: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    free = ("--set", "training.kl_weight=0")
    words = ("train", "--base", base, "--out", tmp_path / "out", "--data", rows, *free)
    said = (
        "chosen from the data: learning rate, epochs, batch size; 19 rows of ",
        "want several passes at a high rate",
        "lora: learning rate 0.001, cosine, warm-up over 2 of 30 steps, batch of 8 rows, 10 epoch(s); 19 rows "
        "learned, 1 held out (1 of them measured every 3 step(s))",
    )
    for extra in ((), ("--set", "training.epochs=auto")):
        tried = postil(*words, "--dry-run", *extra).err
        assert all(line in tried for line in said)
        assert "while the rate still rises" not in tried
    assert not (tmp_path / "out").exists()
    result = postil(*words)
    assert all(line in result.err for line in said)
    kept = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["training"]
    wanted = {"learning_rate": 1e-3, "epochs": 10, "batch_size": 8, "warmup": 0.05, "patience": 3, "valid_rows": 1,
              "valid_every": 3}  # fmt: skip
    assert {key: kept[key] for key in wanted} == wanted
    card = json.loads((tmp_path / "out/adapter/postil.json").read_text())["card"]
    assert card["recipe"]["training"] == kept
    again = postil("train", tmp_path / "out/recipe.yaml")
    assert (again.code, "finished before" in again.err) == (0, True)
    assert "chosen from the data" not in again.err


def test_it_is_held_to_prose_and_chat_by_default(postil: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    words = ("train", "--base", base, "--out", tmp_path / "out", "--data", rows, "--epochs", 1)
    told = postil(*words).err
    assert "each step: 1 × KL to the base over general rows, 2 of prose (64 tokens) and 2 of chat" in told
    kept = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["training"]
    assert (kept["kl_weight"], kept["guard"]) == (1.0, None)
    steps = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert all({"kl_loss", "kl_prose", "kl_chat"} <= step.keys() for step in steps)
    assert {"prose_rise", "chat_rise"} <= steps[-1].keys()


def test_full_fine_tuning_leaves_a_model(postil: Any, train: Any, rows: Path, tmp_path: Path) -> None:
    result = postil(*train, rows, "--method", "full", "--set", "training.steps=1")
    assert (result.code, result.out) == (0, f"{tmp_path / 'out/model'}\n")
    assert "full: learning rate 2e-05" in result.err
    assert "shards" not in result.raw_err  # a progress bar of transformers
    assert postil("generate", "hi", "--base", tmp_path / "out/model", "-n", 2).code == 0


def test_from_adapter_goes_on_from_its_values(
    postil: Any, train: Any, rows: Path, adapter: Path, tmp_path: Path
) -> None:
    assert postil(*train, rows, "--from-adapter", adapter, "--set", "training.steps=1", "--lr", "1e-12").code == 0
    said = postil("adapters", "diff", adapter, tmp_path / "out/adapter").out
    assert "tensors differ in value, by" in said
    assert float(said.split(", by ")[1].split()[0]) < 1e-6


# Interrupted, and started again


def test_ctrl_c_saves_and_says_how_to_go_on(
    postil: Any, train: Any, rows: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in a shell's background
    update, count = AdamW.update, [0]

    def pressed(self: AdamW) -> Any:
        count[0] += 1
        if count[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "update", pressed)
        result = postil(*train, rows)
    assert (result.code, result.out) == (130, "")
    assert result.err.endswith(
        f"note: stopped at step 2 of 3 and saved; go on with: postil train {tmp_path / 'out/recipe.yaml'}"
    )
    assert not (tmp_path / "out/adapter").exists()
    again = postil("train", tmp_path / "out/recipe.yaml")
    assert again.code == 0
    assert "step 3: held-out" in again.err
    assert "step 2: held-out" not in again.err
    assert bytes_of(tmp_path / "out") == bytes_of(made / "run")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_finished_run_given_again_changes_nothing(postil: Any, train: Any, rows: Path, tmp_path: Path) -> None:
    postil(*train, rows)
    adapter = tmp_path / "out/adapter"
    update_card(adapter, score_card={"judged": "since"})
    (adapter / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    result = postil(*train, rows)
    assert result.code == 0
    assert "3 steps, finished before, held-out loss" in result.err
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(b"spoilt")
    assert postil(*train, rows).code == 0  # written again from the checkpoint, beside what is the user's
    assert weights.read_bytes() == before[weights]
    assert (adapter / "notes.txt").read_text() == "mine"
    assert "score_card" not in json.loads((adapter / "postil.json").read_text())["card"]


def test_a_finished_full_run_given_again_changes_nothing(postil: Any, train: Any, rows: Path, tmp_path: Path) -> None:
    full = (*train, rows, "--method", "full", "--set", "training.steps=1")
    postil(*full)
    model = tmp_path / "out/model"
    assert {path.stat().st_mode & 0o777 for path in model.iterdir()} == {0o644}
    card = json.loads((model / "postil.json").read_text()) | {"score_card": "judged since"}
    (model / "postil.json").write_text(json.dumps(card))
    before = {path: path.read_bytes() for path in model.iterdir()}
    assert postil(*full).code == 0
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    weights = model / "model.safetensors"
    content = bytearray(before[weights])
    content[-1] ^= 1
    weights.write_bytes(content)
    assert postil(*full).code == 0
    assert weights.read_bytes() == before[weights]


def test_a_second_trainer_leaves_the_run_as_it_is(refusal: Any, train: Any, rows: Path, tmp_path: Path) -> None:
    with only_trainer(tmp_path / "out"):
        (tmp_path / "out/recipe.yaml").write_text("base: of the run that goes on\n")
        with ThreadPoolExecutor() as pool:  # the lock is this thread's
            said = pool.submit(refusal, *train, rows).result()
    assert f"another process is training in {tmp_path / 'out'}; wait for it" in said
    assert (tmp_path / "out/recipe.yaml").read_text() == "base: of the run that goes on\n"


def test_a_recipe_written_by_hand_stays(
    postil: Any, refusal: Any, base: Path, rows: Path, made: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out/recipe.yaml"
    file.parent.mkdir()
    text = f"# why these\nbase: {base}\ndata: {rows}\nout: {file.parent}\ntraining: {{epochs: 1}}\n"
    file.write_text(text)
    assert f"{file} is not this run's (training.learning_rate: 0.001 there, 0.5 here)" in refusal(
        "train", file, "--lr", "0.5"
    )
    assert [path.name for path in file.parent.iterdir() if path.name != ".lock"] == ["recipe.yaml"]
    assert postil("train", file).code == 0
    assert file.read_text() == text
    assert bytes_of(file.parent) == bytes_of(made / "run")
    assert postil("train", file).code == 0  # with its checkpoints, too


def test_another_recipe_in_the_same_directory(postil: Any, refusal: Any, train: Any, rows: Path) -> None:
    postil(*train, rows, "--set", "training.steps=1")
    said = "holds a run of another recipe (training.epochs: 1 there, 3 here); choose another --out"
    assert said in refusal(*train, rows, "--epochs", 3, "--set", "training.steps=1")


def test_an_interrupted_save_leaves_nothing_half_written(
    postil: Any, train: Any, rows: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(peft_files, "save_file", interrupted)
        assert postil(*train, rows).code == 130
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".lock", "checkpoints", "log.jsonl", "recipe.yaml", "tensorboard"
    }  # fmt: skip
    (tmp_path / "out/.postil-tmp-adapter-1-killed").mkdir()  # as kill -9 leaves it
    assert postil(*train, rows).code == 0
    assert bytes_of(tmp_path / "out") == bytes_of(made / "run")
    assert not list((tmp_path / "out").glob(".postil-tmp-*"))


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, which writers see as they see a full disk.

    Lifted before pytest writes again: its own output may be a file that is longer already.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (100, "out/recipe.yaml could not be written (File too large); nothing half-written was left."),
        (8000, "out/checkpoints/step-00000001 could not be written (state.safetensors: "),
    ],
)
def test_a_full_disk_at_a_save(refusal: Any, train: Any, rows: Path, tmp_path: Path, size: int, said: str) -> None:
    with small_disk(size):
        message = refusal(*train, rows)
    assert said in message
    assert message.count("could not be written") == 1
    left = [path.name for path in tmp_path.rglob("*")]
    assert not [name for name in left if "tmp" in name or "safetensors" in name]


def test_a_full_disk_at_a_model(
    postil: Any, refusal: Any, train: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = recipe._save_model

    def on_a_small_disk(*given: Any) -> None:
        with small_disk(20_000):
            save(*given)

    full = (*train, rows, "--method", "full", "--set", "training.steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_save_model", on_a_small_disk)
        assert "out/model could not be written (" in refusal(*full)
    assert not (tmp_path / "out/model").exists()
    assert postil(*full).code == 0  # from its checkpoint


def test_a_full_disk_at_the_log_keeps_the_checkpoints(refusal: Any, train: Any, rows: Path, tmp_path: Path) -> None:
    settings = (
        "training.steps=400",
        "training.checkpoint_every=50",
        "lora.r=1",
        "valid_share=0",
        "training.kl_weight=0",
    )
    with small_disk(20_000):
        message = refusal(*train, rows, *(word for setting in settings for word in ("--set", setting)))
    assert "out could not be written to (File too large); its last checkpoint is whole" in message
    (newest,) = sorted((tmp_path / "out/checkpoints").iterdir())[-1:]
    assert (newest / "manifest.json").is_file()


# Wrong data


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + ROW * 9, ROW.replace(b"\n", b"\r\n") * 9], ids=["BOM", "CRLF"])
def test_a_byte_order_mark_and_crlf_are_fine(postil: Any, train: Any, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    result = postil(*train, tmp_path / "a.jsonl", "--dry-run")
    assert result.code == 0
    assert "9 samples, 207 tokens, 18 learned" in result.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (ROW * 3 + b'{"prompt": "\xff", "completion": "c"}\n', ":4: invalid UTF-8 at byte 13 of the line. Mend this"),
        (ROW * 3 + b'{"prompt": "p", "completion": ""}\n', ":4: 'completion' is empty. Mend this"),
        (ROW + b'{"prompt": "p"\n', ":2: not JSON (Expecting ',' delimiter"),
        (
            ROW + b'{"prompt": "p", "completion": "' + b"x" * (65 << 20),
            ":2: the line is longer than 67,108,864 bytes",
        ),
        (b"", "a.jsonl is empty: it has no row."),
        (b'{"prompt": "p", "completion": "' + b"x" * 300 + b'"}', "1 are longer than the limit (128 tokens)"),
    ],
    ids=["UTF-8", "empty completion", "JSON", "huge line", "empty file", "all too long"],
)
def test_wrong_rows(refusal: Any, train: Any, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert said in refusal(*train, tmp_path / "a.jsonl")
    assert not (tmp_path / "out").exists()


def test_bad_lines_go_aside_when_asked(postil: Any, train: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROW * 3 + b"{\n")
    result = postil(*train, tmp_path / "a.jsonl", "--skip-bad-lines", "--dry-run")
    assert result.code == 0
    assert f"1 row bad, left out (see {tmp_path / 'a.jsonl.bad.jsonl'}): 4" in result.err
    (line,) = (tmp_path / "a.jsonl.bad.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 4


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("drop", "1 row longer than the limit, left out: 4"),
        ("truncate", "longer than the limit, cut at their end: 4"),
    ],
)
def test_a_sample_beyond_the_context_is_counted(
    postil: Any, train: Any, tmp_path: Path, choice: str, said: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROW * 3 + b'{"prompt": "p", "completion": "' + b"x" * 300 + b'"}')
    result = postil(*train, tmp_path / "a.jsonl", "--set", f"rows.too_long={choice}", "--dry-run")
    assert result.code == 0
    assert said in result.err


def test_data_that_is_not_there(refusal: Any, train: Any, rows: Path, tmp_path: Path) -> None:
    assert "row.jsonl does not exist (did you mean 'rows.jsonl'?)" in refusal(*train, rows.with_name("row.jsonl"))
    assert "nobody-here/no-such-rows" in refusal(*train, "nobody-here/no-such-rows")
    assert f"{tmp_path} is a directory; name one file in it" in refusal(*train, tmp_path)


# Slips of typing


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epohcs", "2"], "No such option --epohcs (did you mean --epochs?)"),
        (["--epochs", "two"], "Invalid value for '--epochs': Input should be a valid integer, "),
        (["--method", "lroa"], "recipe: training: method: Input should be 'lora', 'qlora' or 'full' (found 'lroa')"),
        (["--lr", "-1"], "recipe: training: learning_rate: Input should be greater than 0 (found -1.0)"),
        (["--lr", "inf"], "recipe: training: learning_rate: Input should be a finite number (found inf)"),
        (
            ["--set", "training.betas=[0.9, 1.0]"],
            "training: betas.1: Input should be less than 1 (found 1.0)",
        ),
        (["--set", "lora.alpha=.nan"], "LoraConfig: alpha: Input should be"),
        (["--set", "training.epoch=2"], "recipe: training: unknown key 'epoch' (did you mean 'epochs'?)"),
        (["--set", "training.lr=2"], "recipe: training: unknown key 'lr'; known: method, learning_rate, epochs,"),
        (["--set", "trainig.epochs=2"], "recipe: unknown key 'trainig' (did you mean 'training'?)"),
        (["--set", "lora.alhpa=2"], "LoraConfig: unknown key 'alhpa' (did you mean 'alpha'?)"),
        (["--set", "epochs"], "--set epochs: write key=value, for example"),
        (["--set", "base.x=1"], "--set base.x=1: base is a value, not a group of keys"),
        (["--set", "training.epochs=["], "--set training.epochs=[: '[' is no YAML value"),
        (
            ["--set", "lora.target_modules=[q_porj]"],
            "'q_porj' matches no module of this llama model (did you mean 'q_p",
        ),
        (
            ["--set", "lora.target_modules=q_proj,v_proj"],
            "'q_proj,v_proj' alone is a pattern for whole module paths; names stand in a list: [q_proj, v_proj]",
        ),
        (["--set", "lora.target_modules=q_porj"], "the pattern 'q_porj' matches no whole module path (did you mean"),
        (["--set", "dtype=float3"], "'float3' is no dtype for a base (did you mean 'float32'?)"),
        (["--set", "device=cdua"], "'cdua' is no device (did you mean 'cuda'?)"),
        (["--set", "rows.format=caht"], "rows: format: Input should be 'auto', 'chat', 'prompt', 'raw' or 'text'"),
    ],
)
def test_slips_in_flags_keys_and_targets(
    refusal: Any, train: Any, rows: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    assert said in refusal(*train, rows, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"base: b\ndata: d\nout: o\nlroa: {}\n", "recipe: unknown key 'lroa' (did you mean 'lora'?)"),
        (b"base: [\n", "recipe.yaml is no YAML: while parsing a flow node"),
        (b"base: \xff\n", "recipe.yaml is no YAML: 'utf-8' codec"),
        (b"- base\n", "recipe.yaml: expected keys such as base, data, out; found list"),
        (b"base: b\ndata: d\ntraining: 3\n", "recipe: training: Input should be a valid dictionary"),
        (b"base: b\n", "recipe: 'data' is required and was not given"),
        (b"base: 3\ndata: d\n", "recipe: base: Input should be a valid string (found 3)"),
        (b"base: 2024-05-01\ndata: d\n", "'2024-05-01' is no directory here"),  # a name and no date
    ],
)
def test_slips_in_a_recipe(refusal: Any, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert said in refusal("train", tmp_path / "recipe.yaml")


def test_places_that_are_none(refusal: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/inside"):
        message = refusal("train", "--base", base, "--data", rows, "--out", tmp_path / out)
        assert f"{tmp_path / out} could not be made" in message
    assert (tmp_path / "file").read_text() == "x"
    assert "recipe: 'base' is required and was not given" in refusal("train", "--data", rows)
    assert "no.yaml cannot be read: No such file" in refusal("train", tmp_path / "no.yaml")


def test_a_directory_of_something_else_is_left_alone(postil: Any, train: Any, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    result = postil(*train, rows)
    assert result.code == 2
    assert "holds files that are of no run; choose another --out" in result.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
