"""An expert goes out of the quickstart's model and comes back: where tokens go before and after.

    python -m tests.benchmarks.growth CHECKPOINT BASE [NAME...] [--examples N]

CHECKPOINT has some of the quickstart's adapters, such as what `meteora run quickstart` came to; a
NAME that it lacks is only added. BASE is its base as safetensors, N how many examples an adapter is
added with (64). Shares are of (module, token) pairs of 24 test rows a task, behind the template's
opening, with one thread.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import meteora
from meteora.model.fused import expert_names
from pipelines.admission.candidate import Candidate
from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.data.row_sources import read_rows
from pipelines.evaluation.routing_stats import measure_routing
from pipelines.recipe.recipe import locate
from pipelines.stages import edit
from store.ledger import Ledger

SHIPPED = locate("quickstart").parent
ROWS = 24


@torch.inference_mode()
def shares(checkpoint: Path, base: Path) -> dict[str, float]:
    """The share of each task's tokens that go to its own expert."""
    model, tokenizer = meteora.load(checkpoint, base_folder=base)
    found = {}
    for place, name in enumerate(expert_names(model)):
        if not (SHIPPED / "tasks" / name).is_dir():
            continue  # the mean of all experts
        rows = read_rows(f"jsonl:tasks/{name}/test.jsonl", SHIPPED, ROWS)
        sums = measure_routing(model, tokenizer, rows, batch_size=ROWS).values()
        num_own = sum(one.counts[place].item() for one in sums)
        found[name] = num_own / sum(one.num_tokens for one in sums)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--examples", type=int, default=edit.EXAMPLES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    together = shares(asked.checkpoint, asked.base)
    print("| adapter | own tokens, all fitted together | added | the others' | then | of each |")
    print("|-|-|-|-|-|-|")
    for name in asked.names or together:
        with tempfile.TemporaryDirectory() as folder:
            ledger, rows = Ledger(Path(folder)), Path(folder) / "examples.jsonl"
            lines = (SHIPPED / "tasks" / name / "train.jsonl").read_text().splitlines(keepends=True)
            rows.write_text("".join(lines[: asked.examples]))
            known = name in together
            without = edit.drop(ledger, asked.checkpoint, name) if known else asked.checkpoint
            found = FoundCheckpoint(without, asked.base, device="cpu")
            adapter = Candidate(name, str(SHIPPED / "adapters" / name))
            after = shares(edit.add(ledger, found, adapter, f"jsonl:{rows}"), asked.base)
        figures = [together.get(name, float("nan")), after.pop(name)]
        figures += [sum(one[other] for other in after) / len(after) for one in (together, after)]
        cells = [name, *(f"{figure:.3f}" for figure in figures)]
        cells.append(", ".join(f"{other} {share:.3f}" for other, share in after.items()))
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
