"""Trains the small checkpoint from nothing but a seed and writes it: vocabulary, weights, examples and model card.

    python models/train.py --output models/ernie-4.5-tiny

Short contexts come first, because that is where the copying circuits of attention form; long ones follow and only have to
stretch them. One core suffices, and takes twenty to thirty minutes.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from batches import EVEN_MIXTURE, HARD_MIXTURE, LAST_MIXTURE, NUMBER_MIXTURE, Batch, recall_batch, short_batch
from build_tokenizer import build_tokenizer, twin_tokens
from evaluate import evaluate
from examination import SKILLS, examine, examples_json
from export import export
from model_card import TrainingRecord, model_card
from network import Network, NetworkConfig
from optimizer import make_optimizers
from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class Stage:
    """How many steps; the rows of short exercises and of recall in each; the two ends of the learning rate factor."""

    steps: int
    mixture: dict[str, float]
    short_rows: int
    recall_rows: int
    recall_length: int
    first_rate: float
    last_rate: float


SHORT_LENGTH = 192
STAGES = (
    Stage(300, EVEN_MIXTURE, 12, 22, 96, 1.0, 0.4),
    Stage(250, EVEN_MIXTURE, 12, 11, 192, 0.4, 0.35),
    Stage(400, EVEN_MIXTURE, 12, 6, 384, 0.35, 0.2),
    Stage(350, HARD_MIXTURE, 16, 2, 1024, 0.2, 0.1),
    Stage(450, NUMBER_MIXTURE, 20, 1, 1024, 0.15, 0.06),
    Stage(130, HARD_MIXTURE, 10, 1, 2048, 0.06, 0.02),
    Stage(50, HARD_MIXTURE, 8, 1, 3584, 0.02, 0.0),
    Stage(260, LAST_MIXTURE, 12, 1, 3072, 0.06, 0.0),
)
MUON_LR, ADAM_LR = 0.02, 5e-4
WARMUP_STEPS = 50
BALANCE_RATE = 3e-3
REPORT_EVERY, EXAMINE_EVERY = 25, 150
EXAMPLES_SEED = 3


def make_batches(random: Random, tokenizer: Tokenizer, stage: Stage) -> tuple[Batch, Batch]:
    """Short exercises of every skill beside recall from a passage."""
    return (
        short_batch(random, tokenizer, stage.mixture, stage.short_rows, SHORT_LENGTH),
        recall_batch(random, tokenizer, stage.recall_rows, stage.recall_length),
    )


def learning_rate_factor(stage: Stage, step_of_stage: int, step: int) -> float:
    """Linear within a stage, after a warm-up over the first steps of all."""
    progress = step_of_stage / stage.steps
    return min((step + 1) / WARMUP_STEPS, stage.first_rate + progress * (stage.last_rate - stage.first_rate))


class Training:
    """A network, its optimizers and how far they have come; every stage draws its data from its own seed."""

    def __init__(self, network: Network, tokenizer: Tokenizer, seed: int) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.seed = seed
        self.optimizers = make_optimizers(network, MUON_LR, ADAM_LR)
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.stages_done = 0
        self.tokens = 0
        self.seconds = 0.0

    def save(self, path: Path) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.stages_done, self.tokens, self.seconds),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def resume(self, path: Path) -> None:
        state = torch.load(path)
        self.network.load_state_dict(state["network"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.stages_done, self.tokens, self.seconds = state["progress"]

    def run_stage(self, stages: tuple[Stage, ...]) -> None:
        """Trains through the first stage that is not done yet."""
        index, stage = self.stages_done, stages[self.stages_done]
        random = Random(f"{self.seed} stage {index}")
        steps_before = sum(earlier.steps for earlier in stages[:index])
        seconds_before, started = self.seconds, time.monotonic()
        for step in range(steps_before, steps_before + stage.steps):
            rate_factor = learning_rate_factor(stage, step - steps_before, step)
            losses, imbalance = self.step(make_batches(random, self.tokenizer, stage), rate_factor)
            self.seconds = seconds_before + time.monotonic() - started
            if step % REPORT_EVERY == 0:
                print(
                    f"step {step:5d}  {self.seconds:6.0f} s  {self.tokens:9d} tokens  loss short {losses[0]:.3f} "
                    f"recall {losses[1]:.3f}  load max/mean {imbalance:.2f}",
                    flush=True,
                )
            if step % EXAMINE_EVERY == EXAMINE_EVERY - 1:
                scores = {
                    skill: examine(self.network, self.tokenizer, skill, 48, stage.recall_length) for skill in SKILLS
                }
                print("    " + "  ".join(f"{name} {score:.2f}" for name, score in scores.items()), flush=True)
        self.stages_done += 1

    def step(self, batches: tuple[Batch, ...], rate_factor: float) -> tuple[list[float], float]:
        """One update from all batches together; returns their losses and the worst expert load over the mean."""
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * rate_factor
            optimizer.zero_grad()
        losses = []
        for batch in batches:
            logits = self.network(batch.tokens_BT, batch.positions)
            # A passage may leave no room for an answer: such a batch has a loss of nought.
            loss = F.cross_entropy(logits, batch.targets, reduction="sum") / max(1, len(batch.targets))
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
            self.tokens += batch.tokens_BT.numel()
        for optimizer in self.optimizers:
            optimizer.step()
        return losses, max(mixture.balance(BALANCE_RATE) for mixture in self.network.mixtures())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--state", type=Path, help="file that keeps the progress after each stage, and resumes from it")
    parser.add_argument("--seed", type=int, default=45)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=200, help="prompts for each skill in the final measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer(options.seed)
    network = Network(NetworkConfig(tokenizer.get_vocab_size()), torch.bfloat16)
    network.initialize(options.seed, twin_tokens(tokenizer))
    training = Training(network, tokenizer, options.seed)
    if options.state and options.state.exists():
        training.resume(options.state)
    while training.stages_done < len(STAGES):
        training.run_stage(STAGES)
        if options.state:
            training.save(options.state)
            export(network, tokenizer, options.output, {})
    export(network, tokenizer, options.output, {})
    scores = evaluate(options.output, options.prompts)
    steps = sum(stage.steps for stage in STAGES)
    record = TrainingRecord(options.seed, training.tokens, steps, training.seconds, options.threads)
    card = model_card(network, record, scores, [stage.recall_length for stage in STAGES])
    export(network, tokenizer, options.output, {"README.md": card, "skills.json": examples_json(EXAMPLES_SEED)})
    print(f"{training.tokens} tokens in {training.seconds:.0f} s")


if __name__ == "__main__":
    main()
