"""One test for each complaint about other trainers (anchors/training.md, section 4), named by its number.

Left for later work: p#631 (joint training), the NF4 half of p#2321 and p#1043, tokens per second (tf#42489's second
half, p#981's milliseconds), adapted expert tensors (p#3009's other half), u#915 (a warning for special tokens that
the base never learned).
"""

from __future__ import annotations

import gc
import json
import socket
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from byte_base import CHATML, EOS, byte_tokenizer
from postil import Engine, LoraConfig, Request, attach, detach, export_merged, merge, train
from postil.adapter import AdaptedModel
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.base import live_digest
from postil.data import DataOptions, Sample, load_data, pack, template_hash
from postil.engine.request import prompt_ids
from postil.errors import AdapterError, RecipeError
from postil.kernels.layout import Layout, Span, Spans
from postil.seeds import derive
from postil.training import Recipe, TrainOptions, batch, defaults, optimizer, prepare, step
from postil.training.loop import run

VOCABULARY = 260
KINDS = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64},
    "gpt2": {},
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": 4},
}
ROWS = [{"prompt": f"Say {n}", "completion": "yes " * (n % 5 + 1)} for n in range(24)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Products this small are slower on two."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Every byte a token; pad is eos, as in most bases."""
    made = byte_tokenizer()
    made.pad_token = "<|im_end|>"
    assert made.pad_token_id == made.eos_token_id == EOS
    return made


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of two layers, the same at every call."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": EOS, "pad_token_id": EOS,
        "initializer_range": 0.2,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **settings | KINDS[kind] | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def adapted(model: Any = None, *, scrambled: bool = False, name: str = "default", **config: Any) -> AdaptedModel:
    """The model with a fresh adapter, or with one whose values are random as after training."""
    made = attach(tiny() if model is None else model, LoraConfig(**{"r": 4, "alpha": 8} | config), name=name, seed=1)
    if scrambled:
        generator = torch.Generator().manual_seed(derive(0, name))
        for view in made.resident(name).keys.values():
            view.copy_(torch.randn(view.shape, generator=generator) * 0.2)
    return made


def samples(count: int = 12, longest: int = 24) -> list[Sample]:
    random = np.random.default_rng(0)
    made = []
    for row in range(count):
        length = int(random.integers(3, longest))
        weights = (random.random(length) < 0.5).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        made.append(Sample(random.integers(0, 256, length).astype(np.int32), weights, row + 1))
    return made


def logits(model: Any, ids: Any = range(1, 20)) -> torch.Tensor:
    inner = model.model if isinstance(model, AdaptedModel) else model
    with torch.no_grad():
        out: torch.Tensor = inner(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return out


def gradients(packs: list[Any], model: AdaptedModel) -> tuple[float, torch.Tensor]:
    """The loss and the flat gradient of one step."""
    resident = model.resident("default")
    weights = optimizer.AdapterWeights.of(resident)
    loss, _, _ = step.gradients(model, weights, resident, packs, TrainOptions(), 1)
    return loss, weights.grad.clone()


# Training that trains


def test_t3926_a_passed_or_loaded_adapter_moves(tmp_path: Path) -> None:
    """Also t#6700, tf#26098: an adapter that came with the model stayed frozen under an empty optimiser."""
    model = adapted(scrambled=True)
    save_adapter(model.export("default"), tmp_path / "a")
    model = attach(detach(model), load_adapter(tmp_path / "a"))
    assert model.coverage("default").trainable == model.resident("default").parameters > 0
    before = {key: value.clone() for key, value in model.resident("default").keys.items()}
    train(model, samples(), steps=2)
    assert all(not torch.equal(before[key], value) for key, value in model.resident("default").keys.items())


def test_p1402_a_module_without_gradient_is_fatal_after_the_first_step(tmp_path: Path) -> None:
    base = tiny()
    base.model.layers[1].self_attn.spare = torch.nn.Linear(32, 32)  # the forward pass never calls it
    with pytest.raises(AdapterError, match=r"1 of 3 adapted modules got no gradient.*layers\.1\.self_attn\.spare"):
        train(adapted(base, target_modules=("q_proj", "spare")), samples(), steps=2)
    base = tiny()
    base.model.layers[1].experts = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
    model = adapted(base, target_modules=("q_proj", "experts.0"))
    told: list[str] = []
    run(model, samples(), [], out=tmp_path, name="default", options=TrainOptions(steps=1), tell=told.append)
    assert told == ["1 experts got no token in the first step: model.layers.1.experts.0"]


def test_p793_the_one_entry_point_never_gives_a_fresh_adapter(tmp_path: Path) -> None:
    model = adapted(scrambled=True)
    wanted = logits(model)
    save_adapter(model.export("default"), tmp_path / "a")
    again = attach(detach(model), load_adapter(tmp_path / "a"), seed=99)
    assert torch.equal(logits(again), wanted)
    assert not torch.allclose(logits(detach(again).model), wanted, atol=1e-2)


def test_p3554_one_name_that_misses_is_fatal_and_coverage_is_told() -> None:
    with pytest.raises(AdapterError, match=r"'v_porj' matches no module.*did you mean 'v_proj'.*o_proj, q_proj"):
        adapted(target_modules=("q_proj", "v_porj"))
    told = adapted(target_modules=("q_proj", "v_proj")).coverage("default")
    assert (told.modules, told.adapted_parameters) == (4, 2 * 32 * (32 + 16))
    assert told.lines()[0].startswith("4 modules adapted (q_proj, v_proj): 3,072 of")


def test_p3582_an_unused_pattern_is_fatal() -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(AdapterError, match=rf"{field}: 'k_prj' matches none of the adapted modules"):
            adapted(**{field: {"q_proj": 2, "k_prj": 2}})
    assert adapted(rank_pattern={"q_proj": 2}).export("default").ranks["model.layers.0.self_attn.q_proj"] == 2


def test_soup354_an_adapter_depends_on_its_seed_alone() -> None:
    """Also u#617: adapters were drawn before the seed was set."""
    drawn = []
    for other in (1, 2):
        model = tiny()
        torch.manual_seed(other)
        drawn.append(attach(model, LoraConfig(), seed=7).resident("default").flat)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], attach(tiny(), LoraConfig(), seed=8).resident("default").flat)


def test_trl_sftconfig_defaults_are_the_methods_own() -> None:
    lora, qlora, full = (defaults.chosen(10**5, 10**6, 90, kind).learning_rate for kind in ("lora", "qlora", "full"))
    assert lora == qlora == pytest.approx(10 * full)
    assert DataOptions().max_length is None  # the base's context, not 1024


# Data


def test_tf23530_eos_is_learned_where_pad_equals_eos(tokenizer: Any) -> None:
    """Also t#976, t#1623, t#3091: labels were masked by the pad id, so that answers never ended."""
    for options in (DataOptions(format="raw"), DataOptions(format="prompt")):
        made = load_data(ROWS, tokenizer, options).samples
        for sample in made:
            learned = sample.ids[sample.weights > 0]
            assert learned[-1] == EOS
        assert pack(made[:3]).weights.sum() == sum(sample.weights.sum() for sample in made[:3])


def test_t6668_a_row_truncated_to_nothing_is_counted_and_named(tokenizer: Any) -> None:
    """Also t#3927: truncation dropped all labels and the loss was 0."""
    rows = [ROWS[0], {"prompt": "x" * 60, "completion": "y"}]
    report = load_data(rows, tokenizer, DataOptions(format="raw", max_length=40, too_long="truncate")).report
    assert (report.samples, report.no_target_rows, report.truncated_rows) == (1, (2,), ())
    assert "1 row without a token to learn, left out: 2" in report.lines()


def test_qwen3_1522_spans_need_no_generation_marks(tokenizer: Any) -> None:
    """Also t#4879, t#5471: without {% generation %} in the template the assistant mask was all zero."""
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (sample,) = load_data([row], tokenizer).samples
    assert "generation %}" not in tokenizer.chat_template
    assert tokenizer.decode(sample.ids[sample.weights > 0]) == "two<|im_end|>four<|im_end|>"


def test_retaining_by_doing5_there_is_one_bos(tokenizer: Any) -> None:
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.add_special_tokens(["<s>"])
    bos = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    doubling = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>", chat_template="{{ bos_token }}" + CHATML
    )
    for options in (DataOptions(format="prompt"), DataOptions(format="raw")):
        for sample in load_data(ROWS[:3], doubling, options).samples:
            assert sample.ids[0] == bos
            assert (sample.ids == bos).sum() == 1
    assert prompt_ids(Request(prompt="hi"), 1, doubling).count(bos) == 1


def test_lf5836_training_and_serving_render_alike_and_the_hash_is_kept(tokenizer: Any, tmp_path: Path) -> None:
    """Also lf#2884, lf#10396: the template at serving was another one."""
    (sample,) = load_data(ROWS[:1], tokenizer).samples
    asked = prompt_ids(Request(prompt=ROWS[0]["prompt"]), 1, tokenizer)
    assert sample.ids[: int(np.flatnonzero(sample.weights)[0])].tolist() == asked
    tiny().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    names = {name: str(tmp_path / path) for name, path in (("base", "base"), ("data", "rows.jsonl"), ("out", "run"))}
    prepare(Recipe.parse(names | {"training": {"steps": 1}})).run()
    card = load_adapter(tmp_path / "run/adapter").card
    assert card["template_hash"] == template_hash(tokenizer)
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template="x")
    assert card["template_hash"] != template_hash(other)


# One step


def test_t1230_a_pack_leaks_nothing() -> None:
    """Also t#3067, ms-swift#4736, lf#4224, tt#892: samples of one pack saw each other."""
    model = adapted(scrambled=True)
    made = samples(5)
    packed = pack(made)
    ids, positions, _ = batch.to_device(packed, model)
    layout = Layout.packed(packed.lengths, Spans((Span(0, len(ids), 0),)))
    with torch.no_grad(), model.using(layout):
        together = model.logits(model.hidden(ids, positions), layout.spans)
    for part, sample in zip(together.split(packed.lengths), made, strict=True):
        torch.testing.assert_close(part, logits(model, sample.ids.tolist()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("parts", [2, 4])
def test_tf34191_accumulation_is_no_mean_of_means(parts: int) -> None:
    """Also tf#35438, ax#2262, unsloth-zoo#1023: micro-batches of unlike target counts were averaged alike."""
    made = samples(8, longest=40)
    whole_loss, whole = gradients([pack(made)], adapted())
    loss, split = gradients([pack(made[part::parts]) for part in range(parts)], adapted())
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-6)


def test_u1060_logits_are_never_whole() -> None:
    """Also lf#10367, tt#2078: [tokens × vocabulary] filled the memory."""
    model = adapted()
    seen: list[int] = []
    head = model.model.lm_head
    hook = head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    length = 500
    weights = np.ones(length, dtype=np.float32)
    weights[:100] = 0
    gradients([pack([Sample(np.arange(length, dtype=np.int32) % 256, weights, 1)])], model)
    hook.remove()
    assert sum(seen) == 400  # the rows with a target alone
    assert max(seen) <= 256


def test_tf42489_checkpointing_over_a_frozen_embedding_keeps_every_gradient() -> None:
    """Also tf#21381, t#3089, p#1142: re-entrant checkpointing lost them, since no input wanted a gradient."""
    made = [pack(samples())]
    plain, checked = adapted(dropout=0.2), adapted(dropout=0.2)
    checked.checkpointing = True
    wanted, found = gradients(made, plain)[1], gradients(made, checked)[1]
    assert torch.equal(wanted, found)
    resident = checked.resident("default")
    assert all(resident.leaves[f"{target.path}.b"].grad.any() for target in resident.targets)


# Checkpoints


class Crash(Exception):
    """The machine goes down."""


def crashing(step: int) -> Any:
    def watch(event: dict[str, Any]) -> None:
        if event["step"] == step:
            raise Crash

    return watch


SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 4, "checkpoint_every": 2, "learning_rate": 1e-2}


def test_p859_a_resumed_run_has_the_same_bytes(tmp_path: Path) -> None:
    """Also ax#198, ax#2568: a resumed run started over, or trained a LoRA on a LoRA."""
    whole = adapted(dropout=0.1)
    train(whole, samples(), out=tmp_path / "whole", **SETTINGS)
    with pytest.raises(Crash):
        train(adapted(dropout=0.1), samples(), out=tmp_path / "run", watch=crashing(5), **SETTINGS)
    resumed, steps = adapted(dropout=0.1), list[int]()
    train(resumed, samples(), out=tmp_path / "run", watch=lambda event: steps.append(event["step"]), **SETTINGS)
    assert steps == [5, 6, 7, 8, 9]
    assert torch.equal(resumed.resident("default").flat, whole.resident("default").flat)


def test_tf27820_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """Also tf#28015: checkpoints were written in place, and the highest number was resumed from."""
    whole = adapted()
    train(whole, samples(), out=tmp_path, **SETTINGS)
    newest = max((tmp_path / "checkpoints").iterdir())
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-64])
    (newest.with_name(f".postil-tmp-{newest.name}-1")).mkdir()
    resumed, steps = adapted(), list[int]()
    train(resumed, samples(), out=tmp_path, watch=lambda event: steps.append(event["step"]), **SETTINGS)
    assert steps == [9]
    assert torch.equal(resumed.resident("default").flat, whole.resident("default").flat)
    assert not list((tmp_path / "checkpoints").glob(".postil-tmp-*"))


def test_miles2572_masters_are_resumed_not_made_anew(tmp_path: Path) -> None:
    settings = SETTINGS | {"method": "full", "learning_rate": 1e-4}  # far below bfloat16's spacing
    whole = attach(tiny(dtype=torch.bfloat16))
    train(whole, samples(), out=tmp_path / "whole", **settings)
    with pytest.raises(Crash):
        train(attach(tiny(dtype=torch.bfloat16)), samples(), out=tmp_path / "run", watch=crashing(5), **settings)
    train(attach(tiny(dtype=torch.bfloat16)), samples(), out=tmp_path / "run", **settings)
    states = [load_file(tmp_path / run / "checkpoints/step-00000009/state.safetensors") for run in ("whole", "run")]
    assert states[0]["flat"].dtype == torch.float32
    assert not torch.equal(states[0]["flat"], states[0]["flat"].bfloat16().float())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# Merging, loading, saving


def test_p2321_a_merge_is_measured_and_refused_above_its_bound() -> None:
    """Also p#1043, tf#31293, u#611, u#5410: merging into few bits drifted, and nobody looked."""
    model = adapted(tiny(dtype=torch.bfloat16), scrambled=True)
    before, wanted = live_digest(model.model), logits(model)
    drift = merge(model, "default")
    assert drift.max_logit > 0
    assert (logits(model) - wanted).abs().max() < 2.0
    detached = adapted(tiny(dtype=torch.bfloat16), scrambled=True)
    with pytest.raises(AdapterError, match=r"moves a logit by .* above the bound of 1e-06"):
        merge(detached, "default", bound=1e-6)
    assert live_digest(detached.model) == before


def test_p2777_a_tied_head_that_was_trained_is_not_lost(tmp_path: Path) -> None:
    """Also p#2018, tf#45127, u#9331: the merged head was tied again at the next load."""
    model = adapted(tiny(tie_word_embeddings=True), scrambled=True, target_modules=("q_proj", "lm_head"))
    wanted = logits(model)
    plain = AutoModelForCausalLM.from_pretrained(export_merged(model, "default", tmp_path / "whole").path).eval()
    torch.testing.assert_close(logits(plain), wanted, rtol=0, atol=1e-4)
    assert plain.config.tie_word_embeddings is False


def test_p2889_no_dtype_changes_silently(tmp_path: Path) -> None:
    """Also p#2421, t#4634, u#4891."""
    base = tiny(dtype=torch.bfloat16)
    before = {name: parameter.dtype for name, parameter in base.named_parameters()}
    model = adapted(base)
    train(model, samples(), steps=1)
    assert logits(model).dtype == torch.bfloat16
    save_adapter(model.export("default"), tmp_path / "a")
    assert {value.dtype for value in load_adapter(tmp_path / "a").tensors.values()} == {torch.float32}
    export_merged(model, "default", tmp_path / "whole")
    assert {t.dtype for t in load_file(tmp_path / "whole/model.safetensors").values()} == {torch.bfloat16}
    merge(model, "default")
    assert {name: parameter.dtype for name, parameter in base.named_parameters()} == before


def test_p2566_a_missing_or_left_over_key_is_fatal(tmp_path: Path) -> None:
    """Also p#2699, p#1932, tf#34068: such adapters loaded with a warning, or with none."""
    model = adapted(scrambled=True)
    directory = save_adapter(model.export("default"), tmp_path / "a")
    base, file = detach(model), tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    pair = [key for key in tensors if "layers.1.self_attn.q_proj" in key]
    save_file({key: value for key, value in tensors.items() if key not in pair}, file)
    with pytest.raises(AdapterError, match=r"missing model\.layers\.1\.self_attn\.q_proj\.lora_A"):
        attach(base, load_adapter(directory))
    save_file(tensors | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, file)
    with pytest.raises(AdapterError, match=r"layers\.9\.self_attn\.q_proj\.lora_B\.weight is missing"):
        load_adapter(directory)


def test_p1993_nothing_is_pickled_and_no_pickle_is_opened(tmp_path: Path) -> None:
    """Also vllm PR#32045."""
    directory = save_adapter(adapted().export("default"), tmp_path / "a")
    assert {file.suffix for file in directory.iterdir()} == {".json", ".md", ".safetensors"}
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterError, match="is a pickle, which can run code and is never opened here; `postil conv"):
        load_adapter(directory)


def test_p2898_saving_is_small_and_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(target_modules=("q_proj", "embed_tokens"))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    saved = load_file(save_adapter(model.export("default"), tmp_path / "a") / "adapter_model.safetensors")
    assert all(".lora_" in key for key in saved)  # no whole embedding beside its adapter
    assert sum(value.numel() for value in saved.values()) == model.coverage("default").trainable


def test_p3009_expert_tensors_are_named_and_their_adapters_refused(tmp_path: Path) -> None:
    """Also Automodel#3592, vllm#52198: the layout of expert adapters changed between versions."""
    model = adapted(tiny("mixtral"), scrambled=True, target_modules="all-linear")
    told = model.coverage("default")
    assert len(told.experts_left) == 4
    assert told.lines()[-1].startswith("not adapted (3-D expert parameters): model.layers.0.mlp.experts.")
    directory = save_adapter(model.export("default"), tmp_path / "a")
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "postil.json").unlink()
    changed = config | {"target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": "0.18.0"}
    (directory / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(AdapterError, match="target_parameters set: this changes the mathematics"):
        load_adapter(directory)


def test_u2080_the_error_names_the_field_what_came_and_the_mend() -> None:
    """Also p#40: the true error was hidden behind another."""
    with pytest.raises(RecipeError, match=r"recipe: training: unknown key 'epoch' \(did you mean 'epochs'\?\)"):
        Recipe.parse({"base": "b", "data": "d", "out": "o", "training": {"epoch": 2}})
    with pytest.raises(AdapterError, match=r"LoraConfig: r: Input should be greater than or equal to 1 \(found 0\)"):
        LoraConfig(r=0)


# Many adapters


def test_p981_many_adapters_share_each_pass_over_the_base() -> None:
    """Also p#804, p#2283: adapters were run one after another; here a batch of eight makes one row's passes."""
    model = attach(tiny())
    for index in range(8):
        adapted(model, scrambled=True, name=f"a{index}")
    passes: list[int] = []
    hook = model.model.model.norm.register_forward_hook(lambda *_: passes.append(1))
    with Engine(model) as engine:
        engine.eos = frozenset()
        ask = [Request(ids=[1, 2, 3], adapter=f"a{index}", max_new_tokens=4) for index in range(8)]
        engine.run(ask[:1])
        alone = len(passes)
        answers = engine.run(ask)
    hook.remove()
    assert len(passes) == 2 * alone == 8
    assert len({answer.ids for answer in answers}) > 1


def alive() -> int:
    """The bytes of all tensors that Python holds, each storage once."""
    gc.collect()
    held = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def test_p738_a_removed_adapter_leaves_no_byte() -> None:
    """Also p#1639, diffusers#8532: unloading kept tensors alive."""
    model = attach(tiny())
    before = alive()
    adapted(model, scrambled=True, modules_to_save=("lm_head",))
    logits(model)
    assert alive() >= before + 4 * model.resident("default").parameters
    model.remove("default")
    assert alive() == before
    owner, base = weakref.ref(model), detach(model)
    del model
    gc.collect()
    assert owner() is None
    assert not any({"_postil_owner", "forward"} & module.__dict__.keys() for module in base.model.modules())
