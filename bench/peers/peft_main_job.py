"""The peer of the main job: PEFT on the same base, rows, order of rows and settings; judged by the same functions.

`python bench/peers/peft_main_job.py NAME` trains recipes/main_job/NAME.yaml with PEFT and a plain padded loop, and
writes NAME.peft.json beside it. Same seeds of initialisation are not shared: what differs is chance and rounding. A
recipe of full fine-tuning is run by transformers and torch.optim.AdamW alone, and gives NAME.torch.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import peft
import torch
import yaml
from transformers import get_linear_schedule_with_warmup

from postil.adapter import AdaptedModel, attach
from postil.adapter.peft_files import load_adapter
from postil.base import load_base
from postil.data import Sample, epoch_steps, load_data
from postil.files import write_json
from postil.judging.asking.likelihoods import mean_nats, row_losses
from postil.training import TrainOptions
from postil.training.defaults import settled

sys.path.insert(0, str(Path(__file__).parents[1]))
from main_job import BASE, HERE, RAW, answers_of, general, judged, machine, rows_of, test_set, training_rows


def padded(samples: list[Sample], pad: int) -> dict[str, torch.Tensor]:
    """A padded batch: input_ids, attention_mask, labels (-100 where there is no loss)."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), longest), pad)
    labels, mask = torch.full((len(samples), longest), -100), torch.zeros(len(samples), longest, dtype=torch.long)
    for place, sample in enumerate(samples):
        own = torch.from_numpy(sample.ids).long()
        ids[place, : len(own)], mask[place, : len(own)] = own, 1
        learned = torch.from_numpy(sample.weights) > 0
        labels[place, : len(own)] = torch.where(learned, own, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(name: str, data: Path, out: Path) -> None:
    """Train with PEFT, save, judge through postil's engine."""
    recipe = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    base = load_base(BASE, dtype=recipe["dtype"])
    samples = load_data(training_rows(data, recipe["rows"]), base, RAW).samples
    options, _ = settled(TrainOptions.parse(recipe["training"]), samples)
    by_row = {sample.row: sample for sample in samples}
    torch.manual_seed(options.seed)
    full = options.method == "full"
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                             task_type="CAUSAL_LM")  # fmt: skip
    model = base.model.requires_grad_() if full else peft.get_peft_model(base.model, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0, fused=True)
    steps = epoch_steps(samples, batch_size=options.batch_size, accumulation=1, pack_tokens=options.pack_tokens,
                        seed=options.seed, epoch=0)  # fmt: skip
    schedule = get_linear_schedule_with_warmup(optimizer, options.warmup_steps(len(steps)), len(steps))
    began = time.perf_counter()
    for number, packs in enumerate(steps, 1):
        batch = padded([by_row[row] for pack in packs for row in pack.rows], base.tokenizer.eos_token_id)
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(number, len(steps), round(float(loss), 3), flush=True)
    seconds = time.perf_counter() - began
    if full:
        base.model.requires_grad_(False)
        base.changed()
        judged_model = attach(base)
    else:
        model.save_pretrained(out / name)
        judged_model = attach(load_base(BASE, dtype=recipe["dtype"]), load_adapter(out / name))
    judge(name, recipe, seconds, data, judged_model, None if full else "default")


def judge(
    name: str, recipe: dict[str, object], seconds: float, data: Path, model: AdaptedModel, adapter: str | None
) -> None:
    """The figures of bench/main_job.py for what the peer trained."""
    valid = load_data(rows_of(data / "e2e_nlg" / "valid.jsonl")[::7], model.base, RAW).samples
    prompts, references = test_set(data)
    answers = answers_of(model, [prompt + "\n" for prompt in prompts], adapter)
    result = {
        "recipe": recipe,
        "peft": peft.__version__,
        "train_seconds": round(seconds, 1),
        "valid_nats": mean_nats(row_losses(model, valid, adapter)),
        **judged(answers, references),
        "general": general(model, data, adapter),
        "answers": answers,
    }
    write_json(HERE / f"{name}.{'peft' if adapter else 'torch'}.json", result | {"machine": machine()})
    print({key: value for key, value in result.items() if key not in ("recipe", "answers")})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/main_job_peft"))
    given = parser.parse_args()
    for one in given.names:
        run(one, given.data, given.out)
