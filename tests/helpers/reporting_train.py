"""`theworld train`, which also writes `report-RANK.json`: its losses, and its share of each parameter."""

import json
import os
import sys
from pathlib import Path

from torch.distributed.tensor import DTensor

from theworld.training.train import prepare, train_and_save


trainer = train_and_save(prepare(sys.argv[1:]))
held = {
    name: parameter.to_local().numel() / parameter.numel()
    for name, parameter in trainer.model.named_parameters()
    if isinstance(parameter, DTensor)
}
report = {
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    "eval_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
    "wrapper": type(trainer.model_wrapped).__name__,
    "held": held,
    "parameters": [name for name, _ in trainer.model.named_parameters()],
}
file = Path(trainer.args.output_dir) / f"report-{os.environ.get('RANK', 0)}.json"
file.write_text(json.dumps(report))
