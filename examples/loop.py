"""Training without abstractions: one adapter, one loop to edit. `python examples/loop.py BASE DATA.jsonl OUT`."""

from __future__ import annotations

import sys

import torch

import postil
from postil.data import epoch_steps
from postil.kernels.layout import Layout

base_name, data_file, out = sys.argv[1:4]
base = postil.load_base(base_name)
samples = postil.load_data(data_file, base).samples
model = postil.attach(base, postil.LoraConfig(r=8, alpha=16), name="note")
note = model.resident("note")
note.train()  # every A and B is a leaf view into one flat buffer, its gradient a view into another
optimizer = torch.optim.AdamW(note.leaves.values(), lr=2e-4, weight_decay=0.0)

for epoch in range(1):
    for packs in epoch_steps(samples, batch_size=8, accumulation=1, pack_tokens=4096, seed=0, epoch=epoch):
        targets = sum(pack.target_tokens for pack in packs)  # of the whole step, known before its first pack
        loss = 0.0
        for pack in packs:
            ids, positions, weights = (torch.from_numpy(x) for x in (pack.ids, pack.positions, pack.weights))
            spans = model.spans_for({"note": 1.0}, len(ids))
            with model.using(Layout.packed(pack.lengths, spans)):
                total, _, _ = model.loss(ids, positions, weights / targets)
                total.backward()
            loss += total.item()
        torch.nn.utils.clip_grad_norm_(note.leaves.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the gradient views stay where they are
        print(f"loss {loss:.4f}")

note.train(False)
postil.save_adapter(model.export("note"), out)
postil.detach(model)
