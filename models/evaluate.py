"""Measures a checkpoint on held-out prompts by greedy decoding in transformers; it knows the folder and nothing else of it.

python models/evaluate.py models/ernie-4.5-tiny
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from examination import SKILLS, is_right, make_exercises
from transformers import AutoModelForCausalLM, AutoTokenizer

RECALL_LENGTHS = (500, 1000, 2000, 3000)
TOKENS_PER_BATCH = 8192
EVALUATION_SEED = 2


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers out of all; `title` names what was asked."""

    title: str
    right: int
    count: int
    mean_prompt_tokens: float

    def __str__(self) -> str:
        return f"{self.title:28s} {self.right:4d} / {self.count:4d} = {self.right / self.count:6.1%}"


class Candidate:
    """A checkpoint under examination, its weights in fp32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def answer(self, chats: Sequence[list[dict[str, str]]], max_tokens: int) -> tuple[list[str], float]:
        """The greedy answers to conversations, and the mean length of their prompts in tokens."""
        prompts = [
            self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
        ]
        lengths = [len(self.tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts]
        rows = max(1, TOKENS_PER_BATCH // max(lengths))
        answers: list[str] = []
        for start in range(0, len(prompts), rows):
            inputs = self.tokenizer(
                prompts[start : start + rows],
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                return_token_type_ids=False,
            )
            output = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            answers += self.tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return answers, sum(lengths) / len(lengths)

    def score(self, title: str, skill: str, count: int, length: int, seed: int, follow_up: bool = False) -> Score:
        """Marks one skill; as a follow-up, each question comes after the previous exercise and its right answer."""
        exercises = make_exercises(skill, count + 1, length, seed)
        chats = [[{"role": "user", "content": exercise.question}] for exercise in exercises]
        if follow_up:
            for index in range(1, len(chats)):
                before = exercises[index - 1]
                chats[index] = [
                    {"role": "user", "content": before.question},
                    {"role": "assistant", "content": before.answer},
                    *chats[index],
                ]
        answers, mean_length = self.answer(chats[1:], SKILLS[skill].max_tokens)
        pairs = zip(answers, exercises[1:], strict=True)
        return Score(title, sum(is_right(skill, answer, each.answer) for answer, each in pairs), count, mean_length)


def evaluate(folder: Path, count: int, seed: int = EVALUATION_SEED) -> list[Score]:
    """Every skill on `count` prompts; recall at several lengths, the short skills also as the second turn of a chat."""
    candidate = Candidate(folder)
    scores = []
    for length in RECALL_LENGTHS:
        scores.append(candidate.score(f"recall, {length} tokens", "recall", count, length, seed))
        print(scores[-1], flush=True)
    for skill in SKILLS:
        if skill != "recall":
            for suffix, follow_up in (("", False), (", second turn", True)):
                scores.append(candidate.score(f"{skill}{suffix}", skill, count, 0, seed, follow_up))
                print(scores[-1], flush=True)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--prompts", type=int, default=200, help="prompts for each skill and length")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    evaluate(options.folder, options.prompts)


if __name__ == "__main__":
    main()
